"""The command that every rank runs, and the start of a rank, which ends with the process that started it.

    python -m tasks.cluster.rank tasks.stages.calibrate --recipe tlq ...

A rank also ends while it imports: the imports of a stage take seconds, in which the stage's own handling of signals is
not there yet.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class RankCommand:
    """The command that every rank runs: a module of the project and the words of its command line."""

    module: str
    arguments: tuple[str, ...] = ()

    @classmethod
    def of_options(cls, module: str, options: Mapping[str, str]) -> RankCommand:
        """The command with an option for every entry: ``{"recipe": "tlq"}`` gives ``--recipe tlq``."""
        return cls(module, tuple(word for name, value in options.items() for word in (f"--{name}", value)))


def die_with_parent() -> None:
    """End this process when its parent process has ended, because no other process would stop it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()


@contextmanager
def shielded_starts() -> Iterator[None]:
    """Start processes from this thread that take no SIGINT before ``main``, where Python would print a traceback.

    The block's own process still takes it: another thread receives the signal for the main one.
    """
    ended = threading.Event()
    threading.Thread(target=ended.wait, daemon=True, name="receiver of signals").start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ended.set()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would print a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # ``shielded_starts`` has blocked it
    die_with_parent()
    del sys.argv[0]  # the module finds its own name there
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
