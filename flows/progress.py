"""Show the progress of a stage as a Prefect artifact, read from the tqdm bars in the stage's output.

A stage's environment makes tqdm write each bar as one line of a fixed form (``BAR_ENVIRONMENT``), so that a bar is
parsed exactly and is readable in a log. The Prefect UI shows the same as the terminal: steps done, total, elapsed and
remaining time, and the values that the stage adds (the error of the last layer). While the output pauses, the times go
on.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Thread
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

logger = logging.getLogger("tlq.flows")

MARK = "progress: "

#: The environment of a stage: the form of tqdm's bars. The line ends, because a reader sees only finished lines.
BAR_ENVIRONMENT = {
    "TQDM_BAR_FORMAT": MARK
    + "{desc}: {n_fmt} of {total_fmt} done in {elapsed}, {remaining} left ({rate_fmt}{postfix})\n"
}

#: A pause in a stage's output that lasts this long is reported, and again after each further one.
PAUSE_SECONDS = 15.0

_BAR = re.compile(
    rf"^{MARK}(?:(?P<name>.*): )?(?P<done>\d+) of (?P<total>\d+) done in (?P<elapsed>[\d:]+), "
    r"(?P<left>[\d:]+|\?) left \((?P<rest>.*)\)$"
)
_LEAST_SECONDS = 2.0


@dataclass(frozen=True)
class Bar:
    """The content of a progress bar.

    Attributes:
        name: description of the work.
        done, total: numbers of steps.
        elapsed, left: seconds; ``left`` is None before the first step is done.
        rest: rate and postfix, for instance `1.5s/layer, error=0.02`.
    """

    name: str
    done: int
    total: int
    elapsed: float
    left: float | None
    rest: str

    @classmethod
    def read(cls, line: str) -> Bar | None:
        """Parse a line; None if the line is not a progress bar with a total."""
        found = _BAR.match(line.strip())
        if found is None or not int(found["total"]):
            return None
        left = None if found["left"] == "?" else _seconds(found["left"])
        name, done, total = found["name"] or "", int(found["done"]), int(found["total"])
        return cls(name, done, total, _seconds(found["elapsed"]), left, found["rest"])

    @property
    def percent(self) -> float:
        return 100 * self.done / self.total

    @property
    def text(self) -> str:
        """Readable form: `tlq w3a16: 3 of 28 done in 00:41, 05:40 left (13.6s/layer, error=0.0194)`."""
        left = "time left not known yet" if self.left is None else f"{clock_time(self.left)} left"
        name = f"{self.name}: " if self.name else ""
        return f"{name}{self.done} of {self.total} done in {clock_time(self.elapsed)}, {left} ({self.rest})"

    def after(self, seconds: float) -> Bar:
        """The bar ``seconds`` later, if no step was finished in the meantime."""
        left = None if self.left is None else max(self.left - seconds, 0)
        return replace(self, elapsed=self.elapsed + seconds, left=left)


def _seconds(text: str) -> float:
    """Seconds of a time that tqdm has written, `01:10` or `2:01:10`."""
    return sum(int(part) * 60**power for power, part in enumerate(reversed(text.split(":"))))


def clock_time(seconds: float) -> str:
    """Seconds as `01:10` or `2:01:10`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes:02}:{rest:02}"


def lines_and_pauses(stream: Iterable[str], seconds: float = PAUSE_SECONDS) -> Iterator[str | None]:
    """Yield the lines of a stream as they arrive, and None whenever ``seconds`` have passed without one."""
    queue: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        try:
            for line in stream:
                queue.put(line)
        finally:
            queue.put(None)

    Thread(target=read, daemon=True, name="output of a stage").start()
    while True:
        try:
            line = queue.get(timeout=seconds)
        except Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def with_progress(
    lines: Iterable[str | None], stage: str, clock: Callable[[], float] = time.monotonic
) -> Iterator[str | None]:
    """Pass the lines and pauses through, and keep the progress artifact of this task run up to date.

    The artifact shows the last bar. Updates are at least ``_LEAST_SECONDS`` apart, except the last one of a bar; in a
    pause the bar's times go on.
    """
    artifact = ProgressArtifact(stage)
    bar: Bar | None = None
    seen = due = clock()
    for line in lines:
        yield line
        now = clock()
        if line is None:
            if bar is not None and bar.done < bar.total:
                later = bar.after(now - seen)
                artifact.show(later.percent, later.text)
            continue
        read = Bar.read(line)
        if read is None:
            continue
        repeated = bar is not None and (bar.name, bar.done) == (read.name, read.done)
        bar, seen = read, now
        if not repeated and (now >= due or bar.done == bar.total):
            artifact.show(bar.percent, bar.text)
            due = now + _LEAST_SECONDS


class ProgressArtifact:
    """A progress artifact of the current run, created when it is first shown.

    An unreachable server only causes a warning, so that the work goes on.
    """

    def __init__(self, name: str) -> None:
        """``name``: a stage, or empty for the whole run."""
        self._name = name
        self._id: UUID | None = None

    @property
    def key(self) -> str:
        """Prefect allows lowercase letters, digits and dashes."""
        return f"progress-{re.sub('[^a-z0-9]+', '-', self._name.lower())}".strip("-")

    def show(self, percent: float, text: str) -> None:
        try:
            if self._id is None:
                made = create_progress_artifact(percent, key=self.key, description=text)
                self._id = cast(UUID | None, made)  # a coroutine only inside an event loop
            else:
                update_progress_artifact(self._id, percent, description=text)
        except (PrefectException, httpx.HTTPError) as error:
            logger.warning("progress of %s could not be shown: %s", self._name or "the run", error)
