"""The tasks of a cancelled flow run end as Cancelled."""

from __future__ import annotations

import sys
import time
from uuid import UUID

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import StateType
from prefect.context import get_run_context
from prefect.states import Completed, Running
from support.waiting import eventually

from flows import hooks, stages
from flows.overview import Overview
from services.processes import OWNER, owner, with_environment


def states(flow_run: UUID) -> dict[str, StateType | None]:
    only = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run]))
    with get_client(sync_client=True) as client:
        return {run.name: run.state_type for run in client.read_task_runs(flow_run_filter=only)}


def flow_run_id() -> UUID:
    run = getattr(get_run_context(), "flow_run", None)
    assert run is not None
    return UUID(str(run.id))


@pytest.mark.parametrize("command", ["REPRO", "CHECK"])
def test_a_command_at_work_ends_as_cancelled_when_its_flow_is_interrupted(
    command: str, prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, command, (sys.executable, "-c", "import time; time.sleep(120)"))
    name = {"REPRO": "slow", "CHECK": "check MLflow"}[command]
    runs: list[UUID] = []

    def at_work() -> bool:
        own = [" ".join(process.cmdline()) for process in with_environment(OWNER, owner())]
        return any("time.sleep(120)" in words for words in own) and states(runs[0]) == {name: StateType.RUNNING}

    @flow
    def interrupted() -> None:
        runs.append(flow_run_id())
        with stages.following(["slow"]):
            if command == "REPRO":
                stages.stage.submit("slow")
            else:
                stages.check_tracking.submit()
            eventually(at_work)
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - start < 100
    assert with_environment(OWNER, owner()) == []
    eventually(lambda: states(runs[0]) == {name: StateType.CANCELLED})


def test_a_stopped_check_whose_exit_status_is_lost_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """psutil may read the status of the command that it stops; ``subprocess`` then assumes 0."""
    overview = Overview(["slow"])
    monkeypatch.setattr(stages, "current", lambda: overview)
    monkeypatch.setattr(stages, "run_command", lambda *_arguments, **_named: overview.stopping.set())
    assert stages.check_tracking.fn().type == StateType.CANCELLED


def test_a_flow_that_ctrl_c_ends_is_cancelled_not_crashed(prefect_server: None) -> None:
    runs: list[UUID] = []

    @flow(**hooks.HOOKS)
    def interrupted() -> None:
        runs.append(flow_run_id())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(runs[0]).state_type == StateType.CANCELLED


def test_the_hook_cancels_the_tasks_that_a_killed_process_left_behind(prefect_server: None) -> None:
    @task
    def work() -> None: ...

    @flow
    def killed() -> None: ...

    with get_client(sync_client=True) as client:
        run = client.create_flow_run(killed)
        for name in ("running", "done"):
            made = client.create_task_run(work, run.id, dynamic_key=name, name=name)
            client.set_task_run_state(made.id, Running(), force=True)
        client.set_task_run_state(made.id, Completed(), force=True)
    assert hooks.cancel_tasks(run) == 1
    assert states(run.id) == {"running": StateType.CANCELLED, "done": StateType.COMPLETED}
