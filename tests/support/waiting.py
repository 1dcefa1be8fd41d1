"""Clocks and waiting, for tests of what happens over time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition holds, for instance until the Prefect server has recorded the state of a task."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.2)
