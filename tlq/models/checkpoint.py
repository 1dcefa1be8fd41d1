"""Read a checkpoint: its config, the whole model as its user loads it, and the files of its processor.

``tlq.export`` writes checkpoints, ``tlq.models.streaming`` reads one layer at a time.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.offload.dispatch import remove_dispatch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tlq.models.architectures import FAMILIES, architecture_of

_NOT_PROCESSOR = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"}
_NOT_COPIED = {"config.json", "model.safetensors.index.json", "README.md"}


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
        config = AutoConfig.from_pretrained(checkpoint)
    except OSError as error:
        raise FileNotFoundError(
            f"model {checkpoint!s}: not a directory here and not a hub model that can be reached; "
            "check the path or hub id"
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
        quantizer.compressor.decompress_model(model)
        remove_dispatch(model, onload_tensors=True)
    return model.eval()


def checkpoint_dtype_of(config: Any) -> torch.dtype:
    """The dtype in which a checkpoint keeps its weights.

    Args:
        config: from ``read_config``; the config of a loaded model states the dtype it was loaded in instead.
    """
    dtype = config.dtype or config.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


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
        if file.is_file() and file.suffix not in _NOT_PROCESSOR and file.name not in _NOT_COPIED:
            shutil.copyfile(file, out / file.name)
