"""Finding and stopping processes that belong to a flow run, whoever started them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

#: The project's folder.
ROOT = Path(__file__).resolve().parent.parent

#: Set by Prefect for a run that a worker started; children inherit it.
FLOW_RUN = "PREFECT__FLOW_RUN_ID"

#: Set for the commands of stages: the flow run, or the process, that they work for.
OWNER = "TLQ_FLOW_OWNER"

_GRACE_SECONDS = 20.0


def owner() -> str:
    """What this process's stages carry in their environment."""
    return os.environ.get(FLOW_RUN) or f"process {os.getpid()}"


def with_environment(name: str, value: str) -> list[psutil.Process]:
    """Processes of this user, this one excepted, that were started with ``name`` set to ``value``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(name) == value:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # another user's, or it has just ended
    return found


def tree(pid: int) -> list[psutil.Process]:
    """A process and everything below it; empty if it has ended."""
    try:
        top = psutil.Process(pid)
        return [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def stop(processes: Iterable[psutil.Process], grace: float = _GRACE_SECONDS) -> int:
    """SIGTERM, so that stages remove their temporary files; SIGKILL after ``grace`` seconds. Returns how many."""
    processes = list(processes)
    for process in processes:
        _signal(process.terminate)
    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in alive:
        _signal(process.kill)
    psutil.wait_procs(alive, timeout=grace)
    return len(processes)


def stop_stages(of: str) -> int:
    """Stop every process that works on a stage for ``of`` (see :func:`owner`). Returns how many there were."""
    return stop(with_environment(OWNER, of))


def _signal(send: Callable[[], None]) -> None:
    with suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
        send()
