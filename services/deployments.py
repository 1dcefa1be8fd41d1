"""Deployments and runs on a Prefect server: apply prefect.yaml, release lost runs, cancel runs at the end."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import psutil
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import FlowRunFilter, WorkPoolFilter
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Crashed

from services.processes import FLOW_RUN, with_environment
from services.supervisor import ServiceError
from tasks.cluster.work_pool import fixed_job_template
from tlq.runtime.files import write_text

logger = logging.getLogger("tlq.services")

POOL = "local"
_ACTIVE = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]
_CANCEL_SECONDS = 60.0


@contextmanager
def server() -> Iterator[SyncPrefectClient]:
    """A client of the current PREFECT_API_URL; Prefect itself reads the variables only once, at import."""
    current = {
        PREFECT_API_URL: os.environ["PREFECT_API_URL"],
        PREFECT_API_AUTH_STRING: os.environ.get("PREFECT_API_AUTH_STRING"),
    }
    with temporary_settings(current), get_client(sync_client=True) as client:
        yield client


def create_pool(client: SyncPrefectClient) -> None:
    """Create the pool of this folder's worker.

    It runs one flow at a time, because all flows share params.yaml, dvc.lock and outputs.
    """
    template = fixed_job_template()
    pool = WorkPoolCreate(
        name=POOL,
        type="process",
        description="Runs in the project's folder, one at a time",
        base_job_template=template,
        concurrency_limit=1,
    )
    try:
        client.create_work_pool(pool)
    except ObjectAlreadyExists:
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))


def apply_deployments(folder: Path, scratch: Path, client: SyncPrefectClient) -> list[str]:
    """Apply prefect.yaml; returns the deployments' names.

    A deployment's schedules are applied only when it is created: users change them in the UI, and applying the file
    again would undo their changes.

    Raises:
        ServiceError: Prefect rejects the file.
    """
    content = yaml.safe_load((folder / "prefect.yaml").read_text())
    for deployment in content["deployments"]:
        if _exists(deployment["entrypoint"].rsplit(":", 1)[1], deployment["name"], client):
            deployment.pop("schedules", None)
    write_text(yaml.safe_dump(content), scratch)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(scratch)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ServiceError(f"prefect.yaml cannot be applied:\n{done.stdout}{done.stderr}")
    return [deployment["name"] for deployment in content["deployments"]]


def _exists(flow: str, name: str, client: SyncPrefectClient) -> bool:
    try:
        client.read_deployment_by_name(f"{flow}/{name}")
    except ObjectNotFound:
        return False
    return True


def release_lost_runs(client: SyncPrefectClient) -> list[str]:
    """Set the state of the pool's runs whose process has ended to Crashed; returns their names.

    If a worker and its run are killed together, no process reports their end to the server, and the run would occupy
    the pool's only slot forever.
    """
    active = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": _ACTIVE}}}),
        work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [POOL]}}),
    )
    lost = [run for run in active if not with_environment(FLOW_RUN, str(run.id))]
    for run in lost:
        client.set_flow_run_state(run.id, Crashed(message="Its process has ended; start it again."), force=True)
    return [run.name for run in lost]


def cancel_runs(worker: Iterable[psutil.Process]) -> None:
    """Cancel the flow runs among a worker's processes and wait for their end; the worker alone would wait forever."""
    runs = {run for process in worker if (run := _flow_run(process))}
    if not runs:
        return
    logger.info("cancelling %d flow runs", len(runs))
    with server() as client:
        for run in runs:
            client.set_flow_run_state(run, Cancelling(message="The services are being stopped."))
        until = time.monotonic() + _CANCEL_SECONDS
        while time.monotonic() < until and any(_is_active(run, client) for run in runs):
            time.sleep(0.5)


def _flow_run(process: psutil.Process) -> UUID | None:
    try:
        run = process.environ().get(FLOW_RUN)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return None
    return UUID(run) if run else None


def _is_active(run: UUID, client: SyncPrefectClient) -> bool:
    state = client.read_flow_run(run).state
    return state is not None and not state.is_final()
