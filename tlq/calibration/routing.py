"""Which tokens an expert is calibrated on.

The router of a layer sends tokens to an expert, and calibration gives them weights. An expert with too few tokens would
be rounded without data; it gets further tokens, evenly from the whole pool, at the least weight that is enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

#: Least effective sample size of an expert's tokens, as a multiple of the width of its linears' input.
LEAST_TOKENS = 0.5


@dataclass(frozen=True)
class ExpertTokens:
    """Weights of the tokens of one linear group of an expert.

    Attributes:
        weights: [batch, time] by micro-batch of all ranks.
        effective: effective sample size (sum w)^2 / sum w^2 of the tokens routed to the expert.
        further: number of tokens that were added to these.
    """

    weights: Sequence[Tensor]
    effective: float
    further: int


def expert_tokens(weights: Sequence[Tensor], valid: Sequence[Tensor], least: float) -> ExpertTokens:
    """Add tokens until there are ``least`` effective tokens, or half the number of tokens without a weight.

    Args:
        weights: [batch, time] by micro-batch, 0 for tokens that are not routed to the expert.
        valid: [batch, time] by micro-batch, false for padding.
    """
    flat = torch.cat([part[mask] for part, mask in zip(weights, valid, strict=True)]).double()
    total, squares = float(flat.sum()), float(flat.square().sum())
    effective = total**2 / squares if squares else 0.0
    others = (flat == 0).nonzero().flatten()
    further = min(math.ceil(2 * least), len(others))
    reached = further / 2
    if effective >= min(least, reached):
        return ExpertTokens(weights, effective, 0)
    weight = _least_weight(total, squares, further, reached) if squares else 1.0
    flat[others[torch.arange(further) * len(others) // further]] = weight
    filled = []
    for part, mask in zip(weights, valid, strict=True):
        own, flat = flat[: int(mask.sum())], flat[int(mask.sum()) :]
        filled.append(torch.zeros_like(part).masked_scatter_(mask, own.to(part.dtype)))
    return ExpertTokens(filled, effective, further)


def _least_weight(total: float, squares: float, further: int, effective: float) -> float:
    """The least weight a of further tokens with (total + a n)^2 / (squares + a^2 n) = effective.

    The left side grows up to a = squares / total, where it is n more than before; ``effective`` is at most n / 2.
    """
    leading = further * (further - effective)
    constant = total**2 - effective * squares
    return (math.sqrt((total * further) ** 2 - leading * constant) - total * further) / leading
