"""Stages as Prefect tasks: each is one `dvc repro --single-item`, so that both doors leave the same dvc.lock."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from prefect import get_run_logger, task

from flows.progress import with_progress

ROOT = Path(__file__).resolve().parent.parent

#: Lines of DVC that say nothing about the work.
_NOISE = ("To track the changes", "git add", "To enable auto staging", "dvc config", "Use `dvc push`", "Updating lock")

_BAR = re.compile(r"\d+%\|")
_BAR_SECONDS = 10.0


class StageFailed(RuntimeError):
    """A stage ended with an error; the message holds its last lines."""


@task(task_run_name="{stage}")
def stage(stage: str) -> None:
    """Reproduce one DVC stage, if it is stale, with its output in this task's log.

    Raises:
        StageFailed: the stage's command failed.
    """
    run_command([sys.executable, "-m", "dvc", "repro", "--single-item", stage], stage)


@task(task_run_name="check MLflow")
def check_tracking() -> None:
    """Fail before the long work, not after it, when MLflow cannot be reached.

    Raises:
        StageFailed: MLflow does not answer.
    """
    run_command([sys.executable, "-m", "tasks.register", "--check"], "check MLflow")


def run_command(command: list[str], name: str) -> None:
    """Run a command in the project's folder and log its lines; stop it when this process is interrupted."""
    logger = get_run_logger()
    last: deque[str] = deque(maxlen=8)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
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
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if process.wait():
        raise StageFailed(f"{name} failed: {' | '.join(last) or 'no output'}")


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
    """How many variants are worked on side by side: ``TLQ_PARALLEL``, else 2 without a GPU and 1 with one."""
    if "TLQ_PARALLEL" in os.environ:
        return max(1, int(os.environ["TLQ_PARALLEL"]))
    return 1 if torch.cuda.is_available() else 2


def _environment() -> dict[str, str]:
    """This process's environment with its Python first on the path (dvc.yaml says `python`) and its cores shared."""
    folder = str(Path(sys.executable).parent)
    threads = max(1, (os.cpu_count() or 1) // stages_at_once())
    path = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"OMP_NUM_THREADS": str(threads), **os.environ, "PATH": path}
