"""The stages of a flow run are stopped with their child processes, and stages of other runs continue."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil

from services.processes import OWNER, stop, stop_stages, tree

#: A command below a shell that does not pass signals on, as DVC does not.
NESTED = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"


def started(code: str, **environment: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    until = time.monotonic() + 20
    while "subprocess" in code and len(tree(process.pid)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    return process


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_stop_ends_a_stage_and_its_children() -> None:
    process = started(NESTED)
    everything = tree(process.pid)
    assert len(everything) == 2
    assert stop(everything) == 2
    assert not any(alive(each) for each in everything)


def test_stop_stages_ends_only_the_stages_of_its_run() -> None:
    mine, other = started(NESTED, **{OWNER: "run-1"}), started("import time; time.sleep(60)", **{OWNER: "run-2"})
    try:
        assert stop_stages("run-1") == 2
        assert not tree(mine.pid)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_stop_kills_a_process_that_ignores_sigterm(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = (
        "import signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    process = started(code)
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert time.monotonic() < deadline, "the process does not start"
        time.sleep(0.05)
    stop(tree(process.pid), grace=0.3)
    assert not tree(process.pid)
