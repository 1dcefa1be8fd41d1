"""Run one elastic agent. A worker of the pool runs it for a stage, on the stage's machine or another.

    python -m tasks.cluster.agent --store 10.0.0.1:41234 --secret .tlq/job-0f3a.secret --name <flow run id> \\
        --agents 2 tasks.stages.calibrate --recipe tlq ...

The agent keeps one rank of the stage's module alive. It ends when the result is complete, when the stage stops it, or
when the stage ends.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from torch.distributed.elastic.multiprocessing import SignalException

from tasks.cluster.authenticated import read_secret
from tasks.cluster.launch import run_agent
from tasks.cluster.rank import RankCommand, die_with_parent
from tasks.cluster.store import JobStore, StageGoneError

logger = logging.getLogger("tlq.agent")

_HEARTBEAT_SECONDS = 1.0
_KILL_SECONDS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="host and port of the stage's store")
    parser.add_argument("--secret", required=True, help="file with the secret of the stage's job")
    parser.add_argument("--name", required=True, help="name of this agent in the store")
    parser.add_argument("--agents", type=int, required=True, help="maximum number of agents in the group")
    parser.add_argument("module", help="module that each rank runs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    die_with_parent()
    try:
        secret = read_secret(Path(arguments.secret))
        _serve(JobStore.join(arguments.store, secret), secret, arguments)
    except (StageGoneError, SignalException) as error:
        sys.exit(str(error))


def _serve(store: JobStore, secret: str, arguments: argparse.Namespace) -> None:
    """Join the group and keep the rank alive until the result is complete.

    Raises:
        StageGoneError: the store is gone before the group has formed.
        SignalException: SIGTERM was received.
    """
    signal.signal(signal.SIGTERM, _raise_on_signal)
    leaving = threading.Event()
    heartbeat = threading.Thread(
        target=_send_heartbeats, args=(store, arguments.name, leaving), daemon=True, name="heartbeat"
    )
    heartbeat.start()
    try:
        while not store.begun():
            time.sleep(_HEARTBEAT_SECONDS / 4)
        command = RankCommand(arguments.module, tuple(arguments.arguments))
        run_agent(store.endpoint, secret, command, 1, (1, arguments.agents))
    except (SignalException, StageGoneError):
        raise
    except Exception as error:
        # When one agent gives up, the group is closed for all, so the stage cannot continue with another agent.
        if not store.finished():
            store.fail(" ".join(str(error).split()))
        raise
    finally:
        leaving.set()
        heartbeat.join()  # a thread inside the store when the interpreter ends would abort the process


def _send_heartbeats(store: JobStore, name: str, leaving: threading.Event) -> None:
    """Send a heartbeat every second until the stage stops this agent or does not answer, or ``leaving`` is set."""
    try:
        while not store.stopped(name):
            store.heartbeat(name)
            if leaving.wait(_HEARTBEAT_SECONDS):
                return
        logger.info("the stage no longer needs this agent")
    except StageGoneError as error:
        logger.info("%s", error)
    if not leaving.is_set():
        signal.alarm(_KILL_SECONDS)  # a rank that does not end must not keep this process alive
        os.kill(os.getpid(), signal.SIGTERM)


def _raise_on_signal(number: int, _frame: object) -> None:
    raise SignalException(f"stopped by signal {number}", signal.Signals(number))


if __name__ == "__main__":
    main()
