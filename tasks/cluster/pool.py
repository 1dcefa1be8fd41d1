"""A stage on the workers of a Prefect pool: one worker flow run per GPU, each with one elastic agent and one rank.

The stage's own process holds the store where the agents meet, submits the flow runs and watches them. A run that is
lost (its worker, its process or its machine died) is submitted again; the group goes on without it meanwhile. When the
stage ends, for whatever reason, so do its runs. They learn it from the store, even if nobody is left to tell them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Cancelling, Crashed

from tasks.cluster.environment import own_address, restarts_allowed
from tasks.cluster.store import JobStore, StageGoneError
from tasks.config.environment import positive, value

logger = logging.getLogger("tlq.pool")

T = TypeVar("T")

#: The flow that a worker runs for a stage; its deployment has the pool's name. See flows/pool.py.
FLOW = "pool-worker"

_POLL_SECONDS = 1.0
#: How long the first agents wait for the others before they begin.
_GATHER_SECONDS = 15.0
#: A run whose process starts has this many times TLQ_POOL_SILENCE until its first sign of life.
_START_FACTOR = 4
_END_SECONDS = 15.0
#: Runs in a row that never gave a sign of life: more would not either.
_STILLBORN = 5
#: Longer than an agent that has lost its stage can live.
_LEFTOVER_SECONDS = 45.0

_BUSY = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
_ALIVE = (StateType.SCHEDULED, *_BUSY)


class NoWorkerError(OSError):
    """Nobody came in time; somebody has to start a worker, trying again does not."""


def run_on_pool(module: str, arguments: Sequence[str], most: int) -> None:
    """Run ``module`` as ranks on the workers of the pool ``TLQ_POOL`` until its result is complete.

    Args:
        most: ranks that can share this work.

    Raises:
        ValueError: no such pool or server, or what a rank reported.
        BlockingIOError: another process does the same work.
        NoWorkerError: no worker came within ``TLQ_POOL_WAIT`` seconds.
        RuntimeError: more runs were lost than ``TLQ_RESTARTS``.
    """
    with Pool.connect(value("TLQ_POOL")) as pool:
        job = Job.of(module, arguments)
        settle_leftovers(pool, job)
        watch = Watch(pool, job, JobStore.host(own_address(), job.key))
        try:
            watch.submit(workers_wanted(pool, most))
            watch.until_finished()
        finally:
            watch.end()


@dataclass(frozen=True)
class Job:
    """What the ranks are to do.

    Attributes:
        folder: where they do it; on every worker the same, on a shared file system.
    """

    module: str
    arguments: tuple[str, ...]
    folder: Path

    @classmethod
    def of(cls, module: str, arguments: Sequence[str]) -> Job:
        return cls(module, tuple(arguments), Path.cwd())

    @property
    def key(self) -> str:
        """The same for the same work, whoever does it: the tag of its flow runs."""
        text = "\n".join([str(self.folder), self.module, *self.arguments])
        return f"job-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def name(self) -> str:
        """Short, for people: `calibrate tlq w3a16`."""
        words = [Path(word).name for word in self.arguments if not word.startswith("-")]
        return " ".join([self.module.rsplit(".", 1)[-1], *words])


class Pool:
    """A work pool and its deployment at the Prefect server."""

    def __init__(self, name: str, client: SyncPrefectClient, deployment: UUID) -> None:
        self.name = name
        self._client = client
        self._deployment = deployment

    @classmethod
    @contextmanager
    def connect(cls, name: str) -> Iterator[Pool]:
        """The pool called ``name``.

        Raises:
            ValueError: no server is named, or it has no such pool or deployment.
            ConnectionError: the server does not answer.
        """
        if not os.environ.get("PREFECT_API_URL"):
            raise ValueError(f"TLQ_POOL is {name!r}, but PREFECT_API_URL names no server; set it, or unset TLQ_POOL")
        # The watch must not stand still while a client tries again for a minute, as it does by default.
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 2}), get_client(sync_client=True) as client:
            try:
                yield cls(name, client, cls._deployment_of(name, client))
            except httpx.TransportError as error:
                raise ConnectionError(f"Prefect server {client.api_url} does not answer: {error}") from error

    @staticmethod
    def _deployment_of(name: str, client: SyncPrefectClient) -> UUID:
        try:
            client.read_work_pool(name)
            return client.read_deployment_by_name(f"{FLOW}/{name}").id
        except ObjectNotFound as error:
            raise ValueError(
                f"work pool {name!r} or its deployment {FLOW}/{name} is not at {client.api_url}; make both with "
                f"`TLQ_POOL={name} python -m flows.pool --deploy`"
            ) from error

    def online(self) -> int:
        """Workers that have been heard of lately."""
        workers = self._client.read_workers_for_work_pool(self.name, limit=200)
        return sum(worker.status == "ONLINE" for worker in workers)

    def busy(self) -> int:
        """Flow runs that occupy a slot of the pool."""
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(_BUSY)))
        return self._client.count_flow_runs(
            flow_run_filter=FlowRunFilter(state=state),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self.name])),
        )

    def submit(self, job: Job, name: str, endpoint: str, agents: int) -> FlowRun:
        """One more worker flow run for a job."""
        return self._client.create_flow_run_from_deployment(
            self._deployment,
            name=name,
            tags=[job.key],
            parameters={
                "store": endpoint,
                "agents": agents,
                "module": job.module,
                "arguments": list(job.arguments),
                "folder": str(job.folder),
            },
        )

    def runs(self, ids: Sequence[UUID]) -> list[FlowRun]:
        return self._client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=list(ids))))

    def unfinished(self, job: Job) -> list[FlowRun]:
        """Flow runs of the same work that have not ended."""
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(_ALIVE)))
        tags = FlowRunFilterTags(all_=[job.key])
        return self._client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state, tags=tags))

    def set_state(self, run: UUID, state: State, force: bool = False) -> None:
        self._client.set_flow_run_state(run, state, force=force)


def workers_wanted(pool: Pool, most: int) -> int:
    """How many flow runs to submit: ``TLQ_POOL_WORKERS``, else as many as workers are online, at most ``most``.

    Raises:
        NoWorkerError: none is online within ``TLQ_POOL_WAIT`` seconds.
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


def wait_seconds() -> int:
    """``TLQ_POOL_WAIT``: how long a stage waits for the first worker."""
    return positive("TLQ_POOL_WAIT", 600)


def no_worker(pool: Pool, wanted: int) -> NoWorkerError:
    """What a user is told when nobody comes."""
    return NoWorkerError(
        f"pool {pool.name}: no worker took up a run within {wait_seconds()} s; found {pool.online()} online, needed at "
        f"least 1 ({wanted} wanted). Start one per GPU with `prefect worker start --pool {pool.name} --limit 1`, or "
        "raise TLQ_POOL_WAIT"
    )


def settle_leftovers(pool: Pool, job: Job) -> None:
    """End the flow runs of a stage that did the same work and was killed, so that they hold no slot and no lock.

    Their agents end by themselves when their stage is gone. A run whose worker and process died as well would stay
    Running for ever.

    Raises:
        BlockingIOError: that stage is alive.
    """
    deadline = time.monotonic() + _LEFTOVER_SECONDS
    while runs := pool.unfinished(job):
        for run in runs:
            if _holds_job(run.parameters["store"], job):
                raise BlockingIOError(
                    f"{job.name}: another process does this on pool {pool.name} (flow run {run.name}); wait for it, or "
                    "stop it and run the command again"
                )
            if run.state_type == StateType.SCHEDULED or time.monotonic() > deadline:
                logger.info("flow run %s was left over by a stage that is gone; it is set to Crashed", run.name)
                pool.set_state(run.id, Crashed(message="left over by a stage that is gone"), force=True)
        time.sleep(_POLL_SECONDS)


def _holds_job(endpoint: str, job: Job) -> bool:
    try:
        return JobStore.join(endpoint, seconds=3).job() == job.key
    except StageGoneError:
        return False


@dataclass
class WorkerRun:
    """A worker flow run as the stage sees it.

    Attributes:
        state: its type, as last read from the server.
        beats: signs of life of its agent.
        changed: when ``state`` or ``beats`` changed last, on the monotonic clock.
    """

    id: UUID
    name: str
    state: StateType = StateType.SCHEDULED
    message: str = ""
    beats: int = 0
    changed: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> bool:
        return self.state not in _ALIVE

    @property
    def works(self) -> bool:
        return not self.ended and self.beats > 0

    def silent(self, seconds: float) -> bool:
        """Whether a run that should give signs of life has given none for too long."""
        allowed = seconds if self.beats else _START_FACTOR * seconds
        return self.state in _BUSY and time.monotonic() - self.changed > allowed


class Watch:
    """The flow runs of one stage, from submission to their end."""

    def __init__(self, pool: Pool, job: Job, store: JobStore) -> None:
        self._pool = pool
        self._job = job
        self._store = store
        self._runs: list[WorkerRun] = []
        self._wanted = 0
        self._submitted = 0
        self._owed = 0
        self._lost = 0
        self._stillborn = 0
        self._silence = positive("TLQ_POOL_SILENCE", 30)
        self._gathering: float | None = None
        self._deadline = time.monotonic() + wait_seconds()
        self._answers = True
        self._ending = False

    def submit(self, count: int) -> None:
        """Submit the first ``count`` runs."""
        self._wanted = count
        for _ in range(count):
            self._submit_one()

    def _submit_one(self) -> bool:
        self._submitted += 1
        name = f"{self._job.name} {self._submitted}"
        run = self._pool.submit(self._job, name, self._store.endpoint, self._wanted)
        self._runs.append(WorkerRun(run.id, name))
        return True

    @property
    def _unended(self) -> list[WorkerRun]:
        return [run for run in self._runs if not run.ended]

    def until_finished(self) -> None:
        """Watch until the result is complete.

        Raises:
            ValueError, NoWorkerError, RuntimeError: see ``run_on_pool``.
        """
        while not self._store.finished():
            self._show_lines()
            self._store.raise_failure()
            self._look()
            self._replace_lost()
            self._let_begin()
            self._check_deadline()
            time.sleep(_POLL_SECONDS)

    def _show_lines(self) -> None:
        for line in self._store.lines():
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def _look(self) -> None:
        """Read states from the server and signs of life from the store."""
        ids = [run.id for run in self._unended]
        nothing: list[FlowRun] = []
        states = {run.id: run for run in self._try(lambda: self._pool.runs(ids), nothing)}
        for run in self._unended:
            found = states.get(run.id)
            state = found.state_type if found is not None and found.state_type is not None else run.state
            beats = self._store.beats(str(run.id))
            if (state, beats) != (run.state, run.beats):
                run.state, run.beats, run.changed = state, beats, time.monotonic()
            if run.ended and found is not None and found.state is not None:
                run.message = found.state.message or ""

    def _replace_lost(self) -> None:
        """Submit another run for every one that has ended before its time, or of which nothing is heard."""
        self._crash_silent()
        lost = [run for run in self._runs if run.ended]
        self._runs = self._unended
        cancelled = [run for run in lost if run.state == StateType.CANCELLED]
        if cancelled and not self._runs and len(cancelled) == len(lost):
            raise RuntimeError(f"{self._job.name}: its runs on pool {self._pool.name} were cancelled")
        for run in lost:
            if run.state != StateType.CANCELLED:
                self._count_lost(run)
        while self._owed and self._try(self._submit_one, False):
            self._owed -= 1

    def _crash_silent(self) -> None:
        """Nobody else may be left to say that these runs have ended, and they would keep their slot for ever."""
        for run in self._unended:
            if run.silent(self._silence):
                message = f"no sign of life for {time.monotonic() - run.changed:.0f} s"
                self._store.stop(str(run.id))  # in case it lives, and only its connection was slow
                if self._set(run, Crashed(message=message), force=True):
                    run.state, run.message = StateType.CRASHED, message

    def _count_lost(self, run: WorkerRun) -> None:
        """Owe the job another run, unless enough were lost.

        Raises:
            RuntimeError: too many were, or none of the last came to life.
        """
        self._lost += 1
        self._owed += 1
        self._stillborn = 0 if run.beats else self._stillborn + 1
        if self._stillborn == _STILLBORN:
            raise RuntimeError(
                f"{self._job.name}: {_STILLBORN} worker runs in a row ended before they began; the log of flow run "
                f"{run.name} on pool {self._pool.name} says why ({run.state.value}: {run.message})"
            )
        if self._lost > restarts_allowed():
            raise RuntimeError(
                f"{self._job.name}: {self._lost} worker runs were lost, more than TLQ_RESTARTS = {restarts_allowed()}; "
                f"the last, {run.name}, ended {run.state.value}: {run.message}. What is finished is kept, run the same "
                "command again"
            )
        logger.warning("worker run %s is lost (%s: %s); another is submitted", run.name, run.state.value, run.message)

    def _let_begin(self) -> None:
        """Open the meeting when all agents are here, or the first has waited long enough: later ones can still join."""
        here = sum(run.works for run in self._runs)
        if self._store.begun() or not here:
            return
        self._gathering = self._gathering or time.monotonic()
        if here == self._wanted or time.monotonic() - self._gathering > _GATHER_SECONDS:
            logger.info("%s: %d of %d workers at work", self._job.name, here, self._wanted)
            self._store.begin()

    def _check_deadline(self) -> None:
        """Waiting for workers that are busy with something else does not count."""
        if any(run.works for run in self._runs) or self._try(self._pool.busy, 1):
            self._deadline = time.monotonic() + wait_seconds()
        elif time.monotonic() > self._deadline:
            raise no_worker(self._pool, self._wanted)

    def _try(self, ask: Callable[[], T], otherwise: T) -> T:
        """An answer of the server; ``otherwise`` while it is away, which the ranks do not mind.

        At the end it is asked no more once it has not answered: runs also learn from the store that the stage is over.
        """
        if self._ending and not self._answers:
            return otherwise
        try:
            answer = ask()
        except (httpx.HTTPError, OSError) as error:
            if self._answers:
                logger.warning("the Prefect server does not answer (%s); the ranks go on, and so does the watch", error)
            self._answers = False
            return otherwise
        self._answers = True
        return answer

    def end(self) -> None:
        """Let no run outlive the stage: those of a finished job end by themselves, others are told to.

        Who does not listen to the store is cancelled through the server, and at last set to Cancelled by force.
        """
        self._ending = True
        if not self._store.finished():
            self._store.stop()
        for run in self._unended:
            if run.state == StateType.SCHEDULED:
                self._set(run, Cancelled(message="the stage has ended"))
        self._wait_for_end(_END_SECONDS)
        self._store.stop()
        for run in self._unended:
            self._set(run, Cancelling(message="the stage has ended"))
        self._wait_for_end(_END_SECONDS / 2)
        for run in self._unended:
            self._set(run, Cancelled(message="did not end when its stage did"), force=True)

    def _wait_for_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._look()
        while self._unended and time.monotonic() < deadline:
            self._crash_silent()
            time.sleep(_POLL_SECONDS / 2)
            self._show_lines()
            self._look()

    def _set(self, run: WorkerRun, state: State, force: bool = False) -> bool:
        """Whether the server has heard it."""

        def ask() -> bool:
            try:
                self._pool.set_state(run.id, state, force)
            except ObjectNotFound:
                logger.warning("flow run %s has been deleted", run.name)
                run.state = StateType.CANCELLED
            return True

        return self._try(ask, False)
