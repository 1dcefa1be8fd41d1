"""Find and stop the processes of a flow run, whichever process started them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

#: The project's folder.
ROOT = Path(__file__).resolve().parent.parent

#: The flow run, in the environment of a run that a Prefect worker started and of its children.
FLOW_RUN = "PREFECT__FLOW_RUN_ID"

#: The owner (see ``owner``), in the environment of the commands of stages.
OWNER = "TLQ_FLOW_OWNER"

_GRACE_SECONDS = 20.0


def owner() -> str:
    """Owner of the stages that this process starts: its flow run or, outside a flow run, the process itself."""
    return os.environ.get(FLOW_RUN) or f"process {os.getpid()}"


def with_environment(name: str, value: str) -> list[psutil.Process]:
    """Processes of this user, except this one, whose environment has ``name`` set to ``value``."""
    processes = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(name) == value:
                processes.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # the process belongs to another user, or has just ended
    return processes


def tree(pid: int) -> list[psutil.Process]:
    """A process and its descendants; empty if it has ended."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def stop(processes: Iterable[psutil.Process], grace: float = _GRACE_SECONDS) -> int:
    """Send SIGTERM, on which stages remove their temporary files, and SIGKILL after ``grace`` seconds.

    Returns the number of processes.
    """
    processes = list(processes)
    for process in processes:
        _signal(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in alive:
        _signal(process.kill)
    psutil.wait_procs(alive, timeout=grace)
    return len(processes)


def stop_stages(owner: str) -> int:
    """Stop every process that runs a stage for ``owner``; returns the number of processes."""
    return stop(with_environment(OWNER, owner))


def _signal(send: Callable[[], None]) -> None:
    with suppress(psutil.NoSuchProcess):  # the process has ended in the meantime
        send()
