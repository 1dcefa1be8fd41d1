"""Client of a Prefect work pool: the job that its flow runs share, the pool, and one flow run."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
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
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from tasks.cluster.environment import positive
from tasks.cluster.rank import RankCommand

#: The flow that a worker runs for a stage; its deployment has the pool's name. See flows/pool.py.
FLOW = "pool-worker"

#: A run that has not yet sent a heartbeat may take this multiple of TLQ_POOL_SILENCE, because its process starts.
_START_FACTOR = 4

#: Waits of 2, 4, 8 and 16 seconds, for a server whose SQLite is busy answers 503. The default, 5, blocks the watch for
#: a minute.
_RETRIES = 4

_BUSY = (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING)
_ALIVE = (StateType.SCHEDULED, *_BUSY)


class NoWorkerError(OSError):
    """No worker took up a run in time. A user has to start one; a retry does not help."""


@dataclass(frozen=True)
class Job:
    """The work that the ranks share.

    Attributes:
        folder: working directory of the ranks, on a file system that all workers share.
    """

    command: RankCommand
    folder: Path

    @property
    def key(self) -> str:
        """Tag of the job's flow runs: a digest of the work, the same in every process with the same work."""
        text = "\n".join([str(self.folder), self.command.module, *self.command.arguments])
        return f"job-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def secret_file(self) -> Path:
        """File with the secret of the job's store, on the file system that all workers share."""
        return self.folder / ".tlq" / f"{self.key}.secret"

    @property
    def name(self) -> str:
        """A short name for messages: `calibrate tlq w3a16`."""
        words = [Path(word).name for word in self.command.arguments if not word.startswith("-")]
        return " ".join([self.command.module.rsplit(".", 1)[-1], *words])


class Pool:
    """A work pool and its deployment at the Prefect server."""

    def __init__(self, name: str, client: SyncPrefectClient, deployment: UUID) -> None:
        self.name = name
        self._client = client
        self._deployment = deployment

    @classmethod
    @contextmanager
    def connect(cls, name: str) -> Iterator[Pool]:
        """Connect to the pool ``name``.

        Raises:
            ValueError: PREFECT_API_URL is not set, or the server has no such pool or deployment.
            ConnectionError: the server does not answer.
        """
        if not os.environ.get("PREFECT_API_URL"):
            raise ValueError(f"TLQ_POOL is {name!r}, but PREFECT_API_URL names no server; set it, or unset TLQ_POOL")
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: _RETRIES}), get_client(sync_client=True) as client:
            try:
                yield cls(name, client, cls._deployment_of(name, client))
            except httpx.TransportError as error:
                raise ConnectionError(f"Prefect server {client.api_url} does not answer: {error}") from error
            except PrefectHTTPStatusError as error:
                if error.response.status_code < 500:
                    raise
                raise ConnectionError(
                    f"Prefect server {client.api_url} is too busy: {error.response.status_code} "
                    f"{error.response.reason_phrase}; run the same command again"
                ) from error

    @staticmethod
    def _deployment_of(name: str, client: SyncPrefectClient) -> UUID:
        try:
            client.read_work_pool(name)
            return client.read_deployment_by_name(f"{FLOW}/{name}").id
        except ObjectNotFound as error:
            raise ValueError(
                f"work pool {name!r} or its deployment {FLOW}/{name} is not at {client.api_url}; create both with "
                f"`TLQ_POOL={name} python -m flows.pool --deploy`"
            ) from error

    def online(self) -> int:
        """The number of workers with a recent heartbeat."""
        workers = self._client.read_workers_for_work_pool(self.name, limit=200)
        return sum(worker.status == "ONLINE" for worker in workers)

    def busy(self) -> int:
        """The number of flow runs that occupy a slot of the pool."""
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(_BUSY)))
        return self._client.count_flow_runs(
            flow_run_filter=FlowRunFilter(state=state),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self.name])),
        )

    def submit(self, job: Job, name: str, endpoint: str, agents: int) -> FlowRun:
        """Submit one worker flow run for a job."""
        return self._client.create_flow_run_from_deployment(
            self._deployment,
            name=name,
            tags=[job.key],
            parameters={
                "store": endpoint,
                "secret": str(job.secret_file),
                "agents": agents,
                "module": job.command.module,
                "arguments": list(job.command.arguments),
                "folder": str(job.folder),
            },
        )

    def runs(self, ids: Sequence[UUID]) -> list[FlowRun]:
        return self._client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=list(ids))))

    def unfinished(self, job: Job) -> list[FlowRun]:
        """The flow runs of this or an equal job that have not ended."""
        state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(_ALIVE)))
        tags = FlowRunFilterTags(all_=[job.key])
        return self._client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state, tags=tags))

    def set_state(self, run: UUID, state: State, force: bool = False) -> None:
        self._client.set_flow_run_state(run, state, force=force)


def fixed_job_template(
    folder: Path | None = None, environment: Mapping[str, str] | None = None, stream_output: bool = True
) -> dict[str, Any]:
    """Job template of a pool whose flow runs choose neither their command nor their environment nor their folder."""
    from prefect.workers.process import ProcessWorker  # slow to import, and only needed when a pool is made

    template = ProcessWorker.get_default_base_job_template()
    fixed = {
        "command": None,
        "env": dict(environment or {}),
        "working_dir": None if folder is None else str(folder),
        "stream_output": stream_output,
    }
    template["job_configuration"] |= fixed
    for name in fixed:
        del template["variables"]["properties"][name]
    return template


def wait_seconds() -> int:
    """``TLQ_POOL_WAIT``: how long a stage waits for the first worker."""
    return positive("TLQ_POOL_WAIT", 600)


def no_worker(pool: Pool, wanted: int) -> NoWorkerError:
    """The error of a stage whose runs no worker takes up."""
    return NoWorkerError(
        f"pool {pool.name}: no worker took up a run within {wait_seconds()} s; found {pool.online()} online, needed at "
        f"least 1 ({wanted} wanted). Start one per GPU with `prefect worker start --pool {pool.name} --limit 1`, or "
        "raise TLQ_POOL_WAIT"
    )


@dataclass
class WorkerRun:
    """The last known state of a worker flow run.

    Attributes:
        state: its type, as last read from the server.
        heartbeats: number of heartbeats of its agent.
        changed: when ``state`` or ``heartbeats`` changed last, on the monotonic clock.
    """

    id: UUID
    name: str
    state: StateType = StateType.SCHEDULED
    message: str = ""
    heartbeats: int = 0
    changed: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> bool:
        return self.state not in _ALIVE

    @property
    def works(self) -> bool:
        return not self.ended and self.heartbeats > 0

    def timed_out(self, seconds: float) -> bool:
        """Whether a busy run has sent no heartbeat for ``seconds``, or a multiple of it while its process starts."""
        allowed = seconds if self.heartbeats else _START_FACTOR * seconds
        return self.state in _BUSY and time.monotonic() - self.changed > allowed
