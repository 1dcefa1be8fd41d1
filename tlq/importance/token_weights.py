"""Token weights of a calibration: from importance scores to one weight per token, layer and linear group.

Either every token of the pool counts with its weight, or only the tokens of the token-level calibration set do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlq.importance.pool import (
    GroupKey,
    Importance,
    PoolWeights,
    TokenPool,
    WeightedTokens,
    cu_seqlens_of,
    pool_indices,
)
from tlq.importance.token_set import TokenBudget, select_tokens
from tlq.importance.weighting import (
    Source,
    Weighting,
    even_out,
    importance_weights,
    modality_ratio,
    modality_weights,
    own_weights,
)
from tlq.models.linear_groups import BLOCK_OUTPUT, EXPERTS, is_expert
from tlq.samples import Batch

#: (layer, group name) -> weight of every token, one [batch, time] tensor per micro-batch; 0 leaves a token out.
#: Experts have either weights of their own, or the weights of ``EXPERTS``, of which each takes its tokens' share.
TokenWeights = Mapping[GroupKey, Sequence[Tensor]]


def weight_keys(keys: Iterable[GroupKey], own_weights: bool) -> list[GroupKey]:
    """The keys of token weights among those of raw importance, sorted.

    Args:
        own_weights: whether every expert weighs tokens by its own importance, or all of a layer share their weights.
    """
    every = sorted(set(keys))
    shared = {(key[0], EXPERTS) for key in every if is_expert(key[1])}
    if own_weights:
        return [key for key in every if key not in shared]
    return sorted({key for key in every if not is_expert(key[1])} | shared)


def all_tokens(scores: Importance, pool: TokenPool, source: Source, weighting: Weighting) -> PoolWeights:
    """Every token of the pool, weighted by ``source``.

    Args:
        scores: raw importance of every layer and group: gradients of the answer's loss, or of the block's for source
            `block`.
    """
    every = np.arange(len(pool))
    least = weighting.least_effective_of(source)
    groups: dict[GroupKey, WeightedTokens] = {}
    for key, weights in _weights_of_groups(scores, pool, source, weighting):
        indices, own, enough = (every, weights, least) if not is_expert(key[1]) else _of_expert(weights, least)
        groups[key] = WeightedTokens(indices, even_out(own, enough).astype(np.float32))
    return PoolWeights(pool.cu_seqlens, groups)


def uniform_tokens(keys: Iterable[GroupKey], pool: TokenPool) -> PoolWeights:
    """Every token of the pool with weight 1, for the layers and groups ``keys``; needs no scores."""
    tokens = WeightedTokens(np.arange(len(pool)), np.ones(len(pool), np.float32))
    return PoolWeights(pool.cu_seqlens, dict.fromkeys(weight_keys(keys, own_weights=False), tokens))


def squared_scores(scores: Importance, pool: TokenPool) -> PoolWeights:
    """g_t^2 of every token, layer and group, all in units of the largest one.

    An error d on the output of token t changes the loss by the product of d and the gradient. For an error of no
    preferred direction the expected square is g_t^2 ||d||^2, but for a constant factor, at any width.
    """
    largest = max(float(raw.max()) for raw in scores.values()) or 1.0
    groups = {}
    for key, raw in sorted(scores.items()):
        squares = np.square(raw.astype(np.float64) / largest).astype(np.float32)
        indices = np.flatnonzero(squares)
        groups[key] = WeightedTokens(indices, squares[indices])
    return PoolWeights(pool.cu_seqlens, groups)


def token_set(
    scores: Importance,
    pool: TokenPool,
    source: Source,
    weighting: Weighting,
    budget: TokenBudget,
    seed: int,
    widths: Mapping[GroupKey, int] | None = None,
) -> PoolWeights:
    """The token-level calibration set of every layer and group, drawn from the whole pool.

    ``weighting.least_effective`` refers to the set. For draws, the weights of the pool are evened out until draws from
    them reach it in expectation; for `top`, the weights of the chosen tokens are evened out as well.

    Args:
        widths: input channels of every layer and group (``tlq.models.architectures.input_widths``), which a budget by
            width needs.

    Raises:
        ValueError: a budget by width without widths; or see ``select_tokens``.
    """
    least = weighting.least_effective_of(source)
    sample_of = pool.sample_of
    groups: dict[GroupKey, WeightedTokens] = {}
    for draw, (key, weights) in enumerate(_weights_of_groups(scores, pool, source, weighting)):
        generator = np.random.default_rng([seed, draw])
        own_budget = budget_of(key, budget, widths)
        least_in_pool = _least_effective_in_pool(least, own_budget)
        if is_expert(key[1]):
            groups[key] = _expert_set(weights, least_in_pool, pool, own_budget, generator)
            continue
        pool_weights = even_out(weights, least_in_pool).astype(np.float32)
        indices, set_weights = select_tokens(pool_weights, pool.is_image, sample_of, own_budget, generator)
        if budget.selection == "top":
            evened = even_out(set_weights.astype(np.float64), min(least, len(set_weights)))
            set_weights = evened.astype(np.float32)
        counted = set_weights > 0
        groups[key] = WeightedTokens(indices[counted], set_weights[counted])
    return PoolWeights(pool.cu_seqlens, groups)


def budget_of(key: GroupKey, budget: TokenBudget, widths: Mapping[GroupKey, int] | None) -> TokenBudget:
    """The budget of a layer and group; experts of a layer that share their tokens need those of the widest."""
    if budget.per_width is None:
        return budget
    layer, group = key
    known = widths or {}
    width = known.get(key, 0)
    if group == EXPERTS:
        width = max((known[each] for each in known if each[0] == layer and is_expert(each[1])), default=0)
    if not width:
        raise ValueError(
            f"TokenBudget.per_width is {budget.per_width}, but the input width of layer {layer}, group {group} is not "
            "known; score the tokens again, which records it"
        )
    return budget.of(width)


def _expert_weights(raw: NDArray[np.float32], pool: TokenPool, weighting: Weighting) -> NDArray[np.float64]:
    """Weights of an expert's group: of the tokens routed to it, which alone have a gradient; 0 for the others."""
    routed = np.flatnonzero(raw > 0)
    weights = np.zeros(len(pool))
    if len(routed):
        weights[routed] = own_weights(raw[routed], pool.is_image[routed], weighting)
    return weights


def _of_expert(weights: NDArray[np.float64], least: int) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
    """The tokens of a pool that are routed to an expert, their weights with mean 1, and ``least`` or their number."""
    indices = np.flatnonzero(weights)
    own = weights[indices]
    return indices, own / own.mean() if len(own) else own, min(least, len(own))


def _expert_set(
    weights: NDArray[np.float64], least: int, pool: TokenPool, budget: TokenBudget, generator: np.random.Generator
) -> WeightedTokens:
    """The token set of an expert, from the tokens routed to it; cap and floor give way where these are too few."""
    indices, own, least = _of_expert(weights, least)
    if not len(indices):
        return WeightedTokens(indices, own.astype(np.float32))
    is_image, sample_of = pool.is_image[indices], pool.sample_of[indices]
    evened = even_out(own, least).astype(np.float32)
    chosen, set_weights = select_tokens(evened, is_image, sample_of, budget.within(is_image, sample_of), generator)
    counted = set_weights > 0
    return WeightedTokens(indices[chosen[counted]], set_weights[counted])


def _weights_of_groups(
    scores: Importance, pool: TokenPool, source: Source, weighting: Weighting
) -> Iterator[tuple[GroupKey, NDArray[np.float64]]]:
    """Weights [tokens] of every (layer, group), sorted by key, before they are evened out.

    `modality` weighs a group by the importance at the output of its attention or MLP, as MBQ does.
    """
    least_ratio = _median_ratios(scores, pool, weighting) if source == "modality" else {}
    for layer, group in weight_keys(scores, own_weights=source in ("token", "block")):
        if source == "modality":
            block = BLOCK_OUTPUT[group]
            weights = modality_weights(scores[layer, block], pool, weighting.text, least_ratio[block])
        else:
            raw, own = scores[layer, group], is_expert(group)
            weights = _expert_weights(raw, pool, weighting) if own else importance_weights(raw, pool, source, weighting)
        yield (layer, group), weights


def _median_ratios(scores: Importance, pool: TokenPool, weighting: Weighting) -> dict[str, float]:
    """For attention and MLP, by the group at its output: the median over layers of the ratio of modalities."""
    ratios: dict[str, list[float]] = {block: [] for block in BLOCK_OUTPUT.values()}
    for (_, group), raw in scores.items():
        if group in ratios:
            ratios[group].append(modality_ratio(raw, pool, weighting.text))
    return {block: float(np.median(values)) for block, values in ratios.items() if values}


def _least_effective_in_pool(least_effective: int, budget: TokenBudget) -> int:
    """Effective tokens of a pool whose token sets have ``least_effective``.

    n systematic draws from E effective tokens have n E / (n + E) or more, in expectation: a token with e expected
    draws is drawn c times with E[c^2] <= e^2 + e, and the sums of e and e^2 are n and n^2 / E.

    Raises:
        ValueError: the budget is too small.
    """
    size = budget.tokens_per_layer
    if budget.selection == "top" and least_effective <= size:
        return least_effective
    if least_effective >= size:
        raise ValueError(
            f"Weighting.least_effective is {least_effective}, a set of {size} tokens cannot have as many; "
            f"raise TokenBudget.tokens_per_layer to {2 * least_effective}, or per_width in its place"
        )
    return math.ceil(least_effective * size / (size - least_effective))


def to_batches(weights: PoolWeights, batches: Sequence[Batch]) -> TokenWeights:
    """The weights as [batch, time] tensors of the micro-batches; padding gets 0.

    Raises:
        ValueError: the micro-batches hold other samples than the pool of the weights.
    """
    cu_seqlens = cu_seqlens_of(batches)
    if not np.array_equal(cu_seqlens, weights.cu_seqlens):
        raise ValueError(
            f"token weights belong to {len(weights.cu_seqlens) - 1} samples of {weights.cu_seqlens[-1]} tokens, the "
            f"micro-batches hold {len(cu_seqlens) - 1} samples of {cu_seqlens[-1]} tokens or of other lengths; weigh "
            "the tokens of the samples that calibration uses"
        )
    return _BatchWeights(weights, batches)


class _BatchWeights(Mapping[GroupKey, Sequence[Tensor]]):
    """Weights of micro-batches, made from the sparse ones when they are read: experts have thousands of groups.

    The last ones are kept, because a layer reads the weights of its few groups for one micro-batch after the other.
    """

    def __init__(self, weights: PoolWeights, batches: Sequence[Batch]) -> None:
        self._weights, self._batches, self._indices = weights, batches, pool_indices(batches)
        self._made = lru_cache(maxsize=16)(self._make)

    def __getitem__(self, key: GroupKey) -> list[Tensor]:
        return self._made(key)

    def _make(self, key: GroupKey) -> list[Tensor]:
        tokens = int(self._weights.cu_seqlens[-1])
        return _unflatten(self._weights.groups[key].dense(tokens), self._indices, self._batches)

    def __iter__(self) -> Iterator[GroupKey]:
        return iter(self._weights.groups)

    def __len__(self) -> int:
        return len(self._weights.groups)


def _unflatten(
    values: NDArray[np.float32], indices: Sequence[NDArray[np.int64]], batches: Sequence[Batch]
) -> list[Tensor]:
    tensors = [torch.zeros(batch.valid.shape) for batch in batches]
    for tensor, index, batch in zip(tensors, indices, batches, strict=True):
        tensor[batch.valid] = torch.from_numpy(values[index])
    return tensors
