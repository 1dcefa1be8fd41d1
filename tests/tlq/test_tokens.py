"""The token-level calibration set: budgets, floors, unbiased draws."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tlq.tokens import TokenBudget, effective_sample_size, select_tokens, split_by_sample


def pool(seed: int, size: int = 200, image_share: float = 0.6) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    generator = np.random.default_rng(seed)
    return generator.lognormal(0, 1.5, size).astype(np.float32), generator.random(size) < image_share


def select(
    weights: NDArray[np.float32], is_image: NDArray[np.bool_], budget: TokenBudget, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return select_tokens(weights, is_image, budget, np.random.default_rng(seed))


def test_top_is_the_heaviest_tokens_with_their_weights() -> None:
    weights, is_image = pool(0)
    chosen, kept = select(weights, is_image, TokenBudget(50, "top", modality_floor=0.0))
    assert sorted(chosen) == sorted(np.argsort(-weights)[:50])
    np.testing.assert_allclose(kept, weights[chosen] / weights[chosen].mean(), rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["top", "sample"]), st.integers(1, 400))
def test_budget_order_and_mean(seed: int, selection: str, budget: int) -> None:
    weights, is_image = pool(seed)
    chosen, kept = select(weights, is_image, TokenBudget(budget, selection))  # type: ignore[arg-type]
    assert 1 <= len(chosen) <= min(budget, len(weights))
    if selection == "top":
        assert len(chosen) == min(budget, len(weights))
    assert list(chosen) == sorted(set(chosen))
    assert float(kept.min()) > 0
    assert float(kept.mean()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("selection", ["top", "sample"])
@pytest.mark.parametrize("starved", ["image", "text"])
def test_each_modality_keeps_its_floor(selection: str, starved: str) -> None:
    weights, is_image = pool(1)
    weak = is_image if starved == "image" else ~is_image
    weights[weak] *= 1e-6
    chosen, kept = select(weights, is_image, TokenBudget(60, selection, 0.2))  # type: ignore[arg-type]
    drawn = kept[weak[chosen]] * 60 / kept.sum() if selection == "sample" else np.ones(weak[chosen].sum())
    assert float(drawn.sum()) == pytest.approx(12, abs=1)
    unfloored, _ = select(weights, is_image, TokenBudget(60, selection, 0.0))  # type: ignore[arg-type]
    assert weak[unfloored].sum() == 0


@pytest.mark.parametrize("selection", ["top", "sample"])
def test_a_pool_without_images_is_no_obstacle(selection: str) -> None:
    weights, _ = pool(2)
    chosen, _ = select(weights, np.zeros(200, bool), TokenBudget(40, selection, 0.3))  # type: ignore[arg-type]
    assert 0 < len(chosen) <= 40


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 500))
def test_every_token_is_drawn_within_one_of_its_expectation(seed: int, draws: int) -> None:
    weights, is_image = pool(seed)
    chosen, kept = select(weights, is_image, TokenBudget(draws, "sample", 0.0), seed)
    counts = np.zeros(len(weights))
    counts[chosen] = kept * draws / kept.sum()
    expected = draws * weights.astype(np.float64) / weights.sum(dtype=np.float64)
    assert np.abs(counts - expected).max() < 1 + 1e-3
    assert counts.sum() == pytest.approx(draws, rel=1e-4)


def test_draws_are_unbiased() -> None:
    """Over many seeds the mean estimate of sum_t w_t e_t is the sum itself."""
    weights, is_image = pool(3, size=60)
    errors = np.random.default_rng(9).random(60)
    truth = float((weights * errors).sum() / weights.sum())
    estimates = []
    for seed in range(400):
        chosen, kept = select(weights, is_image, TokenBudget(16, "sample", 0.0), seed)
        estimates.append(float((kept * errors[chosen]).sum() / kept.sum()))
    standard_error = np.std(estimates) / 20
    assert abs(np.mean(estimates) - truth) < 4 * standard_error
    assert standard_error < 0.02


def test_same_seed_same_tokens() -> None:
    weights, is_image = pool(4)
    budget = TokenBudget(50)
    first, again, other = (select(weights, is_image, budget, seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_sampling_keeps_more_effective_tokens_than_weighting() -> None:
    """Why `sample` is the default: heavy tails leave `top` with few tokens that count."""
    weights, is_image = pool(5, size=4000)
    _, heavy = select(weights, is_image, TokenBudget(500, "top", 0.0))
    _, drawn = select(weights, is_image, TokenBudget(500, "sample", 0.0))
    assert effective_sample_size(drawn) > effective_sample_size(heavy)


def test_effective_sample_size() -> None:
    assert effective_sample_size(np.ones(30, np.float32)) == pytest.approx(30)
    assert effective_sample_size(np.array([1, 0, 0], np.float32)) == pytest.approx(1)
    assert effective_sample_size(np.array([3, 1], np.float32)) == pytest.approx(16 / 10)


def test_split_by_sample() -> None:
    sample, position = split_by_sample(np.array([0, 4, 5, 6, 9]), [5, 1, 4])
    assert sample.tolist() == [0, 0, 1, 2, 2]
    assert position.tolist() == [0, 4, 0, 0, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_layer": 0}, "tokens_per_layer is 0, must be at least 1"),
        ({"selection": "best"}, "selection is 'best'; choose top or sample"),
        ({"modality_floor": 0.6}, r"modality_floor is 0\.6, must be in \[0, 0\.5\]"),
    ],
)
def test_impossible_budgets_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBudget(**{"tokens_per_layer": 10, **changes})  # type: ignore[arg-type]
