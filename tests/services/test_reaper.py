"""A flow's process that is killed leaves no stage and no server running."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil
import pytest
from support.waiting import eventually

from services.processes import ROOT, tree

#: A flow's process with a stage below a shell, and with a server in a session of its own.
FLOW = """
import subprocess, sys, time
from services.reaper import watch_this_process
watch_this_process()
nested = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(100)'])"
subprocess.Popen([sys.executable, "-c", nested])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
print("started", flush=True)
time.sleep(100)
"""


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_everything_that_a_flow_started_ends_with_it(number: signal.Signals) -> None:
    flow = subprocess.Popen([sys.executable, "-c", FLOW], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        assert flow.stdout is not None
        assert flow.stdout.readline() == "started\n"
        eventually(lambda: len(tree(flow.pid)) == 5)  # flow, reaper, server, stage and what the stage has started
        below = tree(flow.pid)[1:]
        flow.send_signal(number)
        flow.wait()
        ended = time.monotonic()
        eventually(lambda: not any(map(alive, below)), 15)
        assert time.monotonic() - ended < 15
        assert other.poll() is None
    finally:
        for process in (flow, other):
            process.kill()
            process.communicate()
