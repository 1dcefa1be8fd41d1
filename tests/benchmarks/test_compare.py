"""Comparison with full precision: by hand, against exact sums, and as a table."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.compare import compare, mcnemar_p, resampled_means, scores_table
from benchmarks.results import BenchmarkMetrics, Metrics


def items(task: str, scores: list[float], **columns: object) -> pd.DataFrame:
    frame = pd.DataFrame({"task": task, "doc": [f"d{n:03d}" for n in range(len(scores))], "score": scores})
    defaults = {"n_answer_tokens": 0, "nll": np.nan, "kl": np.nan}
    return frame.assign(**defaults | columns)


def tail_of_fair_coins(lost: int, gained: int) -> float:
    """Twice P(X <= min(lost, gained)), X binomial(lost + gained, 1/2), term by term in exact integers."""
    flips = lost + gained
    tail = 2 * sum(math.comb(flips, k) for k in range(min(lost, gained) + 1))
    return float(min(Fraction(1), Fraction(tail, 2**flips)))


@settings(deadline=None)  # the first call imports scipy
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_p_equals_the_exact_binomial_tail(lost: int, gained: int) -> None:
    assert mcnemar_p(lost, gained) == pytest.approx(tail_of_fair_coins(lost, gained), rel=1e-9)


def test_mcnemar_of_many_flips() -> None:
    assert mcnemar_p(600, 700) == pytest.approx(tail_of_fair_coins(600, 700), rel=1e-9)
    assert mcnemar_p(5000, 5000) == 1.0


def test_one_benchmark_by_hand() -> None:
    full = items("a", [1, 1, 1, 1, 0, 0, 0, 0])
    variant = items("a", [1, 1, 0, 0, 1, 0, 0, 0])
    result = compare(variant, {"a": 8}, full, resamples=500, seed=0)["a"]
    assert (result.score, result.n, result.asked, result.pairs) == (37.5, 8, 8, 8)
    assert (result.retention, result.lost, result.gained) == (75.0, 2, 1)
    assert result.mcnemar_p == pytest.approx(1.0)
    assert result.low < 37.5 < result.high
    assert result.retention_low is not None
    assert result.retention_high is not None
    assert result.retention_low < 75 < result.retention_high


def test_equal_items_have_full_retention() -> None:
    full = items("a", [1, 0, 0.3, 1, 0.6] * 20)
    result = compare(full, {"a": 100}, full, resamples=200, seed=0)
    for entry in result.values():
        assert (entry.retention, entry.lost, entry.gained, entry.mcnemar_p) == (100, 0, 0, 1)
        assert entry.retention_low == entry.retention_high == pytest.approx(100)


def test_only_shared_items_are_compared_and_missing_items_are_counted() -> None:
    full = items("a", [1, 1, 1, 1])
    variant = items("a", [0, 1, 1, 1]).iloc[1:]
    result = compare(variant, {"a": 4}, full, resamples=50, seed=0)["a"]
    assert (result.n, result.asked, result.pairs, result.retention) == (3, 4, 3, 100)


def test_no_shared_item_is_an_error() -> None:
    full = items("a", [1.0]).assign(doc="other")
    with pytest.raises(ValueError, match="a: no item in common with full precision"):
        compare(items("a", [1.0]), {"a": 1}, full, resamples=10, seed=0)


def test_full_precision_and_a_baseline_score_of_zero_have_no_retention() -> None:
    alone = compare(items("a", [0, 0]), {"a": 2}, None, resamples=50, seed=0)["a"]
    assert (alone.score, alone.retention, alone.lost) == (0, None, None)
    zero = compare(items("a", [0, 1]), {"a": 2}, items("a", [0, 0]), resamples=50, seed=0)
    assert zero["a"].retention is None
    assert zero["mean"].retention is None


def test_the_mean_weighs_benchmarks_not_items() -> None:
    full = pd.concat([items("a", [1] * 10), items("b", [1] * 2)])
    variant = pd.concat([items("a", [1] * 10), items("b", [1, 0])])
    mean = compare(variant, {"a": 10, "b": 2}, full, resamples=100, seed=0)["mean"]
    assert (mean.score, mean.retention, mean.n, mean.asked, mean.lost) == (75, 75, 12, 12, 1)


def test_divergence_weighs_tokens() -> None:
    frame = items("a", [1, 1, 1], n_answer_tokens=[1, 3, 0], nll=[4.0, 0.0, np.nan], kl=[0.4, 0.0, np.nan])
    result = compare(frame, {"a": 3}, None, resamples=10, seed=0)
    assert result["a"].nll == pytest.approx(1.0)
    assert result["mean"].kl == pytest.approx(0.1)


def test_the_interval_of_kl_resamples_items_with_their_tokens() -> None:
    """Two items: a resample holds the first twice (KL 0.4), the second twice (0) or both (0.4 / 4 tokens)."""
    full = pd.concat([items("a", [1, 1]), items("b", [1, 1])])
    of_a = items("a", [1, 1], n_answer_tokens=[1, 3], kl=[0.4, 0.0])
    of_b = items("b", [1, 1], n_answer_tokens=[2, 2], kl=[0.2, 0.2])
    result = compare(pd.concat([of_a, of_b]), {"a": 2, "b": 2}, full, resamples=400, seed=0)
    found = {name: (entry.kl_low, entry.kl, entry.kl_high) for name, entry in result.items()}
    assert found["a"] == pytest.approx((0.0, 0.1, 0.4))
    assert found["b"] == pytest.approx((0.2, 0.2, 0.2))
    assert found["mean"] == pytest.approx((0.1, 0.15, 0.3))


def test_the_interval_of_kl_is_about_the_normal_one() -> None:
    kl = np.random.default_rng(0).exponential(0.1, 400)
    frame = items("a", [1.0] * 400, n_answer_tokens=2, kl=kl)
    result = compare(frame, {"a": 400}, frame, resamples=4000, seed=0)["a"]
    assert result.kl_low == pytest.approx(kl.mean() - 1.96 * kl.std() / 20, abs=0.002)
    assert result.kl_high == pytest.approx(kl.mean() + 1.96 * kl.std() / 20, abs=0.002)


def test_full_precision_and_unmeasured_benchmarks_have_no_interval_of_kl() -> None:
    measured = items("a", [1, 0], n_answer_tokens=2, kl=[0.0, 0.1])
    both = pd.concat([measured, items("b", [1, 0])])
    assert compare(measured, {"a": 2}, None, resamples=10, seed=0)["a"].kl_low is None
    result = compare(both, {"a": 2, "b": 2}, both, resamples=10, seed=0)
    assert result["a"].kl_high is not None
    assert (result["b"].kl_high, result["mean"].kl_high) == (None, None)


def test_scores_have_the_same_interval_with_and_without_kl() -> None:
    full = items("a", [1, 0, 1, 1, 0])
    with_kl = full.assign(n_answer_tokens=2, kl=0.1)
    plain, measured = (compare(each, {"a": 5}, full, resamples=50, seed=0)["mean"] for each in (full, with_kl))
    assert replace(measured, kl=None, kl_low=None, kl_high=None) == plain


def test_same_seed_same_interval() -> None:
    frame = items("a", [1, 0, 0, 1, 1, 0, 1])
    runs = [compare(frame, {"a": 7}, frame, resamples=100, seed=seed)["a"] for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert (runs[0].low, runs[0].high) == pytest.approx((runs[2].low, runs[2].high), abs=20)


def test_bootstrap_interval_is_about_the_normal_one() -> None:
    scores = np.array([1.0] * 70 + [0.0] * 30)[:, None]
    means = resampled_means(scores, 4000, np.random.default_rng(0))
    assert means.shape == (4000, 1)
    assert means.mean() == pytest.approx(0.7, abs=0.01)
    assert means.std() == pytest.approx((0.7 * 0.3 / 100) ** 0.5, rel=0.05)


def test_table() -> None:
    def entry(n: int) -> BenchmarkMetrics:
        return BenchmarkMetrics(score=71.25, low=69.0, high=73.0, n=n, asked=600)

    full = Metrics("full", {"a": entry(600)}, replace(entry(600), nll=0.5, kl=0.0))
    retained = replace(entry(598), retention=98.0, retention_low=97.0, retention_high=99.0, kl=0.0123, nll=0.6)
    retained = replace(retained, kl_low=0.0101, kl_high=0.0145)
    variant = Metrics("tlq-w3a16", {"a": entry(598)}, retained)
    lines = scores_table([variant, full]).splitlines()
    assert lines[0].split() == ["variant", "a", "mean", "retention", "%", "KL", "NLL"]
    assert lines[2].startswith("full")
    assert "71.2 ± 2.0 (598/600)" in lines[3]
    assert "98.0 ± 1.0" in lines[3]
    assert lines[3].endswith("0.0123 ± 0.0022  0.6000")
    assert lines[2].endswith(" 0.0000  0.5000")
    assert len({len(line) for line in lines}) == 1
    assert scores_table([]) == "no variants"
