"""The token-level calibration set: which tokens' error counts, per layer and linear group.

Whole sequences still run through a layer, since attention needs them; only the chosen tokens enter the objective.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Selection = Literal["top", "sample"]

#: Relative tolerance of bounds on shares, which are floating-point numbers.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class TokenBudget:
    """How a token-level calibration set is chosen.

    The cap always holds. A floor that a pool cannot reach under the cap is refused: neither overrides the other.

    Attributes:
        tokens_per_layer: tokens chosen for each linear group of each layer.
        per_width: multiple of a group's input width that is chosen in place of `tokens_per_layer`; None chooses
            `tokens_per_layer` for every group.
        selection: `top` keeps the most important tokens with their importance as weight; `sample` draws in proportion
            to importance and weighs every draw 1, an unbiased estimate of the importance-weighted sum.
        modality_floor: least share of the set for image tokens, and for text tokens.
        sample_cap: largest share of the set that one sample supplies; `top` rounds it up to whole tokens, `sample`
            keeps it to within two draws. 1 caps nothing.
    """

    tokens_per_layer: int
    selection: Selection = "sample"
    modality_floor: float = 0.1
    sample_cap: float = 1.0
    per_width: float | None = None

    def __post_init__(self) -> None:
        if self.tokens_per_layer < 1:
            raise ValueError(f"TokenBudget.tokens_per_layer is {self.tokens_per_layer}, must be at least 1")
        if self.selection not in ("top", "sample"):
            raise ValueError(f"TokenBudget.selection is {self.selection!r}; choose top or sample")
        if not 0 <= self.modality_floor <= 0.5:
            raise ValueError(f"TokenBudget.modality_floor is {self.modality_floor}, must be in [0, 0.5]")
        if not 0 < self.sample_cap <= 1:
            raise ValueError(f"TokenBudget.sample_cap is {self.sample_cap}, must be in (0, 1]; 1 caps nothing")
        if self.per_width is not None and self.per_width <= 0:
            raise ValueError(
                f"TokenBudget.per_width is {self.per_width}, must be positive; null chooses tokens_per_layer tokens"
            )

    def of(self, width: int) -> TokenBudget:
        """The budget of a group of ``width`` input channels, in tokens."""
        if self.per_width is None:
            return self
        return replace(self, tokens_per_layer=max(1, round(self.per_width * width)), per_width=None)

    def within(self, is_image: NDArray[np.bool_], sample_of: NDArray[np.int64]) -> TokenBudget:
        """The budget with a cap and a floor that these tokens can keep: they may come from few samples."""
        cap = max(self.sample_cap, 1 / len(np.unique(sample_of)))
        supplied = [cap * len(np.unique(sample_of[mask])) for mask in (is_image, ~is_image)]
        return replace(self, sample_cap=cap, modality_floor=min(self.modality_floor, *supplied))


def select_tokens(
    weights: NDArray[np.float32],
    is_image: NDArray[np.bool_],
    sample_of: NDArray[np.int64],
    budget: TokenBudget,
    generator: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Choose tokens of one layer and group.

    Args:
        weights: importance weight of every token in the pool, [tokens].
        is_image: whether it is an image token, [tokens].
        sample_of: index of the sample that it belongs to, [tokens].

    Returns:
        indices into the pool in increasing order, and their weights with mean 1.

    Raises:
        ValueError: under the cap, the pool's samples cannot fill the set or a modality's floor.
    """
    _check_cap(weights, is_image, sample_of, budget)
    if budget.selection == "top":
        indices = _top(weights, is_image, sample_of, budget)
        set_weights = weights[indices].astype(np.float64)
    else:
        probability = _probability(weights, is_image, sample_of, budget)
        counts = np.empty(len(weights), np.int64)
        # In this order systematic draws hold the share of every modality and sample to within a draw.
        by_modality = np.lexsort((sample_of, is_image))
        counts[by_modality] = _systematic_draw(probability[by_modality], budget, generator)
        indices = np.flatnonzero(counts)
        set_weights = counts[indices].astype(np.float64)
    set_weights *= len(indices) / set_weights.sum()
    return indices, set_weights.astype(np.float32)


def effective_sample_size(weights: NDArray[np.float32]) -> float:
    """(sum w)^2 / sum w^2: the number of equally weighted tokens whose average has the same variance."""
    weights = weights.astype(np.float64)
    return float(weights.sum() ** 2 / (weights**2).sum())


def _check_cap(
    weights: NDArray[np.float32], is_image: NDArray[np.bool_], sample_of: NDArray[np.int64], budget: TokenBudget
) -> None:
    """Refuse a cap under which the samples cannot supply the whole set, or a modality's floor.

    These three checks suffice: each floor is at most half the set, so by Hall's theorem shares exist for every sample
    and modality as soon as the samples can supply the set, the image floor and the text floor separately.
    """
    needs = [("", np.ones(len(weights), np.bool_), 1.0)]
    if is_image.any() and not is_image.all():
        needs += [("image ", is_image, budget.modality_floor), ("text ", ~is_image, budget.modality_floor)]
    for kind, mask, share in needs:
        heavy = mask & (weights > 0)
        samples = np.count_nonzero(np.bincount(sample_of[heavy if heavy.any() else mask]))
        if budget.sample_cap * samples < share * (1 - _ROUNDING):
            lower = " or lower TokenBudget.modality_floor" if kind else ""
            raise ValueError(
                f"TokenBudget.sample_cap is {budget.sample_cap}: the {samples} samples with {kind}tokens that count "
                f"may supply {budget.sample_cap * samples:.4g} of the set, {share:.4g} is needed; raise the cap to "
                f"{math.ceil(1e4 * share / samples) / 1e4} or more, score more samples{lower}"
            )


def _top(
    weights: NDArray[np.float32], is_image: NDArray[np.bool_], sample_of: NDArray[np.int64], budget: TokenBudget
) -> NDArray[np.int64]:
    """The heaviest tokens under the cap, with the floor of each modality (or all tokens that the cap leaves it).

    A modality below its floor keeps its chosen tokens and gains the heaviest of its others. Each of them replaces the
    lightest chosen token of the other modality, of the same sample if that sample is at its cap.
    """
    size = _size_under_cap(np.bincount(sample_of), min(budget.tokens_per_layer, len(weights)), budget.sample_cap)
    limit, floor = _per_sample(budget.sample_cap, size), int(budget.modality_floor * size)
    order = np.argsort(-weights, kind="stable")
    chosen = _first_of_each(order, sample_of, limit)[:size]
    for modality in (is_image, ~is_image):
        if modality[chosen].sum() < floor:
            kept = chosen[modality[chosen]]
            more = order[modality[order] & ~np.isin(order, kept)]
            lifted = _first_of_each(np.concatenate([kept, more]), sample_of, limit)[:floor]
            chosen = _first_of_each(np.concatenate([lifted, chosen[~modality[chosen]]]), sample_of, limit)[:size]
    return np.sort(chosen)


def _per_sample(cap: float, size: int) -> int:
    """How many tokens of a set of ``size`` one sample may supply."""
    return math.ceil(cap * size - _ROUNDING)


def _size_under_cap(lengths: NDArray[np.int64], size: int, cap: float) -> int:
    """Size of the largest set, at most ``size``, that samples of these lengths fill under the cap."""
    while (filled := int(np.minimum(lengths, _per_sample(cap, size)).sum())) < size:
        size = filled
    return size


def _first_of_each(order: NDArray[np.int64], sample_of: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """The first ``limit`` tokens of every sample in ``order``, in that order."""
    by_sample = np.argsort(sample_of[order], kind="stable")
    counts = np.bincount(sample_of[order])
    rank = np.empty(len(order), np.int64)
    rank[by_sample] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[rank < limit]


def _probability(
    weights: NDArray[np.float32], is_image: NDArray[np.bool_], sample_of: NDArray[np.int64], budget: TokenBudget
) -> NDArray[np.float64]:
    """Drawing probabilities, [tokens]: proportional to weight, then bounded by modality floor and sample cap.

    Of all probabilities within these bounds they are the nearest to the weights in relative entropy: the lifted
    modality has one common factor, and so has every capped sample.
    """
    share = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    probability = _capped(share, sample_of, budget.sample_cap)
    for mask in (is_image, ~is_image):
        if mask.any() and not mask.all() and probability[mask].sum() < budget.modality_floor:
            if not share[mask].any():  # no weight at all: draw evenly from this modality
                share[mask] = 1 / mask.sum()
            share[mask] *= _lift(share, mask, sample_of, budget)
            return _capped(share, sample_of, budget.sample_cap)
    return probability


def _lift(
    share: NDArray[np.float64], mask: NDArray[np.bool_], sample_of: NDArray[np.int64], budget: TokenBudget
) -> float:
    """Solve for the factor on the weights under ``mask`` that gives them the floor once samples are capped.

    Their share grows with the factor, so the solution is unique.
    """
    inside, outside = _totals(share * mask, sample_of), _totals(share * ~mask, sample_of)

    def missing(log_factor: float) -> float:
        lifted = math.exp(log_factor) * inside
        totals = lifted + outside
        supplied = lifted * _ratio(_water_fill(totals, budget.sample_cap), totals)
        # Stay below the floor by rounding: at the largest floor that the cap allows, the factor is infinite.
        return budget.modality_floor * (1 - 10 * _ROUNDING) - float(supplied.sum())

    from scipy.optimize import brentq  # a second, which every other stage saves

    return math.exp(brentq(missing, -300, 300))


def _capped(share: NDArray[np.float64], sample_of: NDArray[np.int64], cap: float) -> NDArray[np.float64]:
    """``share`` [tokens] scaled sample by sample to a sum of 1 with no sample above ``cap``."""
    totals = _totals(share, sample_of)
    return share * _ratio(_water_fill(totals, cap), totals)[sample_of]


def _totals(share: NDArray[np.float64], sample_of: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum by sample, [samples]."""
    return np.asarray(np.bincount(sample_of, share), np.float64)


def _water_fill(totals: NDArray[np.float64], cap: float) -> NDArray[np.float64]:
    """Shares that sum to 1, proportional to ``totals`` and at most ``cap``; the samples below it share the excess."""
    share = totals / totals.sum()
    full = np.zeros(len(totals), np.bool_)
    while (share > cap * (1 + _ROUNDING)).any():
        full |= share >= cap
        open_total = totals[~full].sum()
        share = np.where(full, cap, totals * ((1 - cap * full.sum()) / open_total if open_total > 0 else 0))
    return share


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quotient, and 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator), where=denominator > 0)


def _systematic_draw(
    probability: NDArray[np.float64], budget: TokenBudget, generator: np.random.Generator
) -> NDArray[np.int64]:
    """How often each token is drawn in ``tokens_per_layer`` draws: floor or ceiling of its expectation.

    Systematic resampling: one uniform offset, evenly spaced pointers into the cumulative probability.
    """
    draws = budget.tokens_per_layer
    pointers = (np.arange(draws) + generator.random()) / draws
    edges = np.cumsum(probability)
    edges /= edges[-1]
    return np.bincount(np.searchsorted(edges, pointers, side="right"), minlength=len(probability))
