"""Add the outlier channels of large models to a small model without changing its function.

Real VLM decoders have activation channels that are tens of times larger than the median. A small model trained from
scratch has none, and then all quantization methods perform alike. Multiplying a channel of a norm's gain (or a row of
up_proj) by c, and dividing the matching input columns of the following linears by c, adds outliers to activations and
weights, and changes the function only by rounding.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class OutlierParams:
    """Channel factors c = exp(``spread`` N(0, 1)), times ``strength`` on a share ``fraction`` of the channels."""

    spread: float = 0.5
    fraction: float = 0.01
    strength: float = 20.0
    seed: int = 0


def channel_factors(width: int, params: OutlierParams, generator: torch.Generator) -> torch.Tensor:
    """[width] positive factors; at least one channel is an outlier if ``fraction`` is positive."""
    factors = torch.exp(params.spread * torch.randn(width, generator=generator))
    outliers = max(1, round(params.fraction * width)) if params.fraction > 0 else 0
    factors[torch.randperm(width, generator=generator)[:outliers]] *= params.strength
    return factors


@torch.no_grad()
def add_outliers(model: PreTrainedModel, params: OutlierParams) -> None:
    """Rescale every decoder layer in place: both norms against their linears, up_proj against down_proj.

    Raises:
        ValueError: the model is not in fp32, in which the rescaling is exact up to rounding.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"outliers are added in float32, the model is in {model.dtype}; call model.float() first")
    generator = torch.Generator().manual_seed(params.seed)
    decoder: Any = model.base_model
    for layer in decoder.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        before = [each.weight for each in (attention.q_proj, attention.k_proj, attention.v_proj)]
        after, pairs = _weights_of(mlp)
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        for gain, readers in zip((norm.weight for norm in norms), (before, after), strict=True):
            factors = channel_factors(len(gain), params, generator)
            gain.mul_(factors)
            for reader in readers:
                reader.div_(factors)
        for up, down in pairs:
            factors = channel_factors(len(up), params, generator)
            up.mul_(factors[:, None])
            down.div_(factors)


def _weights_of(mlp: Any) -> tuple[list[torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
    """The weights that multiply the MLP's input, and up [inner, in] with down [out, inner] of it or of each expert."""
    experts = getattr(mlp, "experts", None)
    if experts is None:
        return [mlp.gate_proj.weight, mlp.up_proj.weight], [(mlp.up_proj.weight, mlp.down_proj.weight)]
    inner = experts.down_proj.shape[2]
    pairs = zip(experts.gate_up_proj[:, inner:], experts.down_proj, strict=True)
    return [mlp.gate.weight, experts.gate_up_proj], list(pairs)


def remove_outliers(model: PreTrainedModel, params: OutlierParams) -> None:
    """Undo ``add_outliers`` with the same parameters: every factor is divided by itself, up to rounding."""
    add_outliers(model, replace(params, spread=-params.spread, strength=1 / params.strength))
