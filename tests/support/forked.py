"""Processes that are forked from the test's, after its imports, so that they start at once and together."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

FORK = multiprocessing.get_context("fork")


class Forked(FORK.Process):  # type: ignore[name-defined, misc]
    """A forked process that ends when its function returns, with status 0 or its own, or 1 and a traceback.

    It runs no exit handler of the test's process: those of other tests' threads do not exist here and raise.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        super().__init__()
        self._function = function
        self._arguments = arguments

    def run(self) -> None:
        status = 1
        try:
            self._function(*self._arguments)
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        finally:
            if sys.exc_info()[0]:
                traceback.print_exc()
                sys.stderr.flush()
            os._exit(status)


def run_together(function: Callable[..., None], *each: tuple[Any, ...], seconds: float = 180) -> list[int | None]:
    """Call a function with each tuple of arguments in a process of its own; the exit statuses."""
    processes = [Forked(function, *arguments) for arguments in each]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    return [process.exitcode for process in processes]
