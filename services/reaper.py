"""End what a flow's process has started when that process is killed.

    python -m services.reaper <pid of the flow's process> <its mark>

A killed process (SIGKILL, out of memory) stops neither its stages nor the Prefect server that it started. They carry
its mark in their environment, and this process, which waits for its end, stops them: stages keep their finished work.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import cache

import psutil

from services.processes import ROOT, stop, with_environment

#: The flow's process that a process belongs to, in its environment.
MARK = "TLQ_FLOW_PROCESS"

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 10.0


@cache
def watch_this_process() -> None:
    """Mark the processes that this process starts from now on, and start the process that ends them after it."""
    mark = f"{os.getpid()} {psutil.Process().create_time()}"
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    os.environ[MARK] = mark
    command = [sys.executable, "-m", "services.reaper", str(os.getpid()), mark]
    subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )


def main() -> None:
    pid, mark = int(sys.argv[1]), sys.argv[2]
    while _runs(pid, mark):
        time.sleep(_POLL_SECONDS)
    stop(with_environment(MARK, mark), _GRACE_SECONDS)


def _runs(pid: int, mark: str) -> bool:
    """Whether the process with this number is still the marked one: numbers are used again."""
    try:
        process = psutil.Process(pid)
        return f"{pid} {process.create_time()}" == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main()
