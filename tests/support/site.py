"""A Prefect server with the pool `gpu`, its workers and the stages that tests start on them."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType

from support import ranked_job
from support.ranked_job import ROOT, wait_until_gone, write_job
from support.waiting import eventually

WORKERS = 2
BUSY = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]


@dataclass
class Site:
    """A Prefect server with the pool `gpu`, and the processes that were started for it.

    Attributes:
        job: folder of the small calibration.
    """

    job: Path
    home: Path
    api: str
    server: subprocess.Popen[bytes]
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    stages: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {
            **ranked_job.job_environment(self.job),
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
            "TLQ_POOL": "gpu",
            "TLQ_POOL_WORKERS": str(WORKERS),
            "TLQ_POOL_SILENCE": "15",
        }

    def client(self) -> SyncPrefectClient:
        return SyncPrefectClient(self.api)

    def start_workers(self) -> None:
        """Start the workers that do not run, as systemd does after a kill."""
        running = [worker for worker in self.workers if worker.poll() is None]
        self.workers = running + [self.start_worker() for _ in range(WORKERS - len(running))]

    def start_worker(self, prefix: Sequence[str] = (), **environment: str) -> subprocess.Popen[bytes]:
        """Start a worker, by a command that ``prefix`` runs: in the network namespace of another host, for instance."""
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu", "--limit", "1"]
        return subprocess.Popen(
            [*prefix, *command, "--install-policy", "never"],
            cwd=ROOT,
            env={**self.environment, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def start(self, name: str, scheme: str = "w3a16", **environment: str) -> subprocess.Popen[str]:
        stage = ranked_job.start(self.job, name, "tlq-c", scheme, {**self.environment, **environment})
        self.stages.append(stage)
        return stage

    def busy(self) -> list[FlowRun]:
        """Flow runs that occupy a slot of the pool."""
        with self.client() as client:
            state = FlowRunFilterState(type=FlowRunFilterStateType(any_=BUSY))
            return client.read_flow_runs(flow_run_filter=FlowRunFilter(state=state))

    def runs(self, name: str) -> list[FlowRun]:
        """Worker flow runs of the job in folder ``name``."""
        with self.client() as client:
            return [run for run in client.read_flow_runs() if f"ranks_worker {name} " in run.name]

    def assert_nothing_left(self, name: str) -> None:
        wait_until_gone(self.job / name)
        assert self.busy() == []


@contextmanager
def running_site(folder: Path, host: str = "127.0.0.1") -> Iterator[Site]:
    """Environment of the server, which shares nothing with another server or its settings.

    Args:
        host: address on which the server listens.
    """
    with socket.create_server((host, 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    (folder / "job").mkdir()
    job = write_job(folder / "job")
    home = folder / "prefect"
    environment = {**ranked_job.job_environment(job), "PREFECT_HOME": str(home)}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen([*command, "--no-ui"], env=environment, stdout=log, stderr=log)
    site = Site(job, home, f"http://{host}:{port}/api", server)
    try:
        wait_until(lambda: answers(site.api))
        subprocess.run([sys.executable, "-m", "flows.pool", "--deploy"], cwd=ROOT, env=site.environment, check=True)
        yield site
    finally:
        for process in [*site.stages, *site.workers, server]:
            end_tree(process)


def answers(api: str) -> bool:
    try:
        return httpx.get(f"{api}/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], object], seconds: float = 400) -> None:
    """``eventually`` with the time that a pool may need on a busy machine."""
    eventually(lambda: bool(condition()), seconds)


def end_tree(process: subprocess.Popen[Any]) -> None:
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()
    process.kill()
    process.wait()


def layers_done(folder: Path) -> int:
    return len(list(folder.glob(".out.work/part-*.json")))
