"""Run a stage on several ranks: processes on this machine, or workers of a Prefect pool.

On this machine, the stage's own process starts ``TLQ_RANKS`` ranks (default: one per GPU) through torch elastic and
waits. If a rank dies, the group forms again and continues from the state on disk. An error that a retry cannot cure
ends the stage at once. With ``TLQ_POOL`` set, the workers of that pool start the ranks, see ``tasks.cluster.pool``.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial, wraps
from typing import ParamSpec

import torch
from torch.distributed import DistBackendError, DistNetworkError, Store
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tasks.cluster.authenticated import new_secret
from tasks.cluster.environment import network_interface, own_address, restarts_allowed
from tasks.cluster.rank import RankCommand, shielded_starts
from tasks.cluster.rendezvous import BACKEND, GROUP, SECRET, STORE
from tasks.cluster.store import JobStore, group_store
from tasks.config.environment import positive, value
from tlq.parallel import REDUCTION_CHUNKS

logger = logging.getLogger("tlq.ranks")

Options = ParamSpec("Options")

_POLL_SECONDS = 0.5
#: How long a rank waits for the others, whose imports may take longer.
_MEET_SECONDS = 600
_STOP_SECONDS = 5


class Interrupted(KeyboardInterrupt):
    """A signal asked this process to stop; the signal's number is the only argument."""


def ranks_wanted() -> int:
    """``TLQ_RANKS``, else one per GPU, else one.

    Raises:
        ValueError: ``TLQ_RANKS`` is not a positive number.
    """
    if "TLQ_RANKS" in os.environ:
        return positive("TLQ_RANKS", 1)
    return 1 if value("TLQ_DEVICE") else max(1, torch.cuda.device_count())


def is_rank() -> bool:
    """Whether this process is a rank, which an elastic agent keeps alive."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def shared_by_ranks(
    module: str, most: int = REDUCTION_CHUNKS
) -> Callable[[Callable[Options, None]], Callable[Options, None]]:
    """Decorate the work of ``module``: a call runs on the ranks that the environment sets.

    The arguments of the work are the options of the module's command line, by name: each rank parses them from there.

    Args:
        most: maximum number of ranks that can share the work.
    """

    def decorate(work: Callable[Options, None]) -> Callable[Options, None]:
        @wraps(work)
        def shared(*args: Options.args, **kwargs: Options.kwargs) -> None:
            options = inspect.signature(work).bind(*args, **kwargs).arguments
            on_ranks(RankCommand.of_options(module, options), partial(work, *args, **kwargs), most)

        return shared

    return decorate


def on_ranks(command: RankCommand, work: Callable[[], None], most: int = REDUCTION_CHUNKS) -> None:
    """Do ``work`` in this process, or start the ranks that the environment sets, each of which runs ``command``.

    Args:
        most: maximum number of ranks that can share this work.

    Raises:
        ValueError: a rank reported an error, or an environment variable has an impossible value.
        ChildProcessError: the ranks failed for good.
        TimeoutError: no worker of the pool took up the work.
    """
    if is_rank():
        _as_rank(work)
    elif value("TLQ_POOL"):
        from tasks.cluster.pool import run_on_pool  # slow to import, and only needed on a pool

        run_on_pool(command, most)
    elif min(ranks_wanted(), most) == 1:
        work()
    else:
        _launch_local(command, min(ranks_wanted(), most))


def _launch_local(command: RankCommand, ranks: int) -> None:
    secret = new_secret()
    store = JobStore.host("127.0.0.1", secret)
    try:
        run_agent(store.endpoint, secret, command, ranks)
    except SignalException as error:  # torch's agent has signal handlers of its own while its ranks run
        raise Interrupted(error.sigval) from error
    store.raise_failure()


def run_agent(endpoint: str, secret: str, command: RankCommand, ranks: int, nodes: tuple[int, int] = (1, 1)) -> None:
    """Run one elastic agent: join the group that meets at ``endpoint``, and keep ``ranks`` processes of it alive.

    Args:
        endpoint: host and port of the store.
        secret: the secret of the job, with which all its messages are signed.
        nodes: minimum and maximum number of agents in the group.

    Raises:
        ChildProcessError: the agent's ranks failed more often than ``TLQ_RESTARTS`` (default 20).
    """
    config = LaunchConfig(
        min_nodes=nodes[0],
        max_nodes=nodes[1],
        nproc_per_node=ranks,
        run_id="tlq",
        rdzv_backend=BACKEND,
        rdzv_endpoint=endpoint,
        max_restarts=restarts_allowed(),
        monitor_interval=0.2,
        local_addr=own_address(),
        shutdown_timeout=_STOP_SECONDS,
    )
    os.environ[STORE], os.environ[SECRET] = endpoint, secret
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # the ranks use the job's store; torch opens none
    if interface := network_interface(own_address()):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.ERROR)  # each has a level of its own
    try:
        with shielded_starts():
            elastic_launch(config, sys.executable)("-m", "tasks.cluster.rank", command.module, *command.arguments)
    except ChildFailedError as error:
        first = error.get_first_failure()[1]
        raise ChildProcessError(
            f"the ranks failed {config.max_restarts + 1} times, the last with exit status {first.exitcode}; finished "
            "work is kept, see the log above and run the same command again"
        ) from error


def _as_rank(work: Callable[[], None]) -> None:
    """Do ``work``, then wait until rank 0 has finished its own.

    While the other ranks wait, the group can form again if rank 0 dies. A rank that is restarted after the job has
    finished returns at once.
    """
    store = _joined_store()
    if store.finished():
        return
    try:
        work()
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        logger.debug("traceback", exc_info=True)
        reason = " ".join(str(error).split())
        logger.warning("another rank does not answer, or cannot be reached (%s); the group forms again", reason[:500])
        sys.exit(1)
    if os.environ["RANK"] == "0":
        store.finish()
    while not store.finished() and store.failure() is None:
        time.sleep(_POLL_SECONDS)


def _is_lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone.

    NCCL raises classes of its own, Gloo names its file: that of a connection. Its ``device.cc`` is about this host.
    """
    text = str(error)
    if isinstance(error, DistBackendError):
        return "unhandled cuda error" not in text
    return isinstance(error, DistNetworkError) or ("gloo/transport" in text and "device.cc" not in text)


def _joined_store() -> JobStore:
    return JobStore.join(os.environ[STORE], os.environ[SECRET])


def meeting_place() -> Store | None:
    """The store in which the ranks of this process's group find each other; None if this process is no rank."""
    if not is_rank():
        return None
    return group_store(os.environ[STORE], os.environ[SECRET], os.environ[GROUP], _MEET_SECONDS)


def report_failure(message: str) -> bool:
    """Report a failure that a retry cannot cure; False if this process is no rank or another rank reported first."""
    return is_rank() and _joined_store().fail(message)


def failed_already() -> bool:
    """Whether a rank has reported a failure that a retry cannot cure."""
    return is_rank() and _joined_store().failure() is not None
