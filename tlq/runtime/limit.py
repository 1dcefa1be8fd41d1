"""A limit on the time of work that runs code of a checkpoint, such as its chat template."""

from __future__ import annotations

import ctypes
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

    It is raised between two steps of Python: a single call of compiled code ends first. Works in every thread; in the
    main thread a timer of the process that runs meanwhile goes on afterwards.
    """
    message = f"{work} has not finished after {seconds:g} seconds"
    main = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    with _by_signal(seconds, message) if main else _by_thread(seconds, message):
        yield


@contextmanager
def _by_signal(seconds: float, message: str) -> Iterator[None]:
    """The limit of the main thread, which alone receives signals."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise EndlessError(message)

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


@contextmanager
def _by_thread(seconds: float, message: str) -> Iterator[None]:
    """The limit of another thread, a server's for instance: a timer's thread raises the error in it."""
    thread, lock = threading.get_ident(), threading.Lock()
    ended = raised = False

    def end() -> None:
        nonlocal raised
        with lock:
            if not ended:
                raised = True
                _raise_in(thread, EndlessError)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        try:
            yield
        finally:
            timer.cancel()
            with lock:
                ended = True
            _raise_in(thread, None)  # nothing is raised after the block
    except EndlessError as error:
        raise EndlessError(message if raised else str(error)) from None


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an error in a thread at its next step of Python; None takes back one that it has not met yet."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error) if error else None)
