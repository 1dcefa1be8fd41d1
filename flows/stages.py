"""Stages as Prefect tasks: each is one `dvc repro --single-item`, so that both doors leave the same dvc.lock."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from prefect import get_run_logger, task
from prefect.client.schemas.objects import State

from flows.progress import with_progress
from services.processes import OWNER, owner, stop, stop_stages, tree
from tasks.stages.command import TRY_AGAIN
from tlq.parallel import REDUCTION_CHUNKS

ROOT = Path(__file__).resolve().parent.parent

#: A stage is made with this; stages that run side by side wait while another one saves its result.
REPRO = (sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item")

#: Lines of DVC that say nothing about the work.
_NOISE = ("To track the changes", "git add", "To enable auto staging", "dvc config", "Use `dvc push`", "Updating lock")

_BAR = re.compile(r"\d+%\|")
_BAR_SECONDS = 10.0


class StageFailed(RuntimeError):
    """A stage ended with an error; the message holds its last lines."""


class StageUnavailable(StageFailed):
    """A stage ended because something outside (the hub, MLflow) did not answer; another try may work."""


def main(flow: Callable[[], str], description: str | None, where: str = "") -> None:
    """`python -m flows.<name>`: run a flow as params.yaml says, print its table and ``where`` to look further."""
    parser = ArgumentParser(
        prog=f"python -m flows.{flow.__name__}",
        description=f"{(description or '').strip()}\n\nWhat it does is said in params.yaml.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    try:
        table = flow()
    except StageFailed as error:
        sys.exit(f"\n{error}")
    sys.stdout.write("\n".join(["", table, "", *([where, ""] if where else [])]))


def may_pass(_task: Any, _run: Any, state: State) -> bool:
    """Only what another try can cure is tried again: a stage that computes fails the same way every time."""
    return isinstance(state.result(raise_on_failure=False), StageUnavailable)


@task(task_run_name="{stage}", retries=2, retry_delay_seconds=[10, 60], retry_condition_fn=may_pass)
def stage(stage: str, force: bool = False) -> None:
    """Reproduce one DVC stage, if it is stale or ``force`` is given, with its output in this task's log.

    Raises:
        StageFailed: the stage's command failed.
    """
    again = ["--force"] if force else []
    run_command([*REPRO, *again, stage], stage)


@task(task_run_name="check MLflow", retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=may_pass)
def check_tracking() -> None:
    """Fail before the long work, not after it, when MLflow cannot be reached.

    Raises:
        StageFailed: MLflow does not answer.
    """
    run_command([sys.executable, "-m", "tasks.stages.register", "--check"], "check MLflow")


def run_command(command: list[str], name: str, folder: Path = ROOT, tell: Callable[[str], None] | None = None) -> None:
    """Run a command in ``folder``, log its lines and ``tell`` them; stop it when this process is interrupted."""
    logger = get_run_logger()
    last: deque[str] = deque(maxlen=8)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        assert process.stdout is not None
        for text in worth_logging(with_progress(process.stdout, name)):
            last.append(text)
            logger.info(text)
            if tell is not None:
                tell(text)
    except BaseException:
        stop(tree(process.pid))  # DVC does not pass a signal on to the stage's command
        process.wait()
        raise
    if status := process.wait():
        raise _failure(status, last)(f"{name} failed: {' | '.join(last) or 'no output'}")


def _failure(status: int, lines: Iterable[str]) -> type[StageFailed]:
    """What kind of failure it was: DVC has a status of its own and tells the command's in its last line."""
    outside = status == TRY_AGAIN or any(line.endswith(f"exited with {TRY_AGAIN}") for line in lines)
    return StageUnavailable if outside else StageFailed


@contextmanager
def stopping_stages() -> Iterator[None]:
    """Stop stages that run in other threads when this flow is interrupted, cancelled or terminated.

    Threads never hear of signals, and Prefect waits for them: without this a stage would go on until it is done.
    """
    try:
        yield
    except Exception:
        raise
    except BaseException:
        stop_stages(owner())
        raise


def worth_logging(lines: Iterable[str], clock: Callable[[], float] = time.monotonic) -> Iterator[str]:
    """Lines for the log: DVC's advice is dropped, and progress bars show every ``_BAR_SECONDS`` only."""
    next_bar = clock() + _BAR_SECONDS
    for line in lines:
        text = line.strip()
        if not text or text.startswith(_NOISE):
            continue
        if _BAR.search(text):
            now = clock()
            if now < next_bar:
                continue
            next_bar = now + _BAR_SECONDS
        yield text


def stages_at_once() -> int:
    """How many variants are worked on side by side: ``TLQ_PARALLEL``, else 2 without a GPU and 1 with one.

    On a pool it is the workers that share them: stages only wait here, as many as could keep the largest pool busy.
    """
    if os.environ.get("TLQ_POOL") and "TLQ_PARALLEL" not in os.environ:
        return REDUCTION_CHUNKS
    return _shares()


def _shares() -> int:
    """How many processes that compute share the cores of this machine."""
    if "TLQ_PARALLEL" in os.environ:
        return max(1, int(os.environ["TLQ_PARALLEL"]))
    return 1 if torch.cuda.is_available() else 2


def _environment() -> dict[str, str]:
    """This process's environment with its Python first on the path (dvc.yaml says `python`) and its cores shared."""
    folder = str(Path(sys.executable).parent)
    threads = max(1, (os.cpu_count() or 1) // _shares())
    path = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "PATH": path, OWNER: owner()}
