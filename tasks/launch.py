"""Run a stage on several ranks of this machine: one process per GPU, or ``TLQ_RANKS`` of them.

The stage's own process starts the ranks through torch elastic and waits. A rank that dies takes the group down, the
group forms again and goes on from what is on disk. An error that trying again cannot cure ends the stage at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

logger = logging.getLogger("tlq.ranks")

#: File into which a rank writes an error that trying again cannot cure.
FAILURE = "TLQ_FAILURE_FILE"

_PARENT_POLL_SECONDS = 0.5


def ranks_wanted() -> int:
    """``TLQ_RANKS``, else one per GPU, else one.

    Raises:
        ValueError: ``TLQ_RANKS`` is no positive number.
    """
    stated = os.environ.get("TLQ_RANKS")
    if stated is not None:
        if not stated.isdigit() or int(stated) < 1:
            raise ValueError(f"TLQ_RANKS is {stated!r}, must be a positive number")
        return int(stated)
    return 1 if os.environ.get("TLQ_DEVICE") else max(1, torch.cuda.device_count())


def is_rank() -> bool:
    """Whether this process is one of several ranks."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def on_ranks(module: str, arguments: Sequence[str], work: Callable[[], None]) -> None:
    """Do ``work`` here, or on the ranks that the environment asks for by running ``module`` in each.

    Raises:
        RuntimeError: the ranks failed for good.
    """
    if is_rank():
        _die_with_parent()
        work()
    elif ranks_wanted() == 1:
        work()
    else:
        _launch_local(module, arguments, ranks_wanted())


def _launch_local(module: str, arguments: Sequence[str], ranks: int) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="tlq-") as folder:
        failure = Path(folder) / "failure"
        os.environ[FAILURE] = str(failure)
        run_agent(f"127.0.0.1:{store.port}", module, arguments, ranks)
        raise_failure(failure)


def raise_failure(failure: Path) -> None:
    """Raises ValueError with what a rank wrote to ``failure``, if one did."""
    if failure.exists():
        raise ValueError(failure.read_text())


def run_agent(
    endpoint: str, module: str, arguments: Sequence[str], ranks: int, nodes: tuple[int, int] = (1, 1), run: str = "tlq"
) -> None:
    """One elastic agent: joins the group that meets at ``endpoint`` and keeps ``ranks`` processes of it alive.

    Args:
        endpoint: host and port of the store, which another process holds.
        nodes: least and largest number of agents in the group.
        run: name of the job at the store.

    Raises:
        RuntimeError: its ranks failed more often than ``TLQ_RESTARTS`` (default 20).
    """
    config = LaunchConfig(
        min_nodes=nodes[0],
        max_nodes=nodes[1],
        nproc_per_node=ranks,
        run_id=run,
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        rdzv_configs={"is_host": False, "last_call_timeout": 1},
        max_restarts=int(os.environ.get("TLQ_RESTARTS", "20")),
        monitor_interval=0.2,
        local_addr=os.environ.get("TLQ_HOST", "127.0.0.1"),
    )
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        first = error.get_first_failure()[1]
        raise RuntimeError(
            f"the ranks failed {config.max_restarts + 1} times, the last with exit status {first.exitcode}; what is "
            "finished is kept, see the log above and run the same command again"
        ) from error


def _die_with_parent() -> None:
    """End this process when the one that started it is gone: nobody else would stop it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()


def report_failure(message: str) -> bool:
    """Tell the stage that trying again is of no use; False if this process is no rank, or another one was first."""
    path = os.environ.get(FAILURE)
    if path is None or not is_rank():
        return False
    try:
        with Path(path).open("x") as stream:
            stream.write(message)
    except FileExistsError:
        return False
    return True


def failed_already() -> bool:
    """Whether another rank has reported such a failure."""
    path = os.environ.get(FAILURE)
    return path is not None and is_rank() and Path(path).exists()
