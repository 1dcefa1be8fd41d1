"""Exports for tests: through the project's own writer, and through compressed-tensors' compression of a whole model."""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import apply_quantization_config
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText

from tlq.calibration.loop import Calibrated
from tlq.export.compressed_tensors import finish_checkpoint, quantization_config, write_layer
from tlq.models.checkpoint import checkpoint_dtype_of, read_config
from tlq.models.streaming import StreamedModel
from tlq.quantization.formats import QuantizedWeight, Scheme


def write_export(source: Path, calibrated: Calibrated, scheme: Scheme, out: Path) -> Path:
    """Write the result of ``calibrate`` as a checkpoint, layer by layer."""
    model = StreamedModel(source)
    out.mkdir(parents=True, exist_ok=True)
    shards = []
    for layer in calibrated.layers:
        shards.append(out.with_name(f"{out.name}-{layer.index}.safetensors"))
        write_layer(shards[-1], model, layer.weights, layer.others, scheme)
    finish_checkpoint(out, shards, model, scheme)
    return out


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by its stored name."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def whole_model_tensors(
    source: Path, calibrated: nn.Module, weights: dict[str, QuantizedWeight], scheme: Scheme
) -> dict[str, torch.Tensor]:
    """State dict of the model compressed as a whole by compressed-tensors, by the module tree's names."""
    config = read_config(source)
    dtype = checkpoint_dtype_of(config, source)
    model = AutoModelForImageTextToText.from_pretrained(source, config=config, dtype=dtype)
    _copy_unquantized(calibrated, model, set(weights))
    architecture = StreamedModel(source).architecture
    quantization = quantization_config(scheme, architecture, len(architecture.decoder_layers(model)))
    apply_quantization_config(model, quantization)
    for path, weight in weights.items():
        _set_quantized(model.get_submodule(path), weight, scheme)
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    return dict(model.state_dict())


@torch.no_grad()
def _copy_unquantized(calibrated: nn.Module, model: nn.Module, quantized: set[str]) -> None:
    """Norms, biases and all other tensors that calibration may have changed."""
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
