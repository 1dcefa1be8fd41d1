"""The gate: which registered versions may be used, and which one is the champion of its scheme. Pure functions.

A version passes if what quantization cost stays within the bounds of section `register` of params.yaml. A version that
passes becomes champion in place of a worse one: better by mean score on the same items, and where the paired interval
of the difference does not tell the two apart, better by KL divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from benchmarks.compare import INTERVAL, resampled_means
from benchmarks.results import Comparison, Metrics
from tasks.config.params import Bounds

RESAMPLES = 2000


@dataclass(frozen=True)
class Verdict:
    """Why a version does not pass; it passes if there is no reason against it."""

    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.reasons


def judge(metrics: Metrics, bounds: Bounds) -> Verdict:
    """Check metrics against the bounds. A number that a bound needs and that is missing is a reason."""
    return Verdict(tuple(_reasons(metrics, bounds)))


def _reasons(metrics: Metrics, bounds: Bounds) -> Iterator[str]:
    mean, low = metrics.mean, bounds.bound == "low"
    if not math.isfinite(mean.score):
        yield f"mean score: is {mean.score}; evaluate the variant again"
    if bounds.min_retention is not None:
        retention = ("retention_low", mean.retention_low) if low else ("retention", mean.retention)
        yield from _too_low("mean", *retention, bounds.min_retention, "register.min_retention")
    if bounds.max_flips is not None:
        yield from _too_many_flips(mean, bounds.max_flips)
    entries = dict(metrics.entries)
    for name, floor in bounds.floors.items():
        if name in entries:
            score = ("low", entries[name].low) if low else ("score", entries[name].score)
            yield from _too_low(name, *score, floor, f"register.floors.{name}")
        else:
            yield f"{name}: not scored; add it to evaluate.benchmarks, or remove register.floors.{name}"


def _too_low(name: str, key: str, value: float | None, least: float, bound: str) -> Iterator[str]:
    if value is None or not math.isfinite(value):
        state = "missing" if value is None else f"is {value}"
        yield f"{name} {key}: {state}; {bound} needs at least {least:g} %"
    elif value < least:
        yield f"{name} {key}: {value:g} %, {bound} needs at least {least:g} %"


def _too_many_flips(mean: Comparison, most: float) -> Iterator[str]:
    if mean.flips is None:
        yield f"mean flips: not measured; register.max_flips allows at most {most:g} %"
    elif mean.flips > most:
        yield (
            f"mean flips: {mean.flips:.2f} % ({mean.lost:g} lost and {mean.gained:g} gained of {mean.pairs:g} items), "
            f"register.max_flips allows at most {most:g} %"
        )


# --- Champions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """A registered version as the choice of a champion sees it.

    Attributes:
        version: its number.
        variant: what it was made as; the checkpoint is in models/<variant>, and the next one of that name in its place.
        checkpoint: digest of its checkpoint.
        evaluation: digest of what it was asked: items, data, and parameters that scores depend on.
        passed: whether it passed the gate.
        kl: mean KL divergence from full precision, nats per answer token.
    """

    version: int
    variant: str
    checkpoint: str
    evaluation: str
    passed: bool
    kl: float | None = None


@dataclass(frozen=True)
class Difference:
    """Challenger's mean score minus champion's on the same items, in percent, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


class CannotCompare(ValueError):
    """Two versions have no common measure; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What became of a challenger.

    Attributes:
        state: `champion`, `replaced` as champion by a later one, `not_better`, `failed` the gate, or `not_compared` and
            so still to be decided.
        reason: why, in words.
    """

    state: Literal["champion", "replaced", "not_better", "failed", "not_compared"]
    reason: str


#: Measures the difference between a challenger and the champion; raises CannotCompare.
Measure = Callable[[Contender, Contender], Difference]


def paired_difference(challenger: pd.DataFrame, champion: pd.DataFrame, seed: int = 0) -> Difference:
    """Mean over benchmarks of the difference in score; the bootstrap resamples items in pairs, within benchmarks.

    Args:
        challenger, champion: records with columns task, doc and score in [0, 1].

    Raises:
        CannotCompare: they are not scored on the same items.
    """
    both = challenger.merge(champion, on=["task", "doc"], suffixes=("", "_champion"))
    if both.empty or not len(both) == len(challenger) == len(champion):
        raise CannotCompare(
            f"{len(challenger)} and {len(champion)} items were scored, {len(both)} of them the same; all must be"
        )
    rng = np.random.default_rng(seed)
    values, means = [], []
    for _, rows in both.sort_values(["task", "doc"]).groupby("task"):
        difference = 100 * (rows["score"] - rows["score_champion"]).to_numpy(float)
        values.append(difference.mean())
        means.append(resampled_means(difference[:, None], RESAMPLES, rng)[:, 0])
    low, high = np.percentile(np.mean(means, axis=0), INTERVAL)
    return Difference(float(np.mean(values)), float(low), float(high))


def challenge(challenger: Contender, champion: Contender, measure: Measure) -> Outcome:
    """Whether ``challenger``, which passed the gate, takes the place of ``champion``, which was asked the same."""
    if not champion.passed:
        return Outcome("champion", f"version {champion.version}, the champion before it, does not pass the gate")
    try:
        difference = measure(challenger, champion)
    except CannotCompare as error:
        return Outcome("not_compared", f"cannot be compared with version {champion.version}, the champion: {error}")
    against = f"mean score {difference} against version {champion.version}"
    if difference.low > 0:
        return Outcome("champion", against)
    if difference.high < 0:
        return Outcome("not_better", against)
    known = challenger.kl is not None and champion.kl is not None
    kl = f"KL {_nats(challenger.kl)} against {_nats(champion.kl)}"
    if known and challenger.kl < champion.kl:  # type: ignore[operator]
        return Outcome("champion", f"{against} does not tell them apart; {kl}")
    if challenger.variant == champion.variant and challenger.version > champion.version:
        return Outcome(
            "champion", f"{against} does not tell them apart; it is the same variant, made again in its place"
        )
    return Outcome("not_better", f"{against} does not tell them apart; {kl}")


def succession(
    champion: Contender | None, challengers: Sequence[Contender], measure: Measure
) -> tuple[Contender | None, dict[int, Outcome]]:
    """The champion after every challenger had its turn, in order of version, and what became of each, and of it.

    Scores on other items are never compared. If the evaluation changed, the champion is first replaced by
    its own checkpoint scored in the new evaluation, if that is among the challengers; without it the challenger stays
    undecided.
    """
    outcomes: dict[int, Outcome] = {}
    again = [each for each in challengers if champion is not None and each.checkpoint == champion.checkpoint]
    others = [each for each in challengers if each not in again]
    for each in [*sorted(again, key=_version), *sorted(others, key=_version)]:
        outcome = _turn(each, champion, measure)
        outcomes[each.version] = outcome
        if outcome.state == "champion":
            if champion is not None and champion.version != each.version:
                outcomes[champion.version] = Outcome("replaced", f"by version {each.version}: {outcome.reason}")
            champion = each
        elif outcome.state == "failed" and champion is not None and each.checkpoint == champion.checkpoint:
            champion = replace(champion, passed=False)  # what it is asked now, it does not pass
    return champion, outcomes


def _turn(challenger: Contender, champion: Contender | None, measure: Measure) -> Outcome:
    if not challenger.passed:
        return Outcome("failed", "it does not pass the gate")
    if champion is None:
        return Outcome("champion", "the first version that passes the gate")
    if challenger.version == champion.version:
        return Outcome("champion", "it is the champion already")
    if challenger.evaluation == champion.evaluation or not champion.passed:
        return challenge(challenger, champion, measure)
    if challenger.checkpoint == champion.checkpoint:
        return Outcome(
            "champion", f"the checkpoint of version {champion.version}, the champion before it, scored again"
        )
    return Outcome(
        "not_compared",
        f"version {champion.version}, the champion, was scored on other items or with other parameters; score its "
        "variant again and register it, or move the alias by hand",
    )


def _version(contender: Contender) -> int:
    return contender.version


def _nats(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
