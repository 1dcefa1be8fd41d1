"""Weights of every layer and group: MBQ's against a plain implementation of the paper's code, the token set's caps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.pools import pool_of

from tlq.importance.pool import Importance, PoolWeights, TokenPool, WeightedTokens
from tlq.importance.token_set import TokenBudget, effective_sample_size, select_tokens
from tlq.importance.token_weights import all_tokens, budget_of, to_batches, token_set, uniform_tokens
from tlq.importance.weighting import Source, Weighting, token_weights
from tlq.samples import Batch

GROUPS = ("qkv", "o_proj", "gate_up", "down")


def scored(seed: int, layers: int = 5) -> tuple[Importance, TokenPool]:
    """Scores whose modalities differ by layer, in a pool whose samples of any length end with an answer."""
    generator = np.random.default_rng(seed)
    shape = [(int(image), int(prompt), int(answer)) for image, prompt, answer in generator.integers(2, 12, (4, 3))]
    is_image = [np.arange(sum(parts)) < parts[0] for parts in shape]
    is_answer = [np.arange(sum(parts)) >= parts[0] + parts[1] for parts in shape]
    scores: Importance = {}
    for layer in range(layers):
        for group in GROUPS:
            strength = generator.lognormal(-1, 1)
            per_sample = [
                (generator.lognormal(-8, 1, len(marks)) * np.where(marks, strength, 1)).astype(np.float32)
                for marks in is_image
            ]
            scores[layer, group] = np.concatenate(per_sample)
    return scores, pool_of(is_image, is_answer)


def plain_mbq(scores: Importance, pool: TokenPool, is_text: NDArray[np.bool_]) -> dict[tuple[int, str], list[float]]:
    """Factors on the error of every token as MBQ's search has them, one sample, layer and block at a time."""
    ratios: dict[str, dict[int, float]] = {"attention": {}, "mlp": {}}
    for block, last in (("attention", "o_proj"), ("mlp", "down")):
        for layer in sorted({layer for layer, _ in scores}):
            vision, caption = [], []
            for start, stop in zip(pool.cu_seqlens, pool.cu_seqlens[1:], strict=False):
                tokens = range(start, stop)
                vision.append(np.mean([scores[layer, last][t] for t in tokens if pool.is_image[t]]))
                caption.append(np.mean([scores[layer, last][t] for t in tokens if is_text[t]]))
            ratios[block][layer] = float(np.mean(vision) / np.mean(caption))
    factors: dict[tuple[int, str], list[float]] = {}
    for layer, group in scores:
        of_block = ratios["attention" if group in ("qkv", "o_proj") else "mlp"]
        ordered = sorted(of_block.values())
        middle = len(ordered) // 2
        median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
        ratio = max(of_block[layer], median)
        factors[layer, group] = [
            ratio if image else float(text) for image, text in zip(pool.is_image, is_text, strict=True)
        ]
    return factors


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.booleans())
def test_modality_weights_are_those_of_mbq(seed: int, layers: int, marked: bool) -> None:
    scores, pool = scored(seed, layers)
    expected = plain_mbq(scores, pool, pool.is_answer if marked else ~pool.is_image)
    weights = all_tokens(scores, pool, "modality", Weighting(text="answer" if marked else "all"))
    assert set(weights.groups) == set(expected)
    for key, factors in expected.items():
        np.testing.assert_allclose(weights.groups[key].weights, np.divide(factors, np.mean(factors)), rtol=1e-5)


def test_a_layer_whose_images_matter_little_is_raised_to_the_median() -> None:
    """In the last layer image gradients vanish; without MBQ's bound the error of image tokens would not count."""
    scores, pool = scored(3)
    scores[4, "down"][pool.is_image] = 0
    weights = all_tokens(scores, pool, "modality", Weighting())
    assert weights.groups[4, "down"].weights[pool.is_image].min() > 0
    alone = token_weights(scores[4, "down"], pool, "modality", Weighting())
    assert alone[pool.is_image].max() == 0


@pytest.mark.parametrize("source", ["token", "block", "uniform"])
def test_other_sources_weigh_every_group_by_its_own_scores(source: Source) -> None:
    scores, pool = scored(7)
    weighting = Weighting(0.5, 0.95, 0.2, 20)
    weights = all_tokens(scores, pool, source, weighting)
    for key, raw in scores.items():
        np.testing.assert_array_equal(weights.groups[key].indices, np.arange(len(pool)))
        np.testing.assert_array_equal(weights.groups[key].weights, token_weights(raw, pool, source, weighting))


def test_a_set_by_modality_holds_answers_and_images_only() -> None:
    scores, pool = scored(8)
    chosen = token_set(scores, pool, "modality", Weighting(text="answer"), TokenBudget(40), 0)
    for tokens in chosen.groups.values():
        assert (pool.is_image | pool.is_answer)[tokens.indices].all()
        assert pool.is_answer[tokens.indices].any()


def test_a_budget_by_width_draws_a_multiple_of_the_width_of_every_group() -> None:
    """Nothing else changes: each set is the one that a budget of so many tokens draws."""
    scores, pool = scored(8)
    widths = {key: 8 if key[1] == "qkv" else 20 for key in scores}
    budget = TokenBudget(1, "top", modality_floor=0.2, per_width=1.5)
    chosen = token_set(scores, pool, "token", Weighting(1, 1), budget, 0, widths)
    for key, tokens in chosen.groups.items():
        size = 12 if key[1] == "qkv" else 30
        expected = token_set(scores, pool, "token", Weighting(1, 1), TokenBudget(size, "top", 0.2), 0)
        assert tokens.indices.tolist() == expected.groups[key].indices.tolist()
        assert len(tokens.indices) == size


def test_experts_that_share_their_tokens_have_a_budget_of_the_widest() -> None:
    widths = {(0, "experts.0.gate_up"): 64, (0, "experts.0.down"): 96, (1, "experts.0.down"): 128, (0, "qkv"): 256}
    budget = TokenBudget(1, per_width=2)
    for key, size in [((0, "experts"), 192), ((0, "experts.0.gate_up"), 128), ((0, "qkv"), 512)]:
        assert budget_of(key, budget, widths).tokens_per_layer == size


def test_a_budget_by_width_needs_the_widths() -> None:
    scores, pool = scored(8)
    with pytest.raises(ValueError, match="input width of layer 0, group .* is not known; score the tokens again"):
        token_set(scores, pool, "token", Weighting(), TokenBudget(1, per_width=2), 0)


@pytest.mark.parametrize("selection", ["top", "sample"])
def test_no_sample_supplies_more_of_a_set_than_its_cap(selection: str) -> None:
    scores, pool = scored(9)
    for raw in scores.values():
        pool.split(raw)[2][:] *= 1000
    budgets = [TokenBudget(24, selection, 0.1, cap) for cap in (1.0, 0.34)]  # type: ignore[arg-type]
    free, capped = (token_set(scores, pool, "token", Weighting(1, 1), budget, 0) for budget in budgets)

    def share(weights: PoolWeights, key: tuple[int, str]) -> float:
        """Share of sample 2 in the draws or in the chosen tokens."""
        tokens = weights.groups[key]
        supplied = tokens.weights if selection == "sample" else np.ones(len(tokens.indices))
        return float(supplied[pool.sample_of[tokens.indices] == 2].sum() / supplied.sum())

    for key in scores:
        assert share(free, key) > 0.5
        assert 0.34 - 2 / 24 < share(capped, key) < 0.34 + 2 / 24


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(60, 120), st.integers(5, 29), st.sampled_from(["top", "sample"]))
def test_a_set_reaches_the_required_effective_sample_size(seed: int, size: int, least: int, selection: str) -> None:
    """Every set of the heaviest tokens reaches the size; draws reach it on average over groups."""
    generator = np.random.default_rng(seed)
    pool = pool_of([np.arange(40) < 25] * 10)
    scores = {
        (layer, group): generator.lognormal(-8, 3, len(pool)).astype(np.float32)
        for layer in range(5)
        for group in GROUPS
    }
    budget = TokenBudget(size, selection, 0.0)  # type: ignore[arg-type]
    chosen = token_set(scores, pool, "token", Weighting(1, 1, 0, least), budget, seed)
    sizes = [effective_sample_size(tokens.weights) for tokens in chosen.groups.values()]
    if selection == "top":
        assert min(sizes) >= least * (1 - 1e-4)
    else:
        assert np.mean(sizes) >= least * 0.97
        assert np.mean(sizes) < 2 * least + 10  # evened out no more than that takes, or not much


def test_least_effective_of_zero_changes_no_set() -> None:
    scores, pool = scored(10)
    budget = TokenBudget(30, "sample", 0.0)
    without, with_two = (token_set(scores, pool, "token", Weighting(1, 1, 0, least), budget, 0) for least in (0, 2))
    for key, tokens in without.groups.items():
        np.testing.assert_array_equal(tokens.indices, with_two.groups[key].indices)
        np.testing.assert_array_equal(tokens.weights, with_two.groups[key].weights)


@pytest.mark.parametrize(("selection", "least"), [("sample", 20), ("top", 21)])
def test_more_effective_tokens_than_the_budget_are_refused(selection: str, least: int) -> None:
    scores, pool = scored(11)
    budget = TokenBudget(20, selection)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"least_effective is {least}, a set of 20 .*tokens_per_layer to {2 * least}"):
        token_set(scores, pool, "token", Weighting(least_effective=least), budget, 0)
    token_set(scores, pool, "modality", Weighting(least_effective=least), budget, 0)


def test_a_seed_draws_by_sorted_key() -> None:
    """The bits of a set depend on the seed and on the rank of its key, not on the order of the scores."""
    scores, pool = scored(12)
    budget, weighting = TokenBudget(20, "sample", 0.0), Weighting(1, 1)
    forward = token_set(scores, pool, "token", weighting, budget, 4)
    backward = token_set(dict(reversed(scores.items())), pool, "token", weighting, budget, 4)
    assert list(forward.groups) == list(backward.groups) == sorted(scores)
    for draw, (key, tokens) in enumerate(forward.groups.items()):
        indices, weights = select_tokens(
            token_weights(scores[key], pool, "token", weighting),
            pool.is_image,
            pool.sample_of,
            budget,
            np.random.default_rng([4, draw]),
        )
        np.testing.assert_array_equal(tokens.indices, indices)
        np.testing.assert_array_equal(tokens.weights, weights)
        np.testing.assert_array_equal(backward.groups[key].indices, indices)


def test_weights_reach_the_tokens_of_the_micro_batches(batches: list[Batch]) -> None:
    """Row by row against a plain loop; tokens outside the set, and padding, get 0."""
    pool = TokenPool.of(batches)
    chosen = np.arange(0, len(pool), 3)
    tokens = WeightedTokens(chosen, (1 + chosen).astype(np.float32))
    weights = to_batches(PoolWeights(pool.cu_seqlens, {(0, "qkv"): tokens}), batches)[0, "qkv"]
    for tensor, batch in zip(weights, batches, strict=True):
        assert float(tensor[~batch.valid].abs().sum()) == 0
        for row, sample in enumerate(batch.samples):
            indices = np.arange(pool.cu_seqlens[sample], pool.cu_seqlens[sample + 1])
            expected = np.where(indices % 3 == 0, 1 + indices, 0)
            np.testing.assert_array_equal(tensor[row][batch.valid[row]].numpy(), expected)


def test_weights_of_other_samples_are_refused(batches: list[Batch]) -> None:
    other = pool_of([np.zeros(3, bool), np.zeros(4, bool)])
    with pytest.raises(ValueError, match="belong to 2 samples of 7 tokens, the micro-batches hold 6 samples"):
        to_batches(uniform_tokens([(0, "qkv")], other), batches)
