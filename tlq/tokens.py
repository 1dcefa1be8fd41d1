"""The token-level calibration set: which tokens' error counts, per layer and linear group.

Whole sequences still run through a layer, since attention needs them; only the chosen tokens enter the objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Selection = Literal["top", "sample"]


@dataclass(frozen=True)
class TokenBudget:
    """How a token-level calibration set is chosen.

    Attributes:
        tokens_per_layer: tokens chosen for each linear group of each layer.
        selection: `top` keeps the most important tokens with their importance as weight; `sample` draws in proportion
            to importance and weighs every draw 1, an unbiased estimate of the importance-weighted sum.
        modality_floor: least share of the set for image tokens, and for text tokens.
    """

    tokens_per_layer: int
    selection: Selection = "sample"
    modality_floor: float = 0.1

    def __post_init__(self) -> None:
        if self.tokens_per_layer < 1:
            raise ValueError(f"calibset.tokens_per_layer is {self.tokens_per_layer}, must be at least 1")
        if self.selection not in ("top", "sample"):
            raise ValueError(f"calibset.selection is {self.selection!r}; choose top or sample")
        if not 0 <= self.modality_floor <= 0.5:
            raise ValueError(f"calibset.modality_floor is {self.modality_floor}, must be in [0, 0.5]")


def select_tokens(
    weights: NDArray[np.float32],
    is_image: NDArray[np.bool_],
    budget: TokenBudget,
    generator: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Choose tokens of one layer and group.

    Args:
        weights: importance weight of every token in the pool, [tokens].
        is_image: whether it is an image token, [tokens].
    Returns:
        indices into the pool in increasing order, and their weights with mean 1.
    """
    if budget.selection == "top":
        chosen = _top(weights, is_image, budget)
        chosen_weights = weights[chosen].astype(np.float64)
    else:
        probability = _with_floor(weights, is_image, budget.modality_floor)
        counts = np.empty(len(weights), np.int64)
        by_modality = np.argsort(is_image, kind="stable")  # so that each modality is drawn as often as it should
        counts[by_modality] = _systematic_draw(probability[by_modality], budget, generator)
        chosen = np.flatnonzero(counts)
        chosen_weights = counts[chosen].astype(np.float64)
    chosen_weights *= len(chosen) / chosen_weights.sum()
    return chosen, chosen_weights.astype(np.float32)


def effective_sample_size(weights: NDArray[np.float32]) -> float:
    """(sum w)^2 / sum w^2: the number of equally weighted tokens that would average as well."""
    weights = weights.astype(np.float64)
    return float(weights.sum() ** 2 / (weights**2).sum())


def _top(weights: NDArray[np.float32], is_image: NDArray[np.bool_], budget: TokenBudget) -> NDArray[np.int64]:
    """The heaviest tokens, each modality having at least its floor (or all that it has)."""
    size = min(budget.tokens_per_layer, len(weights))
    order = np.argsort(-weights, kind="stable")
    floor = int(budget.modality_floor * size)
    reserved = np.concatenate([order[is_image[order]][:floor], order[~is_image[order]][:floor]])
    rest = order[~np.isin(order, reserved)][: size - len(reserved)]
    return np.sort(np.concatenate([reserved, rest]))


def _with_floor(weights: NDArray[np.float32], is_image: NDArray[np.bool_], floor: float) -> NDArray[np.float64]:
    """Probabilities in proportion to weight, a modality below its floor lifted to it."""
    probability = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    for mask in (is_image, ~is_image):
        share = probability[mask].sum()
        if mask.any() and not mask.all() and share < floor:
            lifted = probability[mask] / share if share > 0 else np.full(mask.sum(), 1 / mask.sum())
            probability[mask] = floor * lifted
            probability[~mask] *= (1 - floor) / (1 - share)
    return probability


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
