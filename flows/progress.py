"""Show the progress of a stage as a Prefect artifact, parsed from the tqdm bar in the stage's output.

The Prefect UI therefore shows the same as a terminal: steps done, total, elapsed and remaining time, and the values
that the stage adds (the error of the last layer).
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
    """The content of a progress bar.

    Attributes:
        name: description of the work.
        done, total: numbers of steps.
        elapsed, left: times in tqdm's format.
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
        """Parse a line; None if the line is not a progress bar with a total."""
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
        """Readable form: `tlq w3a16: 3 of 28 done in 00:41, 05:40 left (13.6s/layer, error=0.0194)`."""
        return f"{self.name}: {self.done} of {self.total} done in {self.elapsed}, {self.left} left ({self.rest})"


def with_progress(lines: Iterable[str], stage: str, clock: Callable[[], float] = time.monotonic) -> Iterator[str]:
    """Pass the lines through, and update the progress artifact of this task run from the bars among them.

    Updates are at least ``_LEAST_SECONDS`` apart, except the last one of a bar.
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
    """Create or update the artifact. An unreachable server only causes a warning, so that the work goes on."""
    try:
        if artifact is None:
            made = create_progress_artifact(bar.percent, key=_key(stage), description=bar.text)
        else:
            made = update_progress_artifact(artifact, bar.percent, description=bar.text)
        return cast(UUID | None, made)  # a coroutine only inside an event loop
    except (PrefectException, httpx.HTTPError) as error:
        logger.warning("progress of %s could not be shown: %s", stage, error)
        return artifact


def _key(stage: str) -> str:
    """Artifact key of a stage; Prefect allows lowercase letters, digits and dashes."""
    return f"progress-{re.sub('[^a-z0-9]+', '-', stage.lower()).strip('-')}"
