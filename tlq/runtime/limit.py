"""A limit on the time of work that runs code of a checkpoint, such as its chat template."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class EndlessError(OSError):
    """Work was not finished in its time. Another try would not be either, unlike after a TimeoutError."""


@contextmanager
def time_limit(seconds: float, work: str) -> Iterator[None]:
    """Raise EndlessError, which names the ``work``, where the block is after ``seconds``.

    A timer of the process that runs meanwhile goes on afterwards. Signals reach the main thread alone, so other threads
    have no limit, and neither has a platform without interval timers (Windows).
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise EndlessError(f"{work} has not finished after {seconds:g} seconds")

    earlier = signal.signal(signal.SIGALRM, end)
    started = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
        if left:  # a timer that should have ended meanwhile ends at once
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-3), interval)
