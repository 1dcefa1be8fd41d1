"""Token weights of a calibration: from importance scores to one weight per token, layer and linear group.

Either every token of the pool counts with its weight, or only the tokens of the token-level calibration set do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tlq.importance.token_set import TokenBudget, select_tokens, split_by_sample
from tlq.importance.weighting import (
    Importance,
    Source,
    Weighting,
    evened_out,
    modality_ratio,
    modality_weights,
    text_tokens,
    token_weights,
)
from tlq.models.architectures import BLOCK_OUTPUT
from tlq.samples import Batch, token_rows

#: (layer, group name) -> weight of every token, one [batch, time] tensor per micro-batch; 0 leaves a token out.
TokenWeights = Mapping[tuple[int, str], Sequence[Tensor]]

#: (layer, group name) -> sample -> weight of each of its tokens; samples without a weighted token may be absent.
SampleWeights = Mapping[tuple[int, str], Mapping[int, NDArray[np.float32]]]


def all_tokens(
    scores: Importance,
    is_image: Sequence[NDArray[np.bool_]],
    source: Source,
    weighting: Weighting,
    is_answer: Sequence[NDArray[np.bool_]] | None = None,
) -> SampleWeights:
    """Every token of every sample, weighted by ``source``.

    Args:
        scores: raw importance of every layer and group: of the answer's loss, or of the block's for source `block`.
        is_answer: which tokens are the answer's, for source `modality` with ``weighting.text`` `answer`.
    """
    groups = _weights_of_groups(scores, is_image, source, weighting, is_answer)
    return {key: dict(enumerate(weights)) for key, weights in groups}


def _weights_of_groups(
    scores: Importance,
    is_image: Sequence[NDArray[np.bool_]],
    source: Source,
    weighting: Weighting,
    is_answer: Sequence[NDArray[np.bool_]] | None,
) -> Iterator[tuple[tuple[int, str], list[NDArray[np.float32]]]]:
    """Weights per sample of every (layer, group), one after the other.

    `modality` weighs a group by the importance at the output of its attention or MLP, as MBQ does.
    """
    if weighting.text == "all":
        is_answer = None
    elif is_answer is None:
        raise ValueError("weighting.text is 'answer', but nothing tells which tokens are; give is_answer")
    least_ratio = _median_ratios(scores, is_image, is_answer) if source == "modality" else {}
    for layer, group in sorted(scores):
        if source == "modality":
            block = BLOCK_OUTPUT[group]
            weights = modality_weights(scores[layer, block], is_image, is_answer, least_ratio[block])
        else:
            weights = token_weights(scores[layer, group], is_image, source, weighting)
        yield (layer, group), weights


def _median_ratios(
    scores: Importance, is_image: Sequence[NDArray[np.bool_]], is_answer: Sequence[NDArray[np.bool_]] | None
) -> dict[str, float]:
    """For attention and MLP, by the group at its output: the median over layers of the ratio of modalities."""
    text = text_tokens(is_image, is_answer)
    ratios: dict[str, list[float]] = {block: [] for block in BLOCK_OUTPUT.values()}
    for (_, group), raw in scores.items():
        if group in ratios:
            ratios[group].append(modality_ratio(raw, is_image, text))
    return {block: float(np.median(values)) for block, values in ratios.items() if values}


def uniform_tokens(keys: Sequence[tuple[int, str]], is_image: Sequence[NDArray[np.bool_]]) -> SampleWeights:
    """Every token of every sample with weight 1: needs no scores."""
    ones = {sample: np.ones(len(marks), np.float32) for sample, marks in enumerate(is_image)}
    return dict.fromkeys(keys, ones)


def token_set(
    scores: Importance,
    is_image: Sequence[NDArray[np.bool_]],
    source: Source,
    weighting: Weighting,
    budget: TokenBudget,
    seed: int,
    is_answer: Sequence[NDArray[np.bool_]] | None = None,
) -> SampleWeights:
    """The token-level calibration set of every layer and group, drawn from the whole pool.

    ``weighting.least_effective`` is of the set: the pool's weights are evened out so far that draws from them have as
    many, those of `top` tokens once chosen. Other arguments as for ``all_tokens``.
    """
    least = weighting.least_effective if source in ("token", "block") else 0
    weighting = replace(weighting, least_effective=_needed_in_pool(least, budget))
    pool_is_image = np.concatenate(is_image)
    lengths = [len(marks) for marks in is_image]
    sample_of = np.repeat(np.arange(len(lengths)), lengths)
    chosen_weights: dict[tuple[int, str], dict[int, NDArray[np.float32]]] = {}
    groups = _weights_of_groups(scores, is_image, source, weighting, is_answer)
    for number, (key, weights) in enumerate(groups):
        generator = np.random.default_rng([seed, number])
        chosen, values = select_tokens(np.concatenate(weights), pool_is_image, sample_of, budget, generator)
        if budget.selection == "top":
            values = evened_out(values.astype(np.float64), min(least, len(values))).astype(np.float32)
        per_sample = chosen_weights.setdefault(key, {})
        for sample, position, value in zip(*split_by_sample(chosen, lengths), values, strict=True):
            if sample not in per_sample:
                per_sample[int(sample)] = np.zeros(lengths[sample], np.float32)
            per_sample[int(sample)][position] = value
    return chosen_weights


def _needed_in_pool(least_effective: int, budget: TokenBudget) -> int:
    """Effective tokens of a pool whose token sets have ``least_effective``.

    n systematic draws from E effective tokens have n E / (n + E) or more, in expectation: a token expected e times is
    drawn c times with E[c^2] <= e^2 + e, and the sums of e and e^2 are n and n^2 / E.

    Raises:
        ValueError: the budget is too small for as many.
    """
    size = budget.tokens_per_layer
    if budget.selection == "top" and least_effective <= size:
        return least_effective
    if least_effective >= size:
        raise ValueError(
            f"calibset.weighting.least_effective is {least_effective}, a set of {size} tokens cannot have as many; "
            f"raise calibset.budget.tokens_per_layer to {2 * least_effective}"
        )
    return math.ceil(least_effective * size / (size - least_effective))


def to_batches(weights: SampleWeights, batches: Sequence[Batch]) -> TokenWeights:
    """Weights per sample in the layout of the micro-batches; padding and absent samples get 0."""
    return {key: _to_batches(per_sample, batches) for key, per_sample in weights.items()}


def _to_batches(per_sample: Mapping[int, NDArray[np.float32]], batches: Sequence[Batch]) -> list[Tensor]:
    batches_of_weights = [torch.zeros(batch.valid.shape) for batch in batches]
    for tensor, batch in zip(batches_of_weights, batches, strict=True):
        for sample, row, _ in token_rows([batch]):
            if sample in per_sample:
                tensor[row, batch.valid[row]] = torch.from_numpy(per_sample[sample])
    return batches_of_weights
