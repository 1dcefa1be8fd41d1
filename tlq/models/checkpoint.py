"""Load a vision-language checkpoint; export a calibrated model in compressed-tensors form.

The exported directory loads with ``AutoModelForImageTextToText.from_pretrained`` and nothing else, and holds the
processor files of the model it came from.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload.dispatch import remove_dispatch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tlq.models.architectures import FAMILIES, architecture_of

_TARGETS = "Linear"
_NOT_PROCESSOR = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
_NOT_COPIED = {"config.json", "model.safetensors.index.json", "README.md"}


def read_config(checkpoint: str | Path) -> Any:
    """The config of a checkpoint directory or hub id.

    Raises:
        FileNotFoundError: neither a directory with a config.json nor a hub id that can be reached.
        ValueError: a model family that is not supported.
    """
    path = Path(checkpoint)
    if path.exists() and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path}: no config.json; model.path must be a Hugging Face checkpoint directory")
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except OSError as error:
        raise FileNotFoundError(
            f"model {checkpoint!s}: not a directory here and not a hub model that can be reached; "
            "check model.path in params.yaml"
        ) from error
    except ValueError as error:
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
    """A checkpoint as its user loads it, in evaluation mode on ``device``.

    Quantized checkpoints are decompressed once here, and the module wrappers of compressed-tensors taken off: left to
    itself it decompresses on the first forward pass, and its wrappers turn a model output handed to a module into a
    plain dict, which ``generate`` of LLaVA-NeXT and LLaVA-OneVision does not survive (0.20).

    Raises: as ``read_config``.
    """
    config = read_config(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, config=config, dtype=dtype, device_map=str(device))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.quantization_config.dequantize:
        quantizer.compressor.decompress_model(model)
        remove_dispatch(model, onload_tensors=True)
    return model.eval()


def checkpoint_dtype_of(config: Any) -> torch.dtype:
    """The dtype in which a checkpoint keeps its weights.

    Args:
        config: from ``read_config``; that of a loaded model says the dtype it was loaded in.
    """
    dtype = config.dtype or config.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def local_folder(source: str | Path, weights: bool = True) -> Path:
    """The directory of a checkpoint; a hub id is downloaded, without its weights if they are not wanted."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    unwanted = _NOT_PROCESSOR - {".safetensors"} if weights else _NOT_PROCESSOR
    return Path(snapshot_download(str(source), ignore_patterns=[f"*{suffix}" for suffix in sorted(unwanted)]))


def copy_processor_files(source: str | Path, out: Path) -> None:
    """Copy tokenizer, image processor, chat template and generation settings unchanged."""
    for file in sorted(local_folder(source, weights=False).iterdir()):
        if file.is_file() and file.suffix not in _NOT_PROCESSOR and file.name not in _NOT_COPIED:
            shutil.copyfile(file, out / file.name)
