"""The token-level calibration set: budgets, floors, caps, unbiased draws."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tlq.importance.token_set import TokenBudget, effective_sample_size, select_tokens


def pool(seed: int, size: int = 200, image_share: float = 0.6) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    generator = np.random.default_rng(seed)
    return generator.lognormal(0, 1.5, size).astype(np.float32), generator.random(size) < image_share


def samples_of(seed: int, size: int, samples: int) -> NDArray[np.int64]:
    """Samples of unequal lengths, in pool order, every one with a token."""
    generator = np.random.default_rng(seed)
    extra = generator.choice(samples, size - samples, p=generator.dirichlet(np.ones(samples)))
    return np.sort(np.concatenate([np.arange(samples), extra]))


def select(
    weights: NDArray[np.float32],
    is_image: NDArray[np.bool_],
    budget: TokenBudget,
    seed: int = 0,
    sample_of: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Samples of ten tokens, unless given."""
    sample_of = np.arange(len(weights)) // 10 if sample_of is None else sample_of
    return select_tokens(weights, is_image, sample_of, budget, np.random.default_rng(seed))


def draw_shares(
    weights: NDArray[np.float32],
    is_image: NDArray[np.bool_],
    sample_of: NDArray[np.int64],
    floor: float,
    cap: float,
    draws: int = 100_000,
) -> NDArray[np.float64]:
    """Share of every token in very many draws: its probability to within 1 / draws."""
    chosen, kept = select(weights, is_image, TokenBudget(draws, "sample", floor, cap), 0, sample_of)
    shares = np.zeros(len(weights))
    shares[chosen] = kept / kept.sum(dtype=np.float64)
    return shares


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
def test_a_set_is_chosen_from_a_pool_without_images(selection: str) -> None:
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


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.floats(0, 0.5), st.floats(1, 3), st.floats(-12, 12))
def test_draws_hold_floors_and_caps(seed: int, samples: int, floor: float, slack: float, tilt: float) -> None:
    """If the pool is refused, no shares can keep the floors and caps."""
    weights, is_image = pool(seed, 80)
    weights[is_image] *= math.exp(tilt)
    sample_of, cap = samples_of(seed, 80, samples), min(1.0, slack / samples)
    reach = [cap * len(np.unique(sample_of[mask])) for mask in (is_image, ~is_image)]
    if min(reach) < floor:
        with pytest.raises(ValueError, match="sample_cap"):
            draw_shares(weights, is_image, sample_of, floor, cap)
        return
    shares = draw_shares(weights, is_image, sample_of, floor, cap)
    assert shares.sum() == pytest.approx(1)
    assert np.bincount(sample_of, shares).max() <= cap + 3e-5
    assert min(shares[is_image].sum(), shares[~is_image].sum()) >= floor - 2e-5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 10), st.floats(-6, 6))
def test_draws_are_the_nearest_to_the_weights_within_floors_and_caps(seed: int, samples: int, tilt: float) -> None:
    """One factor for each modality and one for each sample, equal for all samples below the cap and less at it.

    Under these conditions no other shares within the bounds are nearer to the weights.
    """
    weights, is_image = pool(seed, 60)
    weights[is_image] *= math.exp(tilt)
    sample_of, cap, floor = samples_of(seed, 60, samples), 1.3 / samples, 0.2
    if min(cap * len(np.unique(sample_of[mask])) for mask in (is_image, ~is_image)) < 1.2 * floor:
        return
    shares = draw_shares(weights, is_image, sample_of, floor, cap, 1_000_000)
    factor = shares / weights
    totals = np.bincount(sample_of, shares)
    seen = shares > 1e-3  # the others' factors are lost in the rounding of draws
    lifts = []
    for sample in range(samples):
        own = sample_of == sample
        image, text = own & is_image & seen, own & ~is_image & seen
        for cell in (image, text):
            if cell.any():
                np.testing.assert_allclose(factor[cell], factor[cell][0], rtol=5e-3)
        if image.any() and text.any():
            lifts.append(factor[image].mean() / factor[text].mean())
    np.testing.assert_allclose(lifts, lifts[:1] * len(lifts), rtol=1e-2)
    image_share = shares[is_image].sum()
    if lifts and floor + 1e-3 < image_share < 1 - floor - 1e-3:
        assert lifts[0] == pytest.approx(1, rel=1e-2)
    for mask in (is_image, ~is_image):
        open_samples = [factor[(sample_of == s) & mask & seen] for s in range(samples) if totals[s] < cap - 1e-4]
        full_samples = [factor[(sample_of == s) & mask & seen] for s in range(samples) if totals[s] >= cap - 1e-4]
        common = np.concatenate([*open_samples, np.empty(0)])
        if len(common):
            np.testing.assert_allclose(common, common[0], rtol=1e-2)
            assert max((float(f.max()) for f in full_samples if len(f)), default=0) <= common[0] * 1.01


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(2, 12), st.integers(1, 90), st.floats(0, 0.5), st.floats(1, 3), st.booleans()
)
def test_top_holds_floors_and_caps(
    seed: int, samples: int, budget: int, floor: float, slack: float, ties: bool
) -> None:
    weights, is_image = pool(seed, 80)
    weights[is_image] *= math.exp(np.random.default_rng(seed).normal(0, 4))
    weights = np.minimum(weights, np.quantile(weights, 0.3)) if ties else weights
    sample_of, cap = samples_of(seed, 80, samples), min(1.0, slack / samples)
    if min(cap * len(np.unique(sample_of[mask])) for mask in (is_image, ~is_image)) < floor:
        return
    chosen, _ = select(weights, is_image, TokenBudget(budget, "top", floor, cap), 0, sample_of)
    size = len(chosen)
    limit = math.ceil(cap * size - 1e-9)
    assert np.bincount(sample_of[chosen]).max() <= limit
    for mask in (is_image, ~is_image):
        available = np.minimum(np.bincount(sample_of[mask]), limit).sum()
        assert mask[chosen].sum() >= min(int(floor * size), available)
    for larger in range(size + 1, min(budget, 80) + 1):  # the set is as large as the samples allow
        assert np.minimum(np.bincount(sample_of), math.ceil(cap * larger - 1e-9)).sum() < larger


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.34, 1))
def test_top_is_the_heaviest_set_within_the_cap(seed: int, cap: float) -> None:
    weights, is_image = pool(seed, 10)
    sample_of = samples_of(seed, 10, 3)
    chosen, _ = select(weights, is_image, TokenBudget(5, "top", 0.0, cap), 0, sample_of)
    limit = math.ceil(cap * len(chosen) - 1e-9)
    allowed = [
        weights[list(tokens)].sum()
        for tokens in itertools.combinations(range(10), len(chosen))
        if np.bincount(sample_of[list(tokens)]).max() <= limit
    ]
    assert weights[chosen].sum() == pytest.approx(max(allowed), rel=1e-5)


def test_a_capped_sample_leaves_its_excess_to_the_others_in_proportion() -> None:
    weights = np.array([80, 10, 6, 4], np.float32)
    shares = draw_shares(weights, np.zeros(4, bool), np.arange(4), 0.0, 0.5)
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.15, 0.1], atol=2e-5)
    shares = draw_shares(weights, np.zeros(4, bool), np.arange(4), 0.0, 0.3)
    np.testing.assert_allclose(shares, [0.3, 0.3, 0.24, 0.16], atol=2e-5)  # 10 of 20 is over the cap in its turn


def test_text_in_a_full_sample_takes_the_place_of_its_images() -> None:
    """The heaviest text is in sample 0, which its images fill: they go, so that both the cap and the floor hold."""
    weights = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1], np.float32)
    is_image = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0], bool)
    sample_of = np.array([0, 0, 1, 1, 0, 0, 2, 2, 2])
    chosen, _ = select(weights, is_image, TokenBudget(6, "top", 0.5, 1 / 3), 0, sample_of)
    assert chosen.tolist() == [0, 2, 3, 4, 6, 7]


@pytest.mark.parametrize("selection", ["top", "sample"])
def test_a_cap_that_the_pool_cannot_keep_is_refused(selection: str) -> None:
    weights, is_image = np.ones(40, np.float32), np.arange(40) < 10
    budget = TokenBudget(20, selection, 0.3, 0.2)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"the 4 samples with tokens .* supply 0\.8 of the set, 1 is needed; .* 0\.25 or"
    ):
        select(weights, is_image, budget)
    weights = np.ones(100, np.float32)
    with pytest.raises(ValueError, match=r"the 1 samples with image tokens .* 0\.2 of the set, 0\.3 is .*_floor"):
        select(weights, np.arange(100) < 10, budget)
    select(weights, np.arange(100) % 2 == 0, budget)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens_per_layer": 0}, "TokenBudget.tokens_per_layer is 0, must be at least 1"),
        ({"selection": "best"}, "selection is 'best'; choose top or sample"),
        ({"modality_floor": 0.6}, r"modality_floor is 0\.6, must be in \[0, 0\.5\]"),
        ({"sample_cap": 0}, r"sample_cap is 0, must be in \(0, 1\]"),
    ],
)
def test_impossible_budgets_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBudget(**{"tokens_per_layer": 10, **changes})  # type: ignore[arg-type]
