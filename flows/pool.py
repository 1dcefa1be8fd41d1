"""The work pool: the flow that its workers run for a stage, its deployment and an automation.

    python -m flows.pool --deploy

creates the work pool `TLQ_POOL` (default `gpu`), the deployment of the worker flow, and an automation that ends runs
without a heartbeat. docs/cluster.md describes the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import flow
from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import State, StateType
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists
from prefect.runtime import flow_run
from prefect.states import Cancelled

from flows.stages import ROOT, StageFailed, run_command
from tasks.cluster.authenticated import read_secret
from tasks.cluster.clock import WrongClockError, check_clock
from tasks.cluster.store import JobStore, StageGoneError
from tasks.cluster.work_pool import FLOW, fixed_job_template

_HEARTBEAT_SECONDS = 30
_SILENT_SECONDS = 120


@flow(name=FLOW)
def pool_worker(
    store: str, secret: str, agents: int, module: str, arguments: list[str], folder: str
) -> State[Any] | None:
    """Work for a stage with this worker's GPU until the stage's result is complete or it stops this worker.

    Args:
        store: host and port of the stage's store.
        secret: file with the secret of the stage's job, which other users cannot read.
        agents: maximum number of workers that share the stage.
        module, arguments: module that every rank runs, and its arguments.
        folder: working directory: the stage's own folder, on a file system that all workers share.
    """
    name = str(flow_run.id)
    command = [sys.executable, "-m", "tasks.cluster.agent", "--store", store, "--secret", secret]
    command += ["--name", name, "--agents", str(agents), module, *arguments]
    try:
        meeting = JobStore.join(store, read_secret(Path(secret)))
        check_clock(meeting, name)
        try:
            run_command(command, module, Path(folder), meeting.send_line)
        except StageFailed:
            if not meeting.stopped(name):
                raise
            return Cancelled(message="the stage no longer needs this worker")
    except WrongClockError as error:  # Cancelled, not Failed: another run would go to the same idle worker
        meeting.send_line(str(error))
        return Cancelled(message=str(error))
    except (StageGoneError, FileNotFoundError) as error:
        return Cancelled(message=str(error))
    return None


def deploy(pool: str) -> None:
    """Create or update the pool, its deployment and its automation on the server of ``PREFECT_API_URL``."""
    with get_client(sync_client=True) as client:
        template = fixed_job_template(
            ROOT,
            {
                "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(_HEARTBEAT_SECONDS),
                "TORCH_CPP_LOG_LEVEL": "ERROR",  # a lost connection logs one line, no stack trace
            },
            stream_output=False,  # else a run whose worker has died crashes at its next line of output
        )
        try:
            client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=template))
        except ObjectAlreadyExists:  # an existing pool keeps its concurrency limit
            client.update_work_pool(pool, WorkPoolUpdate(base_job_template=template))
        deployment = RunnerDeployment.from_flow(
            pool_worker,
            name=pool,
            work_pool_name=pool,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        deployment.entrypoint = f"flows.pool.{pool_worker.fn.__name__}"  # here the module may be __main__
        _end_silent_runs(client, pool, cast(UUID, deployment.apply()))


def _end_silent_runs(client: SyncPrefectClient, pool: str, deployment: UUID) -> None:
    """Let the server set runs without a heartbeat to Crashed, so that they free their slot.

    A running stage does the same earlier (``tasks.cluster.watch``). The automation covers runs whose worker, process
    and stage have all died, so that no process reports their end.
    """
    name = f"{FLOW}/{pool}: nothing heard"
    ends = [f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Crashed", "Cancelled")]
    automation = AutomationCore(
        name=name,
        description="Worker flow runs that have given no heartbeat are set to Crashed and free their slot.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ends},
            match=ResourceSpecification.model_validate({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification.model_validate(
                {"prefect.resource.id": f"prefect.deployment.{deployment}"}
            ),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=_SILENT_SECONDS),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED, name="Crashed", force=True, message=f"no heartbeat for {_SILENT_SECONDS} s"
            )
        ],
    )
    for old in client.read_automations_by_name(name):
        client.delete_automation(old.id)
    client.create_automation(automation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deploy", action="store_true", required=True, help="create the pool and its deployment")
    parser.parse_args()
    if not os.environ.get("PREFECT_API_URL"):
        sys.exit("PREFECT_API_URL names no Prefect server; start one with `prefect server start` and set it")
    pool = os.environ.get("TLQ_POOL", "gpu")
    deploy(pool)
    sys.stdout.write(f"work pool {pool} and deployment {FLOW}/{pool} are ready; start one worker per GPU:\n")
    sys.stdout.write(f"  CUDA_VISIBLE_DEVICES=0 prefect worker start --pool {pool} --limit 1\n")


if __name__ == "__main__":
    main()
