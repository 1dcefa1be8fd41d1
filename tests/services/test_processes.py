"""Stages of a run are found and stopped, whoever started them."""

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


def test_a_stage_ends_with_everything_below_it() -> None:
    process = started(NESTED)
    everything = tree(process.pid)
    assert len(everything) == 2
    assert stop(everything) == 2
    assert not any(alive(each) for each in everything)


def test_processes_of_one_run_are_stopped_and_those_of_others_go_on() -> None:
    mine, other = started(NESTED, **{OWNER: "run-1"}), started("import time; time.sleep(60)", **{OWNER: "run-2"})
    try:
        assert stop_stages("run-1") == 2
        assert not tree(mine.pid)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_what_does_not_listen_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = (
        "import signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    process = started(code)
    while not ready.exists():
        time.sleep(0.05)
    stop(tree(process.pid), grace=0.3)
    assert not tree(process.pid)
