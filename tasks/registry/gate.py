"""The gate: decide which registered versions pass, and which one is the champion of its scheme. Pure functions.

A version passes if the loss from quantization stays within the bounds of section `register` of params.yaml. A version
that passes replaces the champion if its mean score on the same items is higher. If the paired interval of the
difference contains 0, the lower KL divergence decides.
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
from tasks.config.sections import Bounds

RESAMPLES = 2000


@dataclass(frozen=True)
class Verdict:
    """The reasons why a version fails the gate; a version without reasons passes."""

    reasons: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.reasons


def judge(metrics: Metrics, bounds: Bounds) -> Verdict:
    """Check metrics against the bounds. A missing number that a bound needs is a reason to fail."""
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
    if bounds.min_items is not None:
        yield from _too_few_items(metrics, bounds.min_items)


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


def _too_few_items(metrics: Metrics, least: int) -> Iterator[str]:
    for name, entry in metrics.benchmarks.items():
        if entry.n < least:
            yield (
                f"{name} items: {entry.n} scored, register.min_items needs at least {least}; raise evaluate.limit, or "
                "lower the bound"
            )


# --- Champions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contender:
    """The properties of a registered version that the choice of a champion uses.

    Attributes:
        version: version number.
        variant: name of the variant; a later checkpoint of that name replaces this one in models/<variant>.
        checkpoint: digest of the checkpoint.
        evaluation: digest of the evaluation: items, data, and parameters that scores depend on.
        passed: whether the version passed the gate.
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
    """Two versions cannot be compared; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """The result of a challenge.

    Attributes:
        state: `champion`; `replaced` as champion by a later version; `not_better`; `failed` the gate; `not_compared`,
            which leaves the version undecided.
        reason: the reason in words.
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
        CannotCompare: the two are not scored on the same items.
    """
    both = challenger.merge(champion, on=["task", "doc"], suffixes=("", "_champion"))
    if both.empty or not len(both) == len(challenger) == len(champion):
        raise CannotCompare(
            f"{len(challenger)} and {len(champion)} items were scored, {len(both)} of them in both; all must be"
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
    """Whether ``challenger``, which passed the gate, replaces ``champion``, which was scored in the same evaluation."""
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
        return Outcome("champion", f"{against}: the interval contains 0; {kl}")
    if challenger.variant == champion.variant and challenger.version > champion.version:
        return Outcome(
            "champion", f"{against}: the interval contains 0; this is a later checkpoint of the same variant"
        )
    return Outcome("not_better", f"{against}: the interval contains 0; {kl}")


def succession(
    champion: Contender | None, challengers: Sequence[Contender], measure: Measure
) -> tuple[Contender | None, dict[int, Outcome]]:
    """Compare the challengers with the champion one after another, in order of version.

    Scores from different evaluations are never compared. If the evaluation changed and the champion's checkpoint,
    scored in the new evaluation, is among the challengers, that version becomes champion first. Without such a version
    the other challengers stay undecided.

    Returns:
        The final champion, and the outcome of every challenger and of a replaced champion by version.
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
            champion = replace(champion, passed=False)  # its checkpoint fails the gate in the new evaluation
    return champion, outcomes


def _turn(challenger: Contender, champion: Contender | None, measure: Measure) -> Outcome:
    if not challenger.passed:
        return Outcome("failed", "does not pass the gate")
    if champion is None:
        return Outcome("champion", "the first version that passes the gate")
    if challenger.version == champion.version:
        return Outcome("champion", "already the champion")
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
