"""Read a checkpoint: its config, the whole model as its user loads it, and the files of its processor.

``tlq.export`` writes checkpoints, ``tlq.models.streaming`` reads one layer at a time.
"""

from __future__ import annotations

import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

from tlq.models.architectures import FAMILIES, architecture_of
from tlq.models.stored import dtype_of_weights

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


def read_config(checkpoint: str | Path) -> Any:
    """The config of a checkpoint directory or hub id.

    Raises:
        FileNotFoundError: neither a directory with a config.json nor a hub id that can be reached.
        ValueError: the model family is not supported.
    """
    path = Path(checkpoint)
    if path.exists() and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path}: no config.json; give a Hugging Face checkpoint directory")
    try:
        config = load_config(checkpoint)
    except OSError as error:
        raise FileNotFoundError(
            f"model {checkpoint!s}: not a directory here and not a hub model that can be reached; "
            "check the path or hub id"
        ) from error
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"model {checkpoint!s}: transformers cannot read its config ({str(error).splitlines()[0]}); "
            f"choose a model of one of: {', '.join(FAMILIES)}"
        ) from error
    architecture_of(config)
    return config


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
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, config=config, dtype=dtype, device_map=str(device))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.quantization_config.dequantize:
        from compressed_tensors.offload.dispatch import remove_dispatch  # seconds, which stages without a model save

        quantizer.compressor.decompress_model(model)
        remove_dispatch(model, onload_tensors=True)
    return model.eval()


def load_config(checkpoint: str | Path) -> Any:
    """The config of a checkpoint directory or hub id, of any family.

    Configs exist whose dtype is `auto` or `torch.bfloat16`, which transformers does not read: the one counts as none.
    """
    stated = PretrainedConfig.get_config_dict(checkpoint)[0]
    dtype = stated.get("dtype", stated.get("torch_dtype"))
    if dtype != "auto" and not str(dtype).startswith("torch."):
        return AutoConfig.from_pretrained(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint, dtype=None)
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

    skipped = _NOT_PROCESSOR - {".safetensors"} if weights else _NOT_PROCESSOR
    return Path(snapshot_download(str(source), ignore_patterns=[f"*{suffix}" for suffix in sorted(skipped)]))


def copy_processor_files(source: str | Path, out: Path) -> None:
    """Copy tokenizer, image processor, chat template and generation settings unchanged."""
    for file in sorted(local_folder(source, weights=False).iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in _PROCESSOR_FILES):
            shutil.copyfile(file, out / file.name)
    templates = local_folder(source, weights=False) / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, out / templates.name)
