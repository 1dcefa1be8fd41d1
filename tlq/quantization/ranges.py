"""Ranges: how the scale and the zero-point of a quantization group are chosen.

The scale from the smallest to the largest weight (``minmax``) clips nothing. A smaller scale clips a few weights and
represents the others more finely. ``search`` tries shrunk scales, and the zero-points beside the one that they have,
and keeps the pair with the smallest error sum_i c_i (v_i - w_i)^2 of the group's weights w under nearest rounding to v.

The weight c_i of input channel i decides what the error means. With ones it is the error of the weights. With the
second moments C_ii = sum_t w_t u_ti^2 it is the error of the output for inputs that are not correlated. With the pivots
of C = U diag(p) U' it is the error that error feedback leaves (see ``tlq.quantization.rounding``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tlq.quantization.formats import Scheme, WeightQuantizer, nonzero, stored_scale

_LEAST_POINTS = 2

#: Weights searched at once, so that the search needs little memory in addition to them.
_ELEMENTS = 2**20


@dataclass(frozen=True)
class Ranges:
    """The choice of scale and zero-point of every quantization group.

    Attributes:
        method: `minmax`, or `search`.
        channels: weights of the input channels in the error of the search: `ones`, second `moments`, or `pivots`.
        points: number of scales that the search tries, from 1 down to ``least`` times the scale of `minmax`.
        least: smallest factor.
        zero_points: zero-points tried with each scale, an odd number; 1 is that of `minmax`.
        most_bits: weights of more bits keep the range of `minmax`.
    """

    method: Literal["minmax", "search"] = "minmax"
    channels: Literal["ones", "moments", "pivots"] = "moments"
    points: int = 12
    least: float = 0.45
    zero_points: int = 3
    most_bits: int = 8

    def __post_init__(self) -> None:
        if self.points < _LEAST_POINTS:
            raise ValueError(f"ranges.points is {self.points}, must be at least {_LEAST_POINTS} for a search")
        if not 0 < self.least < 1:
            raise ValueError(f"ranges.least is {self.least}, must be between 0 and 1: a share of the whole range")
        if self.zero_points < 1 or self.zero_points % 2 == 0:
            raise ValueError(f"ranges.zero_points is {self.zero_points}, must be odd: as many below as above")

    def searched(self, scheme: Scheme) -> bool:
        """Whether weights of a scheme get searched ranges."""
        return self.method == "search" and scheme.weight_bits <= self.most_bits

    def needs_data(self, scheme: Scheme | None = None) -> bool:
        """Whether the ranges depend on calibration data, for any linear of a scheme; without one, for some scheme."""
        if self.method == "minmax" or self.channels == "ones":
            return False
        return scheme is None or any(self.searched(each) for each in scheme.parts)

    def qparams(self, weight: Tensor, quantizer: WeightQuantizer, channels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and zero-point of every group of a weight.

        Args:
            weight: [out, in].
            channels: weights of the input channels [in]; None for ones.
        Returns:
            scale [out, groups] in the dtype of the checkpoint, and zero_point [out, groups] int8.
        """
        scale, zero_point = quantizer.qparams(weight)
        if not self.searched(quantizer.scheme):
            return scale, zero_point
        if channels is None:
            channels = torch.ones(weight.shape[1], device=weight.device)
        size = quantizer.scheme.group_size or weight.shape[1]
        parts = -(-weight.numel() // _ELEMENTS)  # of equal sizes: the sum of a single long row may depend on threads
        groups = weight.float().unflatten(1, (-1, size))
        found = [
            self._search(rows, channels.view(-1, size), (row_scales, row_zeros), quantizer)
            for rows, row_scales, row_zeros in zip(
                *(values.tensor_split(parts) for values in (groups, scale, zero_point)), strict=True
            )
        ]
        scales, zero_points = zip(*found, strict=True)
        return torch.cat(scales), torch.cat(zero_points)

    def _search(
        self, groups: Tensor, channels: Tensor, whole: tuple[Tensor, Tensor], quantizer: WeightQuantizer
    ) -> tuple[Tensor, Tensor]:
        """The best pair for each group [out, groups, size], the first of equals; the ``whole`` range is tried first."""
        scheme = quantizer.scheme
        low, high = scheme.code_range
        scale, zero_point = whole
        best = torch.full(scale.shape, torch.inf, device=scale.device)
        kept_scale, kept_zero = scale.clone(), zero_point.clone()
        step = (1 - self.least) / (self.points - 1)
        for point in range(self.points):
            shrunk = nonzero(stored_scale(scale.float() * (1 - point * step), scheme, quantizer.scale_dtype))
            values = groups / shrunk.float()[:, :, None]
            nearest = values.round()
            for offset in _zero_offsets(scheme, self.zero_points):
                zero = (zero_point.float() + offset).clamp_(low, high)
                codes = torch.clamp(nearest, min=(low - zero)[:, :, None], max=(high - zero)[:, :, None])
                error = codes.sub_(values).square_().mul_(channels).sum(2).mul_(shrunk.float().square())
                better = error < best
                best = torch.where(better, error, best)
                kept_scale = torch.where(better, shrunk, kept_scale)
                kept_zero = torch.where(better, zero.to(torch.int8), kept_zero)
        return kept_scale, kept_zero


#: The whole range of the weights.
MINMAX = Ranges()


def _zero_offsets(scheme: Scheme, count: int) -> list[int]:
    """0, then the offsets on both sides of it."""
    half = 0 if scheme.symmetric else count // 2
    return sorted(range(-half, half + 1), key=abs)
