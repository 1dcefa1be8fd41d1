"""Shared parts of the stages' command lines: logging, one-line errors, the device."""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from tasks.cluster.launch import Interrupted, failed_already, is_rank, report_failure
from tasks.config.environment import value
from tlq.runtime.device import device_named
from tlq.runtime.files import FREE_SOME, is_full
from tlq.runtime.log import log_level

logger = logging.getLogger("tlq")

#: Errors of input or environment, reported in one line; any other error is a defect and keeps its traceback.
EXPECTED = (ValueError, OSError, MemoryError, FloatingPointError)

#: Exit status of a stage that failed because a server did not answer (EX_TEMPFAIL of sysexits.h).
TRY_AGAIN = 75

_BUSY = (429, 500, 502, 503, 504)  # HTTP statuses of a server that may answer later


def command_line(
    main: Callable[..., None], description: str | None, add_options: Callable[[ArgumentParser], None] | None = None
) -> None:
    """Parse the command line once, then ``run`` the stage with its options as keyword arguments.

    Args:
        description: the stage's docstring, which `--help` prints.
        add_options: adds the stage's options to the parser; None for a stage without options.
    """
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    if add_options is not None:
        add_options(parser)
    options = vars(parser.parse_args())
    run(lambda: main(**options))


def run(main: Callable[[], None]) -> None:
    """Run a stage: log to stderr, turn an expected error into one line and exit status 1, or ``TRY_AGAIN``.

    ``TLQ_LOG=debug`` shows more, including tracebacks of expected errors. SIGTERM ends a stage as Ctrl-C does, so that
    temporary files are removed. An interrupted library may raise another error than KeyboardInterrupt, so any error
    after a signal counts as an interruption.
    """
    logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        logging.getLogger().setLevel(log_level())
    except ValueError as error:
        logger.error("%s", error)
        sys.exit(1)
    quiet_libraries()
    if failed_already():
        return
    try:
        with _interruptions() as interruptions:
            _run(main, interruptions)
    except KeyboardInterrupt as error:
        if not is_rank():  # ranks are also interrupted when their group forms again
            logger.error("interrupted; run the same command again to continue")
        number = error.args[0] if isinstance(error, Interrupted) else signal.SIGINT
        sys.exit(128 + number)  # as a shell reports it: 130 for Ctrl-C, 143 for SIGTERM


@contextmanager
def _interruptions() -> Iterator[list[int]]:
    """Raise Interrupted on SIGTERM and, unless this process ignores it, SIGINT; yields the signals received."""
    received: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise Interrupted(number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if handlers[signal.SIGINT] is signal.SIG_IGN:
        del handlers[signal.SIGINT]
    for number in handlers:
        signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _run(main: Callable[[], None], interruptions: list[int]) -> None:
    try:
        main()
    except Exception as error:
        if interruptions:
            raise Interrupted(interruptions[0]) from error
        full = is_full(error)
        if not isinstance(error, EXPECTED) and not full:
            raise
        logger.debug("traceback", exc_info=True)
        message = " ".join(str(error).split())
        if full and FREE_SOME not in message:  # a library that writes a file of its own
            message = f"a disk is full ({message}), that of {Path.cwd()} or of temporary files; {FREE_SOME}"
        if report_failure(message):
            return  # a rank: the stage's own process reports the error once
        logger.error("%s", message)
        sys.exit(TRY_AGAIN if is_transient(error) else 1)


def is_transient(error: BaseException | None) -> bool:
    """Whether ``error`` or one of its causes is that a server (the hub, MLflow) did not answer: a retry may succeed."""
    import httpx
    import requests

    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError, httpx.TransportError)):
            return True
        if isinstance(error, (requests.ConnectionError, requests.Timeout)):
            return True
        if getattr(getattr(error, "response", None), "status_code", None) in _BUSY:
            return True
        error = error.__cause__ or error.__context__
    return False


def quiet_libraries() -> None:
    """Keep stage logs readable: no progress bars and load reports from libraries below warnings.

    lm-eval warns whenever a sub-score covers fewer items than its benchmark, which is normal here.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("httpx", "fsspec", "datasets", "compressed_tensors"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # of a damaged table, which is raised too
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # a list of fonts that are gone, 22 lines long


def device() -> torch.device:
    """The compute device: ``TLQ_DEVICE``, else the first GPU, else the CPU. It does not change what is computed.

    Raises:
        ValueError: this machine has no such device.
    """
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = value("TLQ_DEVICE") or (own if torch.cuda.is_available() else "cpu")
    found = device_named(name, "TLQ_DEVICE")
    if found.type == "cuda":  # where torch measures memory, and Triton launches
        torch.cuda.set_device(found)
    return found
