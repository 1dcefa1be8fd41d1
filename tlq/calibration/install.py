"""Install solved groups: write rounded weights and folded scales into the modules of a layer, and keep the codes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from tlq.models.architectures import Architecture, get_linear
from tlq.models.linear_groups import LinearGroup
from tlq.quantization.equalization import Fold
from tlq.quantization.formats import QuantizedWeight, WeightQuantizer, quantize_inputs


@dataclass
class QuantizedLayer:
    """A decoder layer, some of whose groups are already quantized.

    Attributes:
        weights: quantized weights by full module path.
        quantizer: scheme with overrides, and dtype of the checkpoint.
    """

    index: int
    layer: nn.Module
    architecture: Architecture
    quantizer: WeightQuantizer
    weights: dict[str, QuantizedWeight] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        return f"{self.architecture.layers}.{self.index}."

    def install(self, group: LinearGroup, rounded: QuantizedWeight, fold: Fold | None, s: Tensor) -> None:
        """Install 1/s and the codes of V diag(s), stacked over the linears of ``group``, in the layer."""
        rows = [get_linear(self.layer, path).out_features for path in group.linears]
        for path, part in zip(group.linears, rounded.split(rows), strict=True):
            self.weights[f"{self.prefix}{path}"] = part
            self._install_linear(path, part)
        if fold is None or group.fold is None:
            return
        per_row = fold.per_row(s)
        if bool((per_row == 1).all()):
            return
        for path in group.kept:
            kept = get_linear(self.layer, path)
            kept.weight.copy_((kept.weight * s).to(self.quantizer.scale_dtype))
        if fold.is_norm:
            fold.weight.copy_(fold.folded_weight(per_row))
            return
        per_row = fold.every_row(per_row)
        name = f"{self.prefix}{group.fold}"
        before = get_linear(self.layer, group.fold)
        if name in self.weights:
            own = self.quantizer.scheme.of(name)
            assert own is not None
            self.weights[name] = self.weights[name].rescale_rows(1 / per_row, own)
            before.weight.copy_(self.weights[name].dequantize(self.quantizer.compute_dtype))
        else:  # the linear stays in full precision
            before.weight.copy_((before.weight / per_row[:, None]).to(self.quantizer.scale_dtype))
        if before.bias is not None:
            before.bias.copy_((before.bias / per_row).to(self.quantizer.scale_dtype))

    def restore(self, weights: dict[str, QuantizedWeight], others: dict[str, Tensor]) -> None:
        """Install the fields ``weights`` and ``others`` of the ``LayerResult`` of an earlier run."""
        tensors = self.layer.state_dict()
        for name, value in others.items():
            tensors[name.removeprefix(self.prefix)].copy_(value)
        for name, weight in weights.items():
            self.weights[name] = weight
            self._install_linear(name.removeprefix(self.prefix), weight)

    def others(self) -> dict[str, Tensor]:
        """Every other tensor of the layer by full name, in the dtype of the checkpoint; buffers in their own."""
        quantized = {f"{name}.weight" for name in self.weights}
        tensors = {f"{self.prefix}{name}": value for name, value in self.layer.state_dict().items()}
        dtype, buffers = self.quantizer.scale_dtype, {f"{self.prefix}{name}" for name, _ in self.layer.named_buffers()}
        return {
            name: value if name in buffers else value.to(dtype)
            for name, value in tensors.items()
            if name not in quantized
        }

    def _install_linear(self, path: str, weight: QuantizedWeight) -> None:
        linear = get_linear(self.layer, path)
        linear.weight.copy_(weight.dequantize(self.quantizer.compute_dtype))
        bits = self.quantizer.scheme.activation_bits  # an override never changes it
        if bits is not None:
            quantize_inputs(linear, bits)
