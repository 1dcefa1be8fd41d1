"""The gate: the versions that pass, and the choice of the champion among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.results import BenchmarkMetrics, Comparison, Metrics
from tasks.config.params import ParamsError, parse
from tasks.config.sections import Bounds
from tasks.registry.gate import (
    CannotCompare,
    Contender,
    Difference,
    Outcome,
    challenge,
    judge,
    paired_difference,
    succession,
)

BOUNDS = Bounds(min_retention=95, max_flips=5, floors={"demo_textvqa": 90, "mean": 85})


def metrics(**mean: Any) -> Metrics:
    """Metrics of a variant that passes BOUNDS; ``mean`` replaces fields of the mean."""
    kept = {"retention": 97.5, "retention_low": 95.5, "lost": 3, "gained": 1, "pairs": 100}
    passing = Comparison(97.0, 95.5, 98.0, n=100, asked=100, **kept)  # type: ignore[arg-type]
    benchmark = BenchmarkMetrics(91.0, 86.0, 95.0, n=100, asked=100)
    return Metrics("tlq-w3a16", {"demo_textvqa": benchmark}, replace(passing, **mean))


def test_a_variant_within_all_bounds_passes() -> None:
    assert judge(metrics(), BOUNDS).passed
    assert judge(metrics(), Bounds()).passed


@pytest.mark.parametrize(
    ("mean", "reason"),
    [
        ({"retention": 94.99}, "mean retention: 94.99 %, register.min_retention needs at least 95 %"),
        ({"retention": None}, "mean retention: missing; register.min_retention needs at least 95 %"),
        ({"retention": math.nan}, "mean retention: is nan; register.min_retention needs at least 95 %"),
        ({"score": 84}, "mean score: 84 %, register.floors.mean needs at least 85 %"),
        ({"lost": 4, "gained": 2}, "mean flips: 6.00 % (4 lost and 2 gained of 100 items), register.max_flips allows"),
        ({"pairs": 0}, "mean flips: not measured"),
    ],
)
def test_a_violated_bound_is_the_reason(mean: dict[str, Any], reason: str) -> None:
    verdict = judge(metrics(**mean), BOUNDS)
    assert not verdict.passed
    assert [found.startswith(reason) for found in verdict.reasons] == [True]


def test_a_variant_without_a_finite_score_fails_even_without_bounds() -> None:
    assert judge(metrics(score=math.nan), Bounds()).reasons == ("mean score: is nan; evaluate the variant again",)


def test_a_floor_for_an_unscored_benchmark_names_both_remedies() -> None:
    (reason,) = judge(metrics(), Bounds(floors={"demo_txtvqa": 90})).reasons
    assert reason == "demo_txtvqa: not scored; add it to evaluate.benchmarks, or remove register.floors.demo_txtvqa"


def test_too_few_scored_items_are_the_reason() -> None:
    assert judge(metrics(), Bounds(min_items=100)).passed
    (reason,) = judge(metrics(), Bounds(min_items=101)).reasons
    assert reason == (
        "demo_textvqa items: 100 scored, register.min_items needs at least 101; raise evaluate.limit, or lower the "
        "bound"
    )


def test_bound_low_checks_the_low_end_of_the_interval() -> None:
    bounds = Bounds(min_retention=95, floors={"demo_textvqa": 90}, bound="low")
    (reason,) = judge(metrics(), bounds).reasons
    assert reason == "demo_textvqa low: 86 %, register.floors.demo_textvqa needs at least 90 %"


def test_every_reason_is_given() -> None:
    assert len(judge(metrics(score=10, retention=10, lost=90), BOUNDS).reasons) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_flips": 101}, "register.max_flips: must be at most 100"),
        ({"floors": {"a": -1}}, "floors.a is -1"),
        ({"bound": "high"}, "bound"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        parse("register", values, Bounds)


@given(st.floats(0, 100), st.floats(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_better_numbers_never_turn_a_pass_into_a_failure(retention: float, more: float, flips: int, fewer: int) -> None:
    passed = judge(metrics(retention=retention, lost=flips, gained=0), BOUNDS).passed
    better = judge(metrics(retention=retention + more, lost=max(0, flips - fewer), gained=0), BOUNDS).passed
    assert better or not passed


# --- Champions ------------------------------------------------------------------------------------


def items(*right: int, tasks: tuple[str, ...] = ("a", "b")) -> pd.DataFrame:
    """Scores of fifty items of every benchmark, of which the first ``right`` are right."""
    rows = [
        {"task": task, "doc": str(doc), "score": float(doc < count)}
        for task, count in zip(tasks, right, strict=True)
        for doc in range(50)
    ]
    return pd.DataFrame(rows)


def contender(version: int, kl: float | None = 0.1, passed: bool = True, **more: str) -> Contender:
    variant, checkpoint = more.get("variant", f"v{version}"), more.get("checkpoint", f"c{version}")
    return Contender(version, variant, checkpoint, more.get("evaluation", "e"), passed, kl)


def always(value: float, low: float, high: float) -> Callable[[Contender, Contender], Difference]:
    return lambda challenger, champion: Difference(value, low, high)


BETTER, WORSE, EVEN = always(3, 1, 5), always(-3, -5, -1), always(0, -1, 1)


def unread(challenger: Contender, champion: Contender) -> Difference:
    raise AssertionError("compared what may not be compared")


def test_a_difference_is_the_mean_over_benchmarks_with_an_interval_around_it() -> None:
    found = paired_difference(items(50, 40), items(45, 40))
    assert found.value == pytest.approx(5.0)
    assert 0 < found.low < 5 < found.high
    none = paired_difference(items(50, 40), items(50, 40))
    assert (none.value, none.low, none.high) == (0, 0, 0)


def test_a_difference_needs_the_same_items() -> None:
    with pytest.raises(CannotCompare, match="100 and 99 items were scored, 99 of them in both"):
        paired_difference(items(50, 40), items(45, 40).iloc[1:])
    with pytest.raises(CannotCompare):
        paired_difference(items(50, 40), items(45, 40, tasks=("a", "c")))


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=4, max_size=40), st.randoms(use_true_random=False))
def test_swapping_the_versions_negates_the_difference(right: list[bool], random: Any) -> None:
    docs = [str(number) for number in range(len(right))]
    one = pd.DataFrame({"task": "a", "doc": docs, "score": np.array(right, float)})
    other = one.assign(score=[float(random.random() < 0.5) for _ in right])
    there, back = paired_difference(one, other), paired_difference(other, one)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))


@pytest.mark.parametrize(
    ("measure", "kl", "state"),
    [
        (BETTER, 0.9, "champion"),
        (WORSE, 0.01, "not_better"),
        (EVEN, 0.09, "champion"),
        (EVEN, 0.1, "not_better"),
        (EVEN, 0.2, "not_better"),
        (EVEN, None, "not_better"),
    ],
)
def test_better_by_score_then_by_kl(measure: Any, kl: float | None, state: str) -> None:
    assert challenge(contender(2, kl), contender(1, 0.1), measure).state == state


@pytest.mark.parametrize(("measure", "state"), [(EVEN, "champion"), (WORSE, "not_better")])
def test_a_later_checkpoint_of_a_variant_replaces_it_unless_it_is_worse(measure: Any, state: str) -> None:
    """The earlier version refers to a checkpoint that no longer exists."""
    old, new = contender(1, 0.1, variant="tlq-w3a16"), contender(2, 0.1, variant="tlq-w3a16")
    assert challenge(new, old, measure).state == state


@given(st.floats(-5, 5), st.floats(0, 5), st.none() | st.floats(0, 1), st.none() | st.floats(0, 1))
def test_two_versions_are_never_both_better_than_the_other(
    value: float, width: float, one: float | None, other: float | None
) -> None:
    there = challenge(contender(2, one), contender(1, other), always(value, value - width, value + width))
    back = challenge(contender(1, other), contender(2, one), always(-value, -value - width, -value + width))
    assert {there.state, back.state} != {"champion"}


def test_the_first_version_that_passes_is_champion() -> None:
    champion, outcomes = succession(None, [contender(1, passed=False), contender(2)], unread)
    assert champion == contender(2)
    assert {number: outcome.state for number, outcome in outcomes.items()} == {1: "failed", 2: "champion"}


def test_a_version_that_fails_never_becomes_champion() -> None:
    champion, outcomes = succession(contender(1), [contender(2, passed=False)], unread)
    assert champion == contender(1)
    assert outcomes[2].state == "failed"


def test_the_best_of_several_becomes_champion_and_the_others_get_reasons() -> None:
    skill = {1: 1, 2: 3, 3: 2}

    def by_skill(challenger: Contender, champion: Contender) -> Difference:
        gap = skill[challenger.version] - skill[champion.version]
        return Difference(gap, gap - 0.5, gap + 0.5)

    champion, outcomes = succession(contender(1), [contender(3), contender(2)], by_skill)
    assert champion == contender(2)
    assert outcomes[1] == Outcome("replaced", "by version 2: mean score +2.00 [+1.50, +2.50] against version 1")
    assert outcomes[3].state == "not_better"


def test_scores_on_other_items_are_not_compared() -> None:
    champion, outcomes = succession(contender(1), [contender(2, evaluation="other")], unread)
    assert champion == contender(1)
    assert outcomes[2].state == "not_compared"
    assert "was scored on other items" in outcomes[2].reason


def test_a_champion_scored_again_is_compared_on_the_new_items() -> None:
    new = contender(2, evaluation="other")
    again = contender(3, checkpoint="c1", evaluation="other")
    champion, outcomes = succession(contender(1), [new, again], WORSE)
    assert champion == again
    assert outcomes[2].state == "not_better"
    assert outcomes[1].state == "replaced"
    champion, outcomes = succession(contender(1), [new, again], BETTER)
    assert champion == new
    assert outcomes[3].state == "replaced"


def test_a_champion_that_fails_on_the_new_items_is_replaced() -> None:
    new = contender(2, evaluation="other")
    again = contender(3, checkpoint="c1", evaluation="other", passed=False)
    assert succession(contender(1), [new, again], unread)[0] == new
    kept, _ = succession(contender(1), [again], unread)
    assert kept is not None
    assert kept.version == 1


def test_unreadable_scores_are_not_compared() -> None:
    def missing(challenger: Contender, champion: Contender) -> Difference:
        raise CannotCompare("the item scores of version 1 cannot be read")

    champion, outcomes = succession(contender(1), [contender(2)], missing)
    assert champion == contender(1)
    assert outcomes[2].state == "not_compared"
    assert "cannot be read" in outcomes[2].reason
