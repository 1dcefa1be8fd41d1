"""The progress of a stage as a Prefect artifact, read off the progress bar that the stage shows on its output.

The bar is tqdm's, so what a terminal shows and what the Prefect UI shows is one thing: done and all, seconds, the time
left, and what the stage adds (the error of the last layer).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException

logger = logging.getLogger("tlq.flows")

_BAR = re.compile(
    r"^(?P<name>.*?):? +\d+%\|[^|]*\| *(?P<done>\d+)/(?P<total>\d+) "
    r"\[(?P<elapsed>[\d:]+)<(?P<left>[\d:?]+)(?:, *(?P<rest>.*))?\]$"
)
_LEAST_SECONDS = 2.0


@dataclass(frozen=True)
class Bar:
    """What a progress bar says.

    Attributes:
        name: what the bar is about.
        done, total: steps.
        elapsed, left: times as tqdm writes them.
        rest: rate and postfix, for instance `1.5s/layer, error=0.02`.
    """

    name: str
    done: int
    total: int
    elapsed: str
    left: str
    rest: str

    @classmethod
    def read(cls, line: str) -> Bar | None:
        """None if the line is no progress bar of a known length."""
        found = _BAR.match(line.strip())
        if found is None or not int(found["total"]):
            return None
        return cls(
            found["name"], int(found["done"]), int(found["total"]), found["elapsed"], found["left"], found["rest"] or ""
        )

    @property
    def percent(self) -> float:
        return 100 * self.done / self.total

    @property
    def text(self) -> str:
        """For people: `tlq w3a16: 3 of 28 done in 00:41, 05:40 left (13.6s/layer, error=0.0194)`."""
        return f"{self.name}: {self.done} of {self.total} done in {self.elapsed}, {self.left} left ({self.rest})"


def with_progress(lines: Iterable[str], stage: str, clock: Callable[[], float] = time.monotonic) -> Iterator[str]:
    """The lines as they are; the bars among them keep the progress artifact of this task run up to date.

    A step that takes seconds (a layer) is shown when it is done; quicker ones every ``_LEAST_SECONDS``, and the last.
    """
    artifact: UUID | None = None
    shown: tuple[str, int] | None = None
    due = clock()
    for line in lines:
        yield line
        bar = Bar.read(line)
        if bar is None or (bar.name, bar.done) == shown or (clock() < due and bar.done < bar.total):
            continue
        artifact = _show(bar, stage, artifact)
        shown, due = (bar.name, bar.done), clock() + _LEAST_SECONDS


def _show(bar: Bar, stage: str, artifact: UUID | None) -> UUID | None:
    """Progress is told, not needed: a server that is away for a while must not end hours of work."""
    try:
        if artifact is None:
            made = create_progress_artifact(bar.percent, key=_key(stage), description=bar.text)
        else:
            made = update_progress_artifact(artifact, bar.percent, description=bar.text)
        return cast(UUID | None, made)  # a coroutine only where an event loop runs
    except (PrefectException, httpx.HTTPError) as error:
        logger.warning("progress of %s could not be shown: %s", stage, error)
        return artifact


def _key(stage: str) -> str:
    """A key as Prefect allows them: lowercase letters, digits and dashes."""
    return f"progress-{re.sub('[^a-z0-9]+', '-', stage.lower()).strip('-')}"
