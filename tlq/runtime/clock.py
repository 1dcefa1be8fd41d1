"""Seconds by phase of the work, and seconds in words."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds spent in each phase. Phases may nest; the time of an inner phase does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block as phase ``name``."""
        started = _now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = _now() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken = {name: round(seconds, 4) for name, seconds in self.seconds.items()}
        self.seconds.clear()
        return taken


def in_words(seconds: float) -> str:
    """`40 s`, `12 min` or `2 h 5 min`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
