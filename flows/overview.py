"""Progress of a whole flow run: which of its stages is at work, and how much time is left for all of them.

The time of a stage is the one that the same stage took last on this Prefect server, corrected by the stages of its kind
that have finished in this run; without an earlier run, it is the mean of its kind in this run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, RLock

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import TaskRunFilter
from prefect.client.schemas.sorting import TaskRunSort
from prefect.exceptions import PrefectException

from flows.progress import PAUSE_SECONDS, ProgressArtifact
from tlq.runtime.clock import in_words

logger = logging.getLogger("tlq.flows")

#: Kinds of stages that may run next to each other.
_CONCURRENT = ("calibrate", "evaluate")

#: At most so many kinds of stages are named where the time left is not known.
_NAMED = 3
_UNKNOWN = "time left not known yet"

#: The overview of the flow run that this code runs for; tasks inherit it from their flow.
_CURRENT: ContextVar[Overview | None] = ContextVar("overview", default=None)


class Overview:
    """The stages of a flow run. Its methods may be called from several threads.

    Attributes:
        stopping: set when the run is being stopped, so that its stages end as cancelled.
    """

    def __init__(
        self,
        stages: Sequence[str],
        at_once: int = 1,
        earlier: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        stages: all stages of the run.
        at_once: number of variants that run concurrently.
        earlier: seconds that stages took in earlier runs.
        """
        self.stopping = Event()
        self._stages = tuple(dict.fromkeys(stages))
        self._at_once = at_once
        self._earlier = dict(earlier or {})
        self._clock = clock
        self._began: dict[str, float] = {}
        self._ended: set[str] = set()
        self._took: dict[str, float] = {}
        self._artifact = ProgressArtifact("")
        self._due = clock()
        self._lock = RLock()

    def begin(self, stage: str) -> str:
        """Note that a stage begins; returns its line for the log: `stage 7 of 20 calibrate@tlq-w3a16, ...`."""
        with self._lock:
            self._began[stage] = self._clock()  # a stage that is retried keeps its number
            self._show()
            return self._numbered(stage) + self._left(", ")

    def end(self, stage: str, result: str, ran: bool = True) -> str:
        """Note that a stage has ended; returns its line for the log.

        Args:
            result: for the line; empty for the stage's duration.
            ran: whether its command ran, so that its duration says something about stages of its kind.
        """
        with self._lock:
            seconds = self._clock() - self._began[stage]
            self._ended.add(stage)
            if ran:
                self._took[stage] = seconds
            self._show()
            return f"{self._numbered(stage)}: {result or f'done in {in_words(seconds)}'}{self._left('; ')}"

    def beat(self) -> None:
        """Show the elapsed time, unless it was shown less than ``PAUSE_SECONDS`` ago."""
        with self._lock:
            if self._clock() >= self._due:
                self._show()

    def _left(self, separator: str) -> str:
        """The time left for a line of the log: without the reason where it is not sure, nothing if it is not known."""
        left = self.time_left().partition(" (")[0]
        return "" if left == _UNKNOWN else separator + left

    def _numbered(self, stage: str) -> str:
        return f"stage {list(self._began).index(stage) + 1} of {len(self._stages)} {stage}"

    def _show(self) -> None:
        self._due = self._clock() + PAUSE_SECONDS
        self._artifact.show(100 * len(self._ended) / max(1, len(self._stages)), self.text())

    def text(self) -> str:
        """`6 of 20 stages done; calibrate@tlq-w3a16 is running for 3 min; about 12 min left`."""
        now = self._clock()
        at_work = [
            f"{stage} is running for {in_words(now - began)}"
            for stage, began in self._began.items()
            if stage not in self._ended
        ]
        return "; ".join([f"{len(self._ended)} of {len(self._stages)} stages done", *at_work, self.time_left()])

    def time_left(self) -> str:
        """The time left for the whole run: `about 12 min left`.

        It is `up to` while every stage so far was skipped, because the others may be too, and `more than` while there
        are kinds of stages about which nothing is known.
        """
        times = {stage: self._seconds_left(stage) for stage in self._stages if stage not in self._ended}
        if not times:
            return "nothing left"
        known = {stage: seconds for stage, seconds in times.items() if seconds is not None}
        concurrent = [seconds for stage, seconds in known.items() if _kind(stage) in _CONCURRENT]
        alone = sum(seconds for stage, seconds in known.items() if _kind(stage) not in _CONCURRENT)
        left = in_words(alone + max([sum(concurrent) / self._at_once, *concurrent]))
        unknown = list(dict.fromkeys(_kind(stage) for stage in times if stage not in known))
        skipped = bool(self._ended) and not self._took
        if not unknown:
            return f"{'up to' if skipped else 'about'} {left} left"
        more = [f"{len(unknown) - _NAMED} more"] if len(unknown) > _NAMED else []
        names = " or ".join([*unknown[:_NAMED], *more])
        begin = f"more than {left} left" if known and not skipped else _UNKNOWN
        return f"{begin} (no finished {names} to go by)"

    def _seconds_left(self, stage: str) -> float | None:
        """Seconds that a stage still needs; None if nothing is known about it."""
        estimate = self._estimate(stage)
        if estimate is None or stage not in self._began:
            return estimate
        return max(estimate - (self._clock() - self._began[stage]), 0)

    def _estimate(self, stage: str) -> float | None:
        alike = {name: seconds for name, seconds in self._took.items() if _kind(name) == _kind(stage)}
        if stage in self._earlier:
            then = sum(self._earlier.get(name, 0) for name in alike)
            now = sum(seconds for name, seconds in alike.items() if name in self._earlier)
            return self._earlier[stage] * (now / then if then else 1)
        return sum(alike.values()) / len(alike) if alike else None


def _kind(stage: str) -> str:
    """`calibrate` of `calibrate@tlq-w3a16`; `baseline` evaluates the full-precision model on the same items."""
    kind = stage.partition("@")[0]
    return "evaluate" if kind == "baseline" else kind


@contextmanager
def followed(overview: Overview) -> Iterator[None]:
    """Make ``overview`` the current one for the stages that begin inside the block, and show it."""
    token = _CURRENT.set(overview)
    try:
        overview.beat()
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Overview | None:
    """The overview of this flow run; None outside ``followed``, for instance in a run of flow `pool-worker`."""
    return _CURRENT.get()


def earlier_durations(stages: Sequence[str]) -> dict[str, float]:
    """Seconds that each stage took when it last ran on this Prefect server. Skipped stages do not count."""
    condition = {"name": {"any_": list(stages)}, "state": {"name": {"any_": ["Completed"]}}}
    try:
        with get_client(sync_client=True) as client:
            runs = client.read_task_runs(
                task_run_filter=TaskRunFilter.model_validate(condition), sort=TaskRunSort.END_TIME_DESC, limit=200
            )
    except (PrefectException, httpx.HTTPError) as error:
        logger.warning("durations of earlier runs cannot be read, so the time left may be unknown: %s", error)
        return {}
    return {run.name: run.total_run_time.total_seconds() for run in reversed(runs)}
