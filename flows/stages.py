"""Stages as Prefect tasks: each runs DVC's `repro --single-item`, so flows and `dvc repro` write the same dvc.lock."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from prefect import get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed

from flows.overview import Overview, current, earlier_durations, followed
from flows.progress import BAR_ENVIRONMENT, MARK, Bar, clock_time, lines_and_pauses, with_progress
from services.processes import OWNER, ROOT, owner, stop, stop_stages, tree
from services.reaper import watch_this_process
from tasks.config.params import PARAMS, section
from tasks.config.sections import RegisterParams
from tasks.errors import TRY_AGAIN
from tlq.parallel import REDUCTION_CHUNKS

#: The command that reproduces a stage; it waits while a concurrent stage holds DVC's lock to save its result.
REPRO = (sys.executable, "-m", "tasks.reproduce", "--single-item")

#: The command that checks that MLflow answers.
CHECK = (sys.executable, "-m", "tasks.registry.check")

#: Beginnings of DVC's lines of advice, which the log leaves out.
_NOISE = ("To track the changes", "git add", "To enable auto staging", "dvc config", "Use `dvc push`", "Updating lock")

_BAR_SECONDS = 10.0
_SILENT_SECONDS = 60.0

#: DVC's lines on a stage whose command it does not run: what the line says, name of the task's state, message.
_NOT_RUN = (
    ("didn't change, skipping", "Skipped", "skipped, nothing that it depends on has changed"),
    ("is cached - skipping run", "Cached", "its result was in DVC's cache"),
)


#: The stages at the end of a flow.
LAST = ("report", "register")


_STOPPED = "stopped, because its flow run was"


class StageFailed(RuntimeError):
    """A stage ended with an error; the message holds the last lines of its output."""


class StageUnavailable(StageFailed):
    """A stage ended because an outside service (the hub, MLflow) did not answer; a retry may succeed."""


def is_retryable(_task: Any, _run: Any, state: State) -> bool:
    """Whether a retry can help: not if the stage itself failed, because it would compute the same again."""
    return isinstance(state.result(raise_on_failure=False), StageUnavailable)


@task(task_run_name="{stage}", retries=2, retry_delay_seconds=[10, 60], retry_condition_fn=is_retryable)
def stage(stage: str, force: bool = False) -> State[Any]:
    """Reproduce one DVC stage if it is stale or ``force`` is set, and log its output.

    Returns the state of the task run: Completed; Skipped if DVC found the stage up to date; Cached if DVC had its
    result; Cancelled if the flow run was stopped.

    Raises:
        StageFailed: the stage's command failed.
    """
    logger, overview = get_run_logger(), current() or Overview([stage])
    again = ["--force"] if force else []
    lines: list[str] = []
    logger.info(overview.begin(stage))
    if not _finished([*REPRO, *again, stage], stage, overview, lines.append):
        return Cancelled(message=_STOPPED)
    state = _completed(lines)
    logger.info(overview.end(stage, state.message or "", ran=state.name == "Completed"))
    return state


def _completed(lines: Iterable[str]) -> State[Any]:
    """The state of a stage from DVC's output: whether the command ran, and if not, why."""
    text = "\n".join(line for line in lines if line.startswith("Stage '"))
    for part, name, message in _NOT_RUN:
        if part in text:
            return Completed(name=name, message=message)
    return Completed()


def run_stage(name: str, force: bool = False) -> None:
    """Run a stage in a thread of the flow and wait for it.

    The flow's main thread receives the signals of a cancellation. A task in it would end as Crashed.

    Raises:
        StageFailed: the stage failed.
    """
    stage.submit(name, force).result()


def report_and_register(force: Sequence[str] = ()) -> None:
    """Run the last two stages of a flow. `register` follows `report`, whose page and model cards it stores in MLflow.

    Args:
        force: stages to run even if they are not stale.

    Raises:
        StageFailed: a stage failed.
    """
    for name in LAST:
        run_stage(name, name in force)


@task(task_run_name="check MLflow", retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=is_retryable)
def check_tracking() -> State[Any]:
    """Fail before the long work, and not after it, if MLflow does not answer or section `register` is wrong.

    Returns the state of the task run: Completed, or Cancelled if the flow run was stopped.

    Raises:
        StageFailed: MLflow does not answer.
        ParamsError: section `register` of params.yaml.
    """
    section("register", RegisterParams, ROOT / PARAMS)
    finished = _finished([*CHECK], "check MLflow", current())
    return Completed() if finished else Cancelled(message=_STOPPED)


def _finished(
    command: list[str], name: str, overview: Overview | None, forward: Callable[[str], None] | None = None
) -> bool:
    """Run the command of a task; false if the flow run was stopped meanwhile, whatever the command's exit status is.

    The status may be lost then: psutil reads it as ``following`` stops the command, and ``subprocess`` assumes 0.

    Raises:
        StageFailed: the command failed, and nothing stopped the flow run.
    """
    try:
        run_command(command, name, forward=forward)
    except StageFailed:
        if overview is None or not overview.stopping.is_set():
            raise
    return overview is None or not overview.stopping.is_set()


def run_command(
    command: list[str], name: str, folder: Path = ROOT, forward: Callable[[str], None] | None = None
) -> None:
    """Run a command in ``folder`` and log its output; stop it when this process is interrupted.

    The command gets a process group of its own. A worker that cancels a run, and Ctrl-C in a terminal, signal the
    whole group of the flow's process: the command would end first, and look as if it had failed.

    Args:
        name: stage or check, for messages and for the progress artifact.
        forward: called with every line that is logged.

    Raises:
        StageFailed: the command's exit status is not 0; StageUnavailable if a retry may succeed.
    """
    logger, overview = get_run_logger(), current()
    last: deque[str] = deque(maxlen=8)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=stage_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for text in worth_logging(with_progress(lines_and_pauses(process.stdout), name)):
            if overview is not None:
                overview.beat()
            if not text:
                continue
            last.append(text)
            logger.info(text)
            if forward is not None:
                forward(text)
    except BaseException:
        stop(tree(process.pid))  # DVC does not pass signals on to the stage's command
        process.wait()
        raise
    if status := process.wait():
        raise _failure(status, last)(f"{name} failed: {' | '.join(last) or 'no output'}")


def _failure(status: int, lines: Iterable[str]) -> type[StageFailed]:
    """The exception for an exit status. DVC exits with its own status and names the command's in its last line."""
    unavailable = status == TRY_AGAIN or any(line.endswith(f"exited with {TRY_AGAIN}") for line in lines)
    return StageUnavailable if unavailable else StageFailed


@contextmanager
def following(stages: Sequence[str]) -> Iterator[None]:
    """Show the progress of a flow run with these stages, and stop those at work if the flow is interrupted.

    Only the main thread receives the signals of a cancellation, and Prefect waits for the others, so a stage in another
    thread would run to its end.
    """
    watch_this_process()
    overview = Overview(stages, stages_at_once(), earlier_durations(stages))
    try:
        with followed(overview):
            yield
    except Exception:
        raise
    except BaseException:
        overview.stopping.set()
        stop_stages(owner())
        raise


def worth_logging(lines: Iterable[str | None], clock: Callable[[], float] = time.monotonic) -> Iterator[str]:
    """Lines for the log: DVC's advice is dropped, and progress bars show every ``_BAR_SECONDS`` and when complete.

    A line that is empty takes the place of each line that is left out, so that the caller notices the time. After every
    ``_SILENT_SECONDS`` without a line, one says that the stage is still running, and repeats its last bar.
    """
    start = logged = seen = clock()
    next_bar = start + _BAR_SECONDS
    bar: Bar | None = None
    incomplete = ""  # name of the bar that the log shows as incomplete
    for line in lines:
        now, text = clock(), (line or "").strip()
        if line is None and now - logged >= _SILENT_SECONDS:
            text = f"{MARK}{bar.after(now - seen).text}" if bar else f"still running after {clock_time(now - start)}"
        elif text.startswith(_NOISE):
            text = ""
        elif text.startswith(MARK):
            bar, seen = Bar.read(text) or bar, now
            complete = bar is not None and bar.done == bar.total
            if now >= next_bar or (complete and bar is not None and bar.name == incomplete):
                next_bar = now + _BAR_SECONDS
                incomplete = bar.name if bar is not None and not complete else ""
            else:
                text = ""
        logged = now if text else logged
        yield text


def stages_at_once() -> int:
    """The number of variants that run concurrently: ``TLQ_PARALLEL``, else 2 without a GPU and 1 with one.

    With ``TLQ_POOL`` the pool's workers compute and the stages here only wait, so ``REDUCTION_CHUNKS`` of
    them may run: the largest number of workers that a stage uses.
    """
    if os.environ.get("TLQ_POOL") and "TLQ_PARALLEL" not in os.environ:
        return REDUCTION_CHUNKS
    return _shares()


def _shares() -> int:
    """The number of computing processes that share this machine's cores."""
    if "TLQ_PARALLEL" in os.environ:
        return max(1, int(os.environ["TLQ_PARALLEL"]))
    return 1 if torch.cuda.is_available() else 2


def stage_environment() -> dict[str, str]:
    """The environment of a stage's command.

    This process's Python comes first on the path, because dvc.yaml names `python`. ``OMP_NUM_THREADS``, unless it is
    set, is the stage's share of the cores. ``TLQ_FLOW_OWNER`` is the run that the command belongs to. tqdm's variable
    makes its bars lines that ``Bar.read`` parses.
    """
    folder = str(Path(sys.executable).parent)
    threads = max(1, (os.cpu_count() or 1) // _shares())
    path = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"OMP_NUM_THREADS": str(threads), **os.environ, **BAR_ENVIRONMENT, "PATH": path, OWNER: owner()}
