"""Load a vision-language checkpoint; export a calibrated model in compressed-tensors form.

The exported directory loads with ``AutoModelForImageTextToText.from_pretrained`` and nothing else, and holds the
processor files of the model it came from.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.offload.dispatch import remove_dispatch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
    apply_quantization_config,
)
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tlq.architectures import FAMILIES, Architecture, architecture_of, linear_paths
from tlq.quantizer import QuantizedWeight, Scheme, get_scheme

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


def storage_dtype(config: Any) -> torch.dtype:
    """The dtype in which a checkpoint keeps its weights.

    Args:
        config: from ``read_config``; that of a loaded model says the dtype it was loaded in.
    """
    dtype = config.dtype or config.get_text_config().dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def export_checkpoint(
    source: str | Path,
    calibrated: nn.Module,
    weights: dict[str, QuantizedWeight],
    scheme: Scheme,
    out: Path,
) -> None:
    """Write a checkpoint with the quantized ``weights`` and everything else of ``calibrated`` to ``out``.

    Args:
        source: the full-precision checkpoint that ``calibrated`` was loaded from.
        calibrated: the model after ``tlq.calibrate.calibrate``; its norms and biases hold the folded scales.
        weights: quantized weights by module path.

    Raises:
        ValueError: the weights were quantized with scales of another dtype than the checkpoint stores.
    """
    config = read_config(source)
    architecture = architecture_of(config)
    storage = storage_dtype(config)
    if any(weight.scale.dtype != storage for weight in weights.values()):
        raise ValueError(
            f"{source!s} stores {storage}, its weights were quantized for another dtype; see storage_dtype"
        )
    model = AutoModelForImageTextToText.from_pretrained(source, config=config, dtype=storage)
    _copy_unquantized(calibrated, model, set(weights))
    quantization = quantization_config(scheme, architecture, len(architecture.decoder_layers(model)))
    apply_quantization_config(model, quantization)
    for path, weight in weights.items():
        _set_quantized(model.get_submodule(path), weight, scheme)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(str(out))
    _correct_config(out / "config.json", scheme, quantization.ignore)
    copy_processor_files(source, out)


def quantization_config(scheme: Scheme, architecture: Architecture, layers: int) -> QuantizationConfig:
    """The scheme in compressed-tensors' terms, for a decoder of ``layers`` layers.

    Linears that an override gives another scheme are a config group each scheme, named one by one by the end of their
    path: engines put other prefixes before ``layers``.
    """
    kept: list[str] = []
    others: dict[str, list[str]] = {}
    for path in (path for index in range(layers) for path in linear_paths(architecture, index)):
        own = scheme.of(path)
        pattern = f"re:.*{re.escape(path.removeprefix(architecture.layers.removesuffix('layers')))}$"
        if own is None:
            kept.append(pattern)
        elif own != replace(scheme, overrides=()):
            others.setdefault(own.name, []).append(pattern)
    groups = {"group_0": _config_group(scheme, [_TARGETS])}
    for number, (name, patterns) in enumerate(others.items(), 1):
        groups[f"group_{number}"] = _config_group(get_scheme(name), patterns)
    return QuantizationConfig(
        config_groups=groups,
        ignore=[*architecture.ignore, *kept],
        quantization_status=QuantizationStatus.FROZEN,
    )


def _config_group(scheme: Scheme, targets: list[str]) -> QuantizationScheme:
    strategy = QuantizationStrategy.CHANNEL if scheme.group_size is None else QuantizationStrategy.GROUP
    weights = QuantizationArgs(
        num_bits=scheme.weight_bits,
        type=QuantizationType.INT,
        symmetric=scheme.symmetric,
        strategy=strategy,
        group_size=scheme.group_size,
    )
    activations = None
    if scheme.activation_bits is not None:
        activations = QuantizationArgs(
            num_bits=scheme.activation_bits,
            type=QuantizationType.INT,
            symmetric=True,
            strategy=QuantizationStrategy.TOKEN,
            dynamic=True,
        )
    return QuantizationScheme(targets=targets, weights=weights, input_activations=activations)


@torch.no_grad()
def _copy_unquantized(calibrated: nn.Module, model: nn.Module, quantized: set[str]) -> None:
    """Norms, biases and everything else that calibration may have changed."""
    changed = dict(calibrated.named_parameters())
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in quantized:
            parameter.copy_(changed[name])


@torch.no_grad()
def _set_quantized(linear: nn.Module, weight: QuantizedWeight, scheme: Scheme) -> None:
    """Give a linear its scales, and a weight that packs to exactly ``weight.codes``."""
    linear.weight.data = weight.dequantize().to(torch.float32)
    linear.weight_scale.data = weight.scale.clone()
    if not scheme.symmetric:
        linear.weight_zero_point.data = weight.zero_point.clone()


def _correct_config(path: Path, scheme: Scheme, ignore: list[str] | None) -> None:
    """Two things that compressed-tensors 0.20 writes in a way that does not load.

    Its ignore list holds on-disk names where loading matches module names; and asymmetric weights load only with
    ``dequantize`` (which would drop activation quantization, so nothing else gets it).
    """
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = ignore
    if not scheme.symmetric:
        config["quantization_config"]["dequantize"] = True
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_processor_files(source: str | Path, out: Path) -> None:
    """Copy tokenizer, image processor, chat template and generation settings unchanged."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = [f"*{suffix}" for suffix in _NOT_PROCESSOR]
        folder = Path(snapshot_download(str(source), ignore_patterns=patterns))
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix not in _NOT_PROCESSOR and file.name not in _NOT_COPIED:
            shutil.copyfile(file, out / file.name)


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files, but its model card, which tells the scores."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.name != "README.md"):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.name} {content}\n".encode())
    return total.hexdigest()
