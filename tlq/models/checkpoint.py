"""Read a checkpoint: its config, the whole model as its user loads it, and the files of its processor.

``tlq.export`` writes checkpoints, ``tlq.models.streaming`` reads one layer at a time.
"""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from tlq.models.architectures import FAMILIES, architecture_of
from tlq.models.stored import dtype_of_weights, read_json, refuse_quantized, stored_tensors

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
            f"model {checkpoint!s}: its config.json has an impossible value ({_last_line(error)}); correct it, or "
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


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def empty_model(config: Any, checkpoint: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The module tree that a config describes, in evaluation mode, its parameters without values (on ``meta``).

    Raises:
        ValueError: transformers cannot build it, for instance because a size is 0.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(
                deepcopy(config), dtype=dtype, trust_remote_code=False
            )
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(
            f"model {checkpoint!s}: transformers cannot build what its config.json describes ({type(error).__name__}: "
            f"{_last_line(error)[:200]}); correct it, or download it again"
        ) from error
    return model.eval()


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


def load_model(
    checkpoint: str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The model of a checkpoint in evaluation mode on ``device``, as its user loads it.

    A quantized checkpoint is decompressed here, and the module wrappers of compressed-tensors are removed. Otherwise
    compressed-tensors 0.20 decompresses during the first forward pass, and its wrappers turn a model output that is
    passed to a module into a plain dict, which breaks ``generate`` of LLaVA-NeXT and LLaVA-OneVision.

    Raises: as ``read_config``.
    """
    config = read_config(checkpoint)
    if Path(checkpoint).is_dir():
        stored = stored_tensors(Path(checkpoint))  # names a damaged file, which transformers does not
        if getattr(config, "quantization_config", None) is None:
            refuse_quantized(stored)
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint,
            config=config,
            dtype=dtype,
            device_map=str(device),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except (ArithmeticError, AssertionError, LookupError, TypeError, RuntimeError):
        empty_model(config, checkpoint, torch.float32)  # says what is wrong if the config is
        raise
    model, loading = loaded
    _check_complete(checkpoint, model, loading)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.quantization_config.dequantize:
        from compressed_tensors.offload.dispatch import remove_dispatch  # seconds, which stages without a model save

        quantizer.compressor.decompress_model(model)
        remove_dispatch(model, onload_tensors=True)
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def _check_complete(checkpoint: str | Path, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Refuse a model that does not have exactly the checkpoint's weights: transformers fills gaps at random.

    Raises:
        ValueError: weights are missing or have another shape.
        FloatingPointError: a weight is not finite.
    """
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise ValueError(
            f"model {checkpoint!s}: {name} has shape {list(stored)}, the model of its config.json needs "
            f"{list(wanted)}; download the checkpoint again"
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(
            f"model {checkpoint!s}: {len(missing)} weights are missing, the first is {missing[0]}; the checkpoint is "
            "incomplete, download it again"
        )
    for name, value in model.state_dict().items():
        if value.is_floating_point() and value.itemsize > 1 and not torch.isfinite(value).all():
            raise FloatingPointError(
                f"model {checkpoint!s}: {name} is not finite; the checkpoint is damaged, download it again"
            )


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
