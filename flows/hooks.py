"""Hooks for flow runs that fail, crash or are cancelled. Prefect passes their arguments by name."""

from __future__ import annotations

import re
from typing import Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.logging.loggers import flow_run_logger
from prefect.states import Cancelled

from services.processes import stop_stages

_STAGE = re.compile(r"\b(?P<stage>[a-z]+(?:@[\w-]+)?) failed: (?P<reason>.*)", re.DOTALL)
_CHECK = re.compile(r"\bcheck MLflow failed: (?P<reason>.*)", re.DOTALL)

_UNFINISHED = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CRASHED]

#: Prefect's message of a flow run that Ctrl-C ended.
_INTERRUPTED = "Execution was aborted by an interrupt signal."

_FAILED = """## {what}

```
{reason}
```

1. {cure}
2. Start the flow again, or press *Retry*: finished stages are skipped, and an interrupted stage continues from its last
   finished layer or batch.

The parameters of this run are no longer in params.yaml; fill them in again.
"""

_CRASHED = """## The process of this run ended without an error message

Usually the process was killed: by hand, by a restart of the machine, or because memory ran out (see `dmesg`).
{stopped} of its stages' processes were still running and have been stopped.

1. Check `git diff params.yaml`: the parameters of this run may still be there. `git checkout params.yaml` restores the
   committed values.
2. Start the flow again: finished stages are skipped, and the interrupted stage continues.
3. If memory was short, lower `calibrate.batch_size`, `importance.batch_size` or `evaluate.batch_size`, or set
   `TLQ_PARALLEL=1`.
"""


def advise(flow: Flow[Any, Any], flow_run: FlowRun, state: State) -> None:
    """Write a markdown artifact that says what failed and what to do next, and point to it in the log."""
    text = advice(state.message or "")
    flow_run_logger(flow_run, flow).error("%s", "What to do next is in the artifact what-to-do of this run")
    _publish(text, flow_run)


def clean_up_and_advise(flow: Flow[Any, Any], flow_run: FlowRun, state: State) -> None:
    """Stop the stages that the crashed process of the flow had started, and advise; Ctrl-C is a cancellation."""
    if state.message == _INTERRUPTED:
        stop_its_stages(flow, flow_run, state)
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.id, Cancelled(message="interrupted"), force=True)
        return
    stopped = stop_stages(str(flow_run.id))
    flow_run_logger(flow_run, flow).error("Crashed; what to do next is in the artifact what-to-do of this run")
    _publish(_CRASHED.format(stopped=stopped or "None"), flow_run)


def stop_its_stages(flow: Flow[Any, Any], flow_run: FlowRun, state: State) -> None:
    """Stop the stages of a cancelled run, and set the state of its unfinished tasks to Cancelled."""
    stopped = stop_stages(str(flow_run.id))
    cancelled = cancel_tasks(flow_run)
    flow_run_logger(flow_run, flow).info(
        "Cancelled; %d processes of its stages were stopped, and %d of its tasks are cancelled", stopped, cancelled
    )


def cancel_tasks(flow_run: FlowRun) -> int:
    """Set the tasks of a cancelled run that have not finished to Cancelled; returns their number.

    The process of the run does the same, unless it was killed. A task that crashed did so because of the cancellation.
    """
    flow_filter = FlowRunFilter.model_validate({"id": {"any_": [flow_run.id]}})
    task_filter = TaskRunFilter.model_validate({"state": {"type": {"any_": _UNFINISHED}}})
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs(flow_run_filter=flow_filter, task_run_filter=task_filter)
        for each in tasks:
            client.set_task_run_state(each.id, Cancelled(message="its flow run was cancelled"), force=True)
    return len(tasks)


def advice(message: str) -> str:
    """Markdown advice on a failed run, from its state's message."""
    if check := _CHECK.search(message):
        cure = f"Correct what the message names. {_shown_by('python -m tasks.registry.check')}"
        return _FAILED.format(what="MLflow did not pass the check", reason=check["reason"], cure=cure)
    found = _STAGE.search(message)
    if not found:
        return _FAILED.format(what="The flow failed", reason=message, cure="Correct what the message names.")
    stage = found["stage"]
    return _FAILED.format(what=f"Stage {stage} failed", reason=found["reason"], cure=_cure(stage, found["reason"]))


def _cure(stage: str, reason: str) -> str:
    if "is busy" in reason:
        return "Another `dvc` command is at work in this folder. Wait until it is done."
    if "No such file or directory" in reason:
        return (
            "An output of an earlier stage is missing, perhaps because a run was interrupted: start `quantize` first."
        )
    return f"Correct what the message names. {_shown_by(f'python -m tasks.reproduce --single-item {stage}')}"


def _shown_by(command: str) -> str:
    """Where to see a failure again."""
    return (
        f"`{command}` in the project's folder shows the same failure in a terminal, with `TLQ_LOG=debug` its traceback "
        "too."
    )


def _publish(text: str, flow_run: FlowRun) -> None:
    """Create the artifact through the API, because hooks run outside the flow's context."""
    artifact = ArtifactCreate(key="what-to-do", type="markdown", data=text, flow_run_id=flow_run.id)
    with get_client(sync_client=True) as client:
        client.create_artifact(artifact)


#: The hooks of every flow here, as arguments of ``@flow``.
HOOKS: dict[str, Any] = {
    "on_failure": [advise],
    "on_crashed": [clean_up_and_advise],
    "on_cancellation": [stop_its_stages],
}
