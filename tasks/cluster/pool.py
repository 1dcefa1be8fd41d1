"""Run a stage on the workers of a Prefect pool: one worker flow run per GPU, each with one elastic agent and one rank.

The stage's own process hosts the store where the agents meet, submits the flow runs and watches them. A lost run (its
worker, process or machine died) is replaced by another; in the meantime the group continues without it. When the stage
ends, for whatever reason, its runs end too: the store reports the end, or no longer answers.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from prefect.client.schemas.objects import StateType
from prefect.states import Crashed

from tasks.cluster.authenticated import keep_secret, new_secret, read_secret
from tasks.cluster.environment import own_address
from tasks.cluster.rank import RankCommand
from tasks.cluster.store import JobStore, StageGoneError
from tasks.cluster.watch import Watch
from tasks.cluster.work_pool import Job, Pool, no_worker, wait_seconds
from tasks.config.environment import positive, value

logger = logging.getLogger("tlq.pool")

_POLL_SECONDS = 1.0
#: Longer than an agent can outlive its stage.
_LEFTOVER_SECONDS = 45.0


def run_on_pool(command: RankCommand, most: int) -> None:
    """Run ``command`` as ranks on the workers of the pool ``TLQ_POOL`` until its result is complete.

    Args:
        most: maximum number of ranks that can share this work.

    Raises:
        ValueError: the pool or server does not exist, or a rank reported an error that a retry cannot cure.
        BlockingIOError: another process does the same work.
        NoWorkerError: no worker took up a run within ``TLQ_POOL_WAIT`` seconds.
        ChildProcessError: more runs were lost than ``TLQ_RESTARTS``.
    """
    with Pool.connect(value("TLQ_POOL")) as pool:
        job = Job(command, Path.cwd())
        settle_leftovers(pool, job)
        secret = new_secret()
        keep_secret(secret, job.secret_file)
        store = JobStore.host(own_address(), secret, job.key)
        watch = Watch(pool, job, store)
        try:
            with store.shown_clock():
                watch.submit(workers_wanted(pool, most))
                watch.until_finished()
        finally:
            watch.end()
            job.secret_file.unlink(missing_ok=True)


def workers_wanted(pool: Pool, most: int) -> int:
    """The number of flow runs to submit: ``TLQ_POOL_WORKERS``, else one per online worker; at most ``most``.

    Raises:
        NoWorkerError: no worker is online within ``TLQ_POOL_WAIT`` seconds.
    """
    online, busy = pool.online(), pool.busy()
    stated = positive("TLQ_POOL_WORKERS", 1) if "TLQ_POOL_WORKERS" in os.environ else None
    wanted = min(stated or most, most)
    logger.info(
        "pool %s: %d workers online, %d of them free; %s wanted",
        pool.name,
        online,
        max(0, online - busy),
        stated or f"all, at most {most},",
    )
    deadline = time.monotonic() + wait_seconds()
    while stated is None and online == 0:
        if time.monotonic() > deadline:
            raise no_worker(pool, 1)
        time.sleep(_POLL_SECONDS)
        online = pool.online()
    return wanted if stated else min(online, most)


def settle_leftovers(pool: Pool, job: Job) -> None:
    """End the flow runs of a killed stage with the same work, so that they hold no slot and no lock.

    Their agents end by themselves after their stage. A run whose worker and process died as well would stay Running
    forever.

    Raises:
        BlockingIOError: the other stage still runs.
    """
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    while runs := pool.unfinished(job):
        for run in runs:
            if _holds_job(run.parameters["store"], job):
                raise BlockingIOError(
                    f"{job.name}: another process runs this job on pool {pool.name} (flow run {run.name}); wait for "
                    "it, or stop it and run the command again"
                )
            if run.state_type == StateType.SCHEDULED or time.monotonic() > deadline:
                logger.info("flow run %s was left over by a stage that has ended; its state is now Crashed", run.name)
                pool.set_state(run.id, Crashed(message="left over by a stage that has ended"), force=True)
        time.sleep(_POLL_SECONDS)


def _holds_job(endpoint: str, job: Job) -> bool:
    try:
        return JobStore.join(endpoint, read_secret(job.secret_file), seconds=3).job() == job.key
    except (StageGoneError, FileNotFoundError):
        return False
