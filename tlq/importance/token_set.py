"""The token-level calibration set: which tokens' error counts, per layer and linear group.

Whole sequences still run through a layer, since attention needs them; only the chosen tokens enter the objective.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

Selection = Literal["top", "sample"]

#: Shares are floating-point numbers: what misses a bound by no more than this part of it keeps to it.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class TokenBudget:
    """How a token-level calibration set is chosen.

    The cap always holds; a floor that a pool cannot reach under the cap is refused, neither gives way to the other.

    Attributes:
        tokens_per_layer: tokens chosen for each linear group of each layer.
        selection: `top` keeps the most important tokens with their importance as weight; `sample` draws in proportion
            to importance and weighs every draw 1, an unbiased estimate of the importance-weighted sum.
        modality_floor: least share of the set for image tokens, and for text tokens.
        sample_cap: largest share of the set that any one sample supplies, rounded up to whole tokens by `top`, kept
            within two draws by `sample`; 1 caps nothing.
    """

    tokens_per_layer: int
    selection: Selection = "sample"
    modality_floor: float = 0.1
    sample_cap: float = 1.0

    def __post_init__(self) -> None:
        if self.tokens_per_layer < 1:
            raise ValueError(f"calibset.tokens_per_layer is {self.tokens_per_layer}, must be at least 1")
        if self.selection not in ("top", "sample"):
            raise ValueError(f"calibset.selection is {self.selection!r}; choose top or sample")
        if not 0 <= self.modality_floor <= 0.5:
            raise ValueError(f"calibset.modality_floor is {self.modality_floor}, must be in [0, 0.5]")
        if not 0 < self.sample_cap <= 1:
            raise ValueError(f"calibset.sample_cap is {self.sample_cap}, must be in (0, 1]; 1 caps nothing")


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
        sample_of: number of the sample that it belongs to, [tokens].
    Returns:
        indices into the pool in increasing order, and their weights with mean 1.
    Raises:
        ValueError: under the cap, the pool's samples cannot fill the set or a modality's floor.
    """
    _check_cap(weights, is_image, sample_of, budget)
    if budget.selection == "top":
        chosen = _top(weights, is_image, sample_of, budget)
        chosen_weights = weights[chosen].astype(np.float64)
    else:
        probability = _probability(weights, is_image, sample_of, budget)
        counts = np.empty(len(weights), np.int64)
        by_modality = np.lexsort((sample_of, is_image))  # so that each is drawn as often as it should
        counts[by_modality] = _systematic_draw(probability[by_modality], budget, generator)
        chosen = np.flatnonzero(counts)
        chosen_weights = counts[chosen].astype(np.float64)
    chosen_weights *= len(chosen) / chosen_weights.sum()
    return chosen, chosen_weights.astype(np.float32)


def effective_sample_size(weights: NDArray[np.float32]) -> float:
    """(sum w)^2 / sum w^2: the number of equally weighted tokens that would average as well."""
    weights = weights.astype(np.float64)
    return float(weights.sum() ** 2 / (weights**2).sum())


def _check_cap(
    weights: NDArray[np.float32], is_image: NDArray[np.bool_], sample_of: NDArray[np.int64], budget: TokenBudget
) -> None:
    """Refuse a cap under which the samples cannot supply the whole set, or a modality's floor.

    These three are all that can stand in the way: floors are at most half the set each, so that by Hall's theorem
    shares exist for every sample and modality as soon as the set and either floor can be supplied on their own.
    """
    needs = [("", np.ones(len(weights), np.bool_), 1.0)]
    if is_image.any() and not is_image.all():
        needs += [("image ", is_image, budget.modality_floor), ("text ", ~is_image, budget.modality_floor)]
    for kind, mask, share in needs:
        heavy = mask & (weights > 0)
        samples = np.count_nonzero(np.bincount(sample_of[heavy if heavy.any() else mask]))
        if budget.sample_cap * samples < share * (1 - _ROUNDING):
            lower = " or lower calibset.modality_floor" if kind else ""
            raise ValueError(
                f"calibset.sample_cap is {budget.sample_cap}: the {samples} samples with {kind}tokens that count may "
                f"supply {budget.sample_cap * samples:.4g} of the set, {share:.4g} is needed; raise the cap to "
                f"{math.ceil(1e4 * share / samples) / 1e4} or more, take more samples (importance.samples){lower}"
            )


def _top(
    weights: NDArray[np.float32], is_image: NDArray[np.bool_], sample_of: NDArray[np.int64], budget: TokenBudget
) -> NDArray[np.int64]:
    """The heaviest tokens under the cap, each modality having at least its floor (or all that it may have).

    A modality below its floor keeps its chosen tokens and gains the heaviest of its others; for each, the lightest
    token of the other modality goes, of the same sample where that one is full.
    """
    size = _size_under_cap(np.bincount(sample_of), min(budget.tokens_per_layer, len(weights)), budget.sample_cap)
    limit, floor = _per_sample(budget.sample_cap, size), int(budget.modality_floor * size)
    order = np.argsort(-weights, kind="stable")
    chosen = _first_of_each(order, sample_of, limit)[:size]
    for modality in (is_image, ~is_image):
        if modality[chosen].sum() < floor:
            kept = chosen[modality[chosen]]
            more = order[modality[order] & ~np.isin(order, kept)]
            own = _first_of_each(np.concatenate([kept, more]), sample_of, limit)[:floor]
            chosen = _first_of_each(np.concatenate([own, chosen[~modality[chosen]]]), sample_of, limit)[:size]
    return np.sort(chosen)


def _per_sample(cap: float, size: int) -> int:
    """How many tokens of a set of ``size`` one sample may supply."""
    return math.ceil(cap * size - _ROUNDING)


def _size_under_cap(lengths: NDArray[np.int64], size: int, cap: float) -> int:
    """The largest set, up to ``size``, that samples of these lengths fill with none of them above its share."""
    while (filled := int(np.minimum(lengths, _per_sample(cap, size)).sum())) < size:
        size = filled
    return size


def _first_of_each(order: NDArray[np.int64], sample_of: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """``order`` without the tokens that come after ``limit`` others of their sample."""
    by_sample = np.argsort(sample_of[order], kind="stable")
    counts = np.bincount(sample_of[order])
    rank = np.empty(len(order), np.int64)
    rank[by_sample] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[rank < limit]


def _probability(
    weights: NDArray[np.float32], is_image: NDArray[np.bool_], sample_of: NDArray[np.int64], budget: TokenBudget
) -> NDArray[np.float64]:
    """Probabilities in proportion to weight, a modality below its floor lifted to it, no sample above the cap.

    Of all probabilities within these bounds they are the nearest to the weights in relative entropy: one factor for
    the lifted modality, one for every capped sample.
    """
    share = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    probability = _capped(share, sample_of, budget.sample_cap)
    for mask in (is_image, ~is_image):
        if mask.any() and not mask.all() and probability[mask].sum() < budget.modality_floor:
            if not share[mask].any():  # it weighs nothing: drawn from evenly
                share[mask] = 1 / mask.sum()
            share[mask] *= _lift(share, mask, sample_of, budget)
            return _capped(share, sample_of, budget.sample_cap)
    return probability


def _lift(
    share: NDArray[np.float64], mask: NDArray[np.bool_], sample_of: NDArray[np.int64], budget: TokenBudget
) -> float:
    """The factor on the weights under ``mask`` at which, capped, they have the floor: their share grows with it."""
    own, other = _totals(share * mask, sample_of), _totals(share * ~mask, sample_of)

    def missing(log_factor: float) -> float:
        lifted = math.exp(log_factor) * own
        totals = lifted + other
        supplied = lifted * _ratio(_water_fill(totals, budget.sample_cap), totals)
        # At the very floor that the cap allows, the factor would be infinite.
        return budget.modality_floor * (1 - 10 * _ROUNDING) - float(supplied.sum())

    return math.exp(brentq(missing, -300, 300))


def _capped(share: NDArray[np.float64], sample_of: NDArray[np.int64], cap: float) -> NDArray[np.float64]:
    """``share`` [tokens] scaled sample by sample to a sum of 1 with no sample above ``cap``."""
    totals = _totals(share, sample_of)
    return share * _ratio(_water_fill(totals, cap), totals)[sample_of]


def _totals(share: NDArray[np.float64], sample_of: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sum by sample, [samples]."""
    return np.asarray(np.bincount(sample_of, share), np.float64)


def _water_fill(totals: NDArray[np.float64], cap: float) -> NDArray[np.float64]:
    """Shares of 1 in proportion to ``totals`` with none above ``cap``: what is cut off one goes to those below."""
    share = totals / totals.sum()
    full = np.zeros(len(totals), np.bool_)
    while (share > cap * (1 + _ROUNDING)).any():
        full |= share >= cap
        open_total = totals[~full].sum()
        share = np.where(full, cap, totals * ((1 - cap * full.sum()) / open_total if open_total > 0 else 0))
    return share


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quotient, 0 where the denominator is."""
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


def split_by_sample(chosen: NDArray[np.int64], lengths: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pool indices as (sample, position) pairs, for samples of the given lengths in pool order."""
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    sample = np.searchsorted(starts, chosen, side="right") - 1
    return sample, chosen - starts[sample]
