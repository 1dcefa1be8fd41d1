"""Per-channel scales s of V = Q(W diag(s)) diag(1/s): candidates, and the fold of 1/s into the preceding module.

A candidate is s = |x|^a, or with `duo` also s = |x|^a / |w|^(1 - a), normalised by sqrt(max s * min s)
(AWQ, arXiv 2306.00978, section 3.2). Scales that fold into a norm are adjusted so that the folded gain is exact in the
dtype that the checkpoint stores, so that the search measures the saved weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from tlq.quantization.objective import Norm


@dataclass(frozen=True)
class Equalization:
    """The choice of the per-channel scales s of V = Q(W diag(s)) diag(1/s).

    Attributes:
        method: `none` (s = 1), `fixed` (one exponent) or `grid` (the exponent with the smallest error).
        alpha: the exponent of `fixed`.
        points: grid points in [0, 1).
        search: `exhaustive` finds the exponent with the smallest error; `halving` (successive halving) drops the worse
            half of the candidates each time the number of measured output channels has doubled.
        duo: also try exponents on the weight magnitude, s = |x|^a / |w|^(1 - a).
        error: key of ``tlq.quantization.errors.ERROR_MEASURES``: error of the output of the group's `linears`, or of
            the `parent` module.
        norm: `l2` (squared) or `l1` error.
        magnitude: activation magnitude as `mean` of |x| over the tokens, `weighted` by their importance, or `max`.
        folds: groups that may be scaled: only groups after `norms`, also groups after a linear of `matching` width
            (AWQ's code), or `all`. With `all`, under grouped-query attention, the input channels of the output
            projection that read the same value channel share one scale.
    """

    method: Literal["none", "fixed", "grid"] = "none"
    alpha: float = 0.5
    points: int = 20
    search: Literal["exhaustive", "halving"] = "exhaustive"
    duo: bool = False
    error: str = "linears"
    norm: Norm = "l2"
    magnitude: Literal["mean", "weighted", "max"] = "mean"
    folds: Literal["norms", "matching", "all"] = "all"

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"equalization.points is {self.points}, must be at least 2 for a grid")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"equalization.alpha is {self.alpha}, must be in [0, 1]")


@dataclass(frozen=True)
class Candidate:
    """Scales s [in] and their exponent; ``duo`` is true if they also depend on the weight magnitude."""

    s: Tensor
    alpha: float
    duo: bool = False


@dataclass(frozen=True)
class Fold:
    """The place that 1/s is folded into: the gain of a norm, or the output rows of a linear.

    Attributes:
        module: the norm or linear.
        repeats: input channels of the group per row of ``module`` (query heads per key/value head for the output
            projection under grouped-query attention, else 1).
        head_dim: channels of a head, which repeat together.
        checkpoint_dtype: dtype of the checkpoint.
        offset: the gain of a norm is ``offset + weight`` (1 for Gemma's norms, else 0).
        last: number of last rows of a linear that take the scales; None means all.
    """

    module: nn.Module
    repeats: int
    head_dim: int
    checkpoint_dtype: torch.dtype
    offset: float = 0.0
    last: int | None = None

    @classmethod
    def into(
        cls,
        module: nn.Module,
        in_features: int,
        head_dim: int,
        checkpoint_dtype: torch.dtype,
        offset: float = 0.0,
        parts: int = 0,
    ) -> Fold:
        """The fold into ``module``, or only into the last of ``parts`` equal parts of its rows after ``in_features``.

        Raises:
            ValueError: the module's output cannot be the input of ``in_features`` channels.
        """
        weight = cast(Tensor, module.weight)
        rows = (weight.shape[0] - in_features) // parts if parts else weight.shape[0]
        if weight.dim() == 1:  # a norm with one gain for all heads repeats as a whole
            head_dim = rows
        if in_features % rows:
            raise ValueError(f"cannot fold the scales of {in_features} channels into a module of {rows} outputs")
        return cls(module, in_features // rows, head_dim, checkpoint_dtype, offset, rows if parts else None)

    @property
    def weight(self) -> Tensor:
        """The rows that take the scales, or the norm's weight."""
        weight = cast(Tensor, self.module.weight)
        return weight if self.last is None else weight[-self.last :]

    @property
    def is_norm(self) -> bool:
        return self.weight.dim() == 1

    def reduce(self, per_channel: Tensor, how: str = "mean") -> Tensor:
        """[in] -> [rows of the module]: mean (or maximum) over the channels that share a row."""
        if self.repeats == 1:
            return per_channel
        heads = per_channel.view(-1, self.repeats, self.head_dim)
        return (heads.amax(1) if how == "max" else heads.mean(1)).flatten()

    def expand(self, per_row: Tensor) -> Tensor:
        """[rows of the module] -> [in]: repeat each row's value for the channels that share the row."""
        if self.repeats == 1:
            return per_row
        return per_row.view(-1, 1, self.head_dim).expand(-1, self.repeats, -1).flatten()

    def realizable(self, per_row: Tensor) -> Tensor:
        """The scales nearest to ``per_row`` for which the folded gain is exact in the dtype of the checkpoint."""
        if not self.is_norm:
            return per_row
        gain = self.offset + self.weight.float()
        folded = self.offset + self.folded_weight(per_row).float()
        return torch.where((gain == 0) | (folded == 0), torch.ones_like(gain), gain / folded)

    def folded_weight(self, per_row: Tensor) -> Tensor:
        """The norm's weight with 1/s in its gain, in the dtype of the checkpoint."""
        return ((self.offset + self.weight.float()) / per_row - self.offset).to(self.checkpoint_dtype)

    def allows(self, folds: str) -> bool:
        """Whether a group with this fold is scaled under ``Equalization.folds`` = ``folds``."""
        return folds == "all" or self.is_norm or (folds == "matching" and self.repeats == 1)

    def per_row(self, s: Tensor) -> Tensor:
        """Scales s [in] of a candidate, one per row of the module."""
        if self.repeats == 1:
            return s
        return s.view(-1, self.repeats, self.head_dim)[:, 0].flatten()

    def every_row(self, per_row: Tensor) -> Tensor:
        """Scales for all rows of the linear; rows before the last ones get 1."""
        if self.last is None:
            return per_row
        others = cast(Tensor, self.module.weight).shape[0] - self.last
        return torch.cat([torch.ones(others, device=per_row.device, dtype=per_row.dtype), per_row])


def candidates(
    method: Equalization, magnitude: Tensor, weight: Tensor, group_size: int | None, fold: Fold
) -> Iterator[Candidate]:
    """Yield the candidate scales, the neutral ones (s = 1) first.

    Args:
        magnitude: activation magnitude per input channel [in].
        weight: the group's weights stacked [out, in].
    """
    in_features = weight.shape[1]
    yield Candidate(torch.ones(in_features, device=weight.device), 0.0)
    if method.method == "none" or not fold.allows(method.folds):
        return
    activation = fold.reduce(magnitude, method.magnitude).clamp(min=1e-4)
    channel_weight = fold.reduce(weight_magnitude(weight, group_size, method.magnitude), method.magnitude)
    channel_weight = channel_weight.clamp(min=1e-4)
    if method.method == "fixed":
        yield _candidate(activation, channel_weight if method.duo else None, method.alpha, fold)
        return
    for point in range(method.points):
        alpha = point / method.points
        if point:
            yield _candidate(activation, None, alpha, fold)
        if method.duo:
            yield _candidate(activation, channel_weight, alpha, fold)


def _candidate(activation: Tensor, channel_weight: Tensor | None, alpha: float, fold: Fold) -> Candidate:
    s = activation**alpha
    if channel_weight is not None:
        s = s / channel_weight ** (1 - alpha)
    s = s / (s.max() * s.min()).sqrt()
    return Candidate(fold.expand(fold.realizable(s)), alpha, channel_weight is not None)


def weight_magnitude(weight: Tensor, group_size: int | None, how: str) -> Tensor:
    """Magnitude of every input channel [in]: mean of |w| relative to its group's maximum, or max of |w|."""
    if how == "max":
        return weight.abs().amax(0)
    groups = weight.abs().unflatten(1, (-1, group_size or weight.shape[1]))
    relative = groups / groups.amax(2, keepdim=True).clamp(min=1e-6)
    return relative.flatten(1).mean(0)
