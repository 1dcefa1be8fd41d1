"""Shared parts of the stages' command lines: logging, one-line errors, the device."""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from tasks.cluster.launch import Interrupted, failed_already, is_rank, report_failure
from tasks.config.environment import value
from tasks.errors import exit_status, one_line
from tlq.runtime.device import device_named
from tlq.runtime.log import log_level

logger = logging.getLogger("tlq")


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
        message = one_line(error)
        if message is None:
            raise
        logger.debug("traceback", exc_info=True)
        if report_failure(message):
            return  # a rank: the stage's own process reports the error once
        logger.error("%s", message)
        sys.exit(exit_status(error))


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
