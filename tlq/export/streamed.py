"""Open a checkpoint, quantized or not, as a model whose decoder layers are read one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tlq.export.quantized import PackedTensor, QuantizedCheckpoint
from tlq.models.checkpoint import read_config
from tlq.models.stored import StoredTensor, refuse_foreign_quantization
from tlq.models.streaming import StreamedModel
from tlq.quantization.formats import quantize_inputs


class PackedModel(StreamedModel):
    """A quantized checkpoint: a layer's codes are read and become weights, which leave when the next layer comes.

    Weights are as an engine has them (see ``PackedTensor``). Linears whose scheme quantizes activations quantize their
    input.
    """

    def _read_config(self, checkpoint: str | Path) -> Any:
        config = read_config(checkpoint)
        refuse_foreign_quantization(config, checkpoint)
        config.__dict__.pop("quantization_config", None)  # the module tree is that of the original
        return config

    def _stored(self) -> dict[str, StoredTensor]:
        checkpoint = QuantizedCheckpoint.open(self.folder)
        return checkpoint.others | {f"{name}.weight": checkpoint.packed(name) for name in checkpoint.schemes}

    def _find_tensors(self) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
        """Raises: as ``StreamedModel`` and ``QuantizedCheckpoint.open``."""
        found, unnamed = super()._find_tensors()
        for name, place in found.items():
            if isinstance(place, PackedTensor) and place.scheme.activation_bits is not None:
                linear = self.skeleton.get_submodule(name.removesuffix(".weight"))
                quantize_inputs(linear, place.scheme.activation_bits)
        return found, unnamed


def open_model(
    checkpoint: str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> StreamedModel:
    """The streamed model of a checkpoint directory or hub id.

    Args:
        dtype: of computation; ``auto`` is the checkpoint's own.

    Raises: as ``StreamedModel``.
    """
    quantized = getattr(read_config(checkpoint), "quantization_config", None) is not None
    return (PackedModel if quantized else StreamedModel)(checkpoint, dtype, device)
