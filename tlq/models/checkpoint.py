"""Read a checkpoint's config and the files of its processor.

``tlq.models.streaming`` reads its weights one layer at a time, ``tlq.export.loading`` the whole model.
"""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from tlq.models.architectures import architecture_of
from tlq.models.families import FAMILIES
from tlq.models.stored import dtype_of_weights, read_json

_NOT_PROCESSOR = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
#: Files of the tokenizer, the processor and of generation. Adapters, optimizers and other leftovers are not copied.
_PROCESSOR_FILES = (
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*preprocessor_config.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "merges.txt",
    "NOTICE*",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece*",
    "tekken.json",
    "tokenizer*",
    "vocab*",
)


#: Attention that transformers has itself. Any other name would be downloaded from the hub as code and run.
_ATTENTION = {None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
_ATTENTION_KEYS = {"attn_implementation", "_attn_implementation", "_attn_implementation_internal"}


class ForeignCodeError(ValueError):
    """A checkpoint asks for code that is not transformers' own."""


def read_config(checkpoint: str | Path) -> Any:
    """The config of a checkpoint directory or hub id.

    Raises:
        FileNotFoundError: neither a directory with a config.json nor a hub id that can be reached.
        ValueError: the model family is not supported, the config asks for code of the hub, or a file of the processor
            lies outside the directory.
    """
    path = Path(checkpoint)
    if path.exists() and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path}: no config.json; give a Hugging Face checkpoint directory")
    if path.exists():
        read_json(path / "config.json")  # transformers says of a damaged file that it is not there
    try:
        config = load_config(checkpoint)
    except OSError as error:
        raise FileNotFoundError(
            f"model {checkpoint!s}: not a directory here and not a hub model that can be reached; "
            "check the path or hub id"
        ) from error
    except ForeignCodeError:
        raise
    except StrictDataclassError as error:
        raise ValueError(
            f"model {checkpoint!s}: its config.json has an impossible value ({last_line(error)}); correct it, or "
            "download it again"
        ) from error
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"model {checkpoint!s}: transformers cannot read its config ({str(error).splitlines()[0]}); "
            f"choose a model of one of: {', '.join(FAMILIES)}"
        ) from error
    architecture_of(config)
    if path.is_dir():
        processor_files(path)
    return config


def last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _refuse_foreign_attention(checkpoint: str | Path, stated: Any) -> None:
    """Raise ForeignCodeError if a config, or a part of it, names an attention that is not transformers' own."""
    if isinstance(stated, dict):
        for key, value in stated.items():
            names = (value.values() if isinstance(value, dict) else [value]) if key in _ATTENTION_KEYS else []
            for name in names:
                if not isinstance(name, str | None) or name not in _ATTENTION:
                    raise ForeignCodeError(
                        f"model {checkpoint!s}: its config.json names the attention {name!r}, which would be "
                        f"downloaded and run as code; remove {key} from config.json"
                    )
            _refuse_foreign_attention(checkpoint, value)
    elif isinstance(stated, list):
        for each in stated:
            _refuse_foreign_attention(checkpoint, each)


def load_config(checkpoint: str | Path) -> Any:
    """The config of a checkpoint directory or hub id, of any family.

    Configs exist whose dtype is `auto` or `torch.bfloat16`, which transformers does not read: the one counts as none.
    """
    stated = PretrainedConfig.get_config_dict(checkpoint)[0]
    _refuse_foreign_attention(checkpoint, stated)
    dtype = stated.get("dtype", stated.get("torch_dtype"))
    if dtype != "auto" and not str(dtype).startswith("torch."):
        return AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    config = AutoConfig.from_pretrained(checkpoint, dtype=None, trust_remote_code=False)
    config.dtype = None if dtype == "auto" else getattr(torch, str(dtype).removeprefix("torch."))
    return config


def checkpoint_dtype_of(config: Any, folder: Path) -> torch.dtype:
    """The dtype in which a checkpoint keeps its weights: what ``dtype="auto"`` gives in transformers.

    Args:
        config: from ``read_config``; the config of a loaded model states the dtype it was loaded in instead.
        folder: of the checkpoint, whose weights are looked at if the config states no dtype.
    """
    return config.dtype if isinstance(config.dtype, torch.dtype) else dtype_of_weights(folder)


def local_folder(source: str | Path, weights: bool = True) -> Path:
    """The directory of a checkpoint; a hub id is downloaded, without its weights if ``weights`` is false."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    def downloaded(*wanted: str) -> Path:
        skipped = sorted(_NOT_PROCESSOR - set(wanted))
        return Path(snapshot_download(str(source), ignore_patterns=[f"*{suffix}" for suffix in skipped]))

    if not weights:
        return downloaded()
    folder = downloaded(".safetensors")
    return folder if any(folder.glob("*.safetensors")) else downloaded(".bin")


def copy_processor_files(source: str | Path, out: Path) -> None:
    """Copy tokenizer, image processor, chat template and generation settings; only names of custom code are left out.

    Raises:
        ValueError: a file is a link to a place outside the checkpoint.
    """
    folder = local_folder(source, weights=False)
    for file in processor_files(folder):
        copy = out / file.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json" and "auto_map" in (settings := read_json(file)):
            copy.write_text(json.dumps(without_custom_code(settings), indent=2) + "\n")
        else:
            shutil.copyfile(file, copy)


def without_custom_code(settings: dict[str, Any]) -> dict[str, Any]:
    """A config without `auto_map`, in any of its parts: an export has no code that it could name."""
    return {
        key: without_custom_code(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if key != "auto_map"
    }


def processor_files(folder: Path) -> list[Path]:
    """Files of the processor and additional chat templates in a checkpoint directory.

    Raises:
        ValueError: a file is a link to a place outside the checkpoint.
    """
    named = [file for file in folder.iterdir() if any(fnmatch(file.name, pattern) for pattern in _PROCESSOR_FILES)]
    files = sorted(file for file in [*named, *(folder / "additional_chat_templates").rglob("*")] if file.is_file())
    places = [folder.resolve()]
    if folder.parent.name == "snapshots":  # the hub's cache: files of a snapshot are links
        places.append((folder.parent.parent / "blobs").resolve())
    for file in files:
        if not any(file.resolve().is_relative_to(place) for place in places):
            raise ValueError(
                f"{file} is a link to {file.resolve()}, outside the checkpoint; copy the file into the checkpoint"
            )
    return files
