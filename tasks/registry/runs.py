"""Find and create MLflow runs, log to them, and set their final status.

MLflow is imported inside functions, because its import takes two seconds and other ranks do not need it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tasks.config.environment import without_secrets
from tasks.registry.connection import first_line, retry_on_conflict

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Run

logger = logging.getLogger("tlq.tracking")

#: Tags of a run: the digest of the checkpoint that it made, and the reason why it failed.
CHECKPOINT, ERROR = "checkpoint", "error"

#: MLflow's name for experiments that train models; the UI would otherwise open as for applications of language models.
_KIND = "custom_model_development"
#: MLflow's tag of the git remote, whose address may hold a token.
_REMOTE = "mlflow.source.git.repoURL"
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100
_FORBIDDEN = re.compile(r"[^\w\-. /:]")


def experiment_id(client: MlflowClient, name: str) -> str:
    """Id of the experiment ``name``, created if it does not exist; another process may create it at the same time."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, tags={"mlflow.experimentKind": _KIND}))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise error
    if found.lifecycle_stage != "active":
        raise ValueError(
            f"MLflow experiment {name} is deleted; restore it (`mlflow experiments restore -x {found.experiment_id}`), "
            "or change register.experiment"
        )
    return str(found.experiment_id)


def new_run(client: MlflowClient, experiment: str, name: str, tags: Mapping[str, str]) -> str:
    """Id of a new run with ``tags`` and MLflow's own tags (user, source, commit)."""
    from mlflow.tracking.context.registry import resolve_tags

    known = resolve_tags(dict(tags))
    if remote := known.get(_REMOTE):
        known[_REMOTE] = without_secrets(remote)
    run = client.create_run(experiment_id(client, experiment), tags=known, run_name=name)
    return str(run.info.run_id)


def find_runs(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> list[Run]:
    """Runs that have all of these tags, the latest first."""
    terms = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
    wanted = [experiment_id(client, experiment)]
    return list(client.search_runs(wanted, " and ".join(terms), order_by=["attributes.start_time DESC"]))


def log_metrics(client: MlflowClient, run_id: str, metrics: Sequence[Metric]) -> None:
    for start in range(0, len(metrics), _METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + _METRICS_AT_ONCE])


def log_params(client: MlflowClient, run_id: str, values: Mapping[str, Any]) -> None:
    """Log parameters under dotted names; parameters that the run already has keep their values."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    params = [Param(name, str(value)) for name, value in flatten(values) if name not in known]
    for start in range(0, len(params), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[start : start + _PARAMS_AT_ONCE])


def log_inputs(client: MlflowClient, run_id: str, inputs: Sequence[DatasetInput]) -> None:
    """Log the data sets that the run does not have yet."""
    if inputs:
        retry_on_conflict(lambda: client.log_inputs(run_id, datasets=list(inputs)))


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Set the tags that the run does not have with these values."""
    from mlflow.entities import RunTag

    known = client.get_run(run_id).data.tags
    client.log_batch(run_id, tags=[RunTag(name, text) for name, text in tags.items() if known.get(name) != text])


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested mappings to dotted names, with `_` for characters that MLflow does not allow in a name."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield allowed_name(name), value


def allowed_name(name: str) -> str:
    """A name of a metric or parameter with `_` for characters that MLflow does not allow."""
    return _FORBIDDEN.sub("_", name)


def resume(client: MlflowClient, run_id: str) -> None:
    """Set a run that has ended or was interrupted to RUNNING again."""
    client.update_run(run_id, status="RUNNING")
    if ERROR in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, ERROR)


@contextmanager
def running(client: MlflowClient, run_id: str) -> Iterator[None]:
    """Keep a run RUNNING inside the block. It ends FINISHED, FAILED with the reason as a tag, or KILLED by Ctrl-C."""
    resume(client, run_id)
    try:
        yield
    except KeyboardInterrupt:
        _end_badly(client, run_id, "KILLED", "interrupted; the same command continues")
        raise
    except BaseException as error:
        _end_badly(client, run_id, "FAILED", first_line(error))
        raise
    client.set_terminated(run_id, "FINISHED")


def _end_badly(client: MlflowClient, run_id: str, status: str, reason: str) -> None:
    """Set the final status, but only log a failure of MLflow itself, so that the first error is the one raised."""
    from mlflow.exceptions import MlflowException

    try:
        client.set_tag(run_id, ERROR, reason)
        client.set_terminated(run_id, status)
    except (MlflowException, OSError) as unreachable:
        logger.warning("run %s: status %s is not recorded in MLflow: %s", run_id, status, first_line(unreachable))
