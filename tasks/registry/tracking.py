"""MLflow runs: one for each variant, from the first calibrated layer to the registered version.

Stage `calibrate` opens the run of a variant and shows every layer there as it is finished; `register` continues it.
MLflow is imported where it is first needed: it takes two seconds, which other ranks and failing commands need not wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tasks.config.params import PARAMS, section
from tasks.registry.gate import Bounds
from tasks.registry.lineage import locked_outputs
from tasks.registry.provenance import calibration_inputs, lineage, machine
from tlq.quantization.formats import Scheme
from tlq.recipes import Recipe
from tlq.results import CalibrationReport, LayerReport
from tlq.runtime.digest import digest
from tlq.runtime.resume import model_digest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Run

logger = logging.getLogger("tlq.tracking")

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
#: Sections of params.yaml that a checkpoint is made with, beside its recipe and scheme.
SECTIONS = ("model", "prepare", "importance", "calibset", "calibrate")
#: Tag of a run that says which checkpoint came of it, and tag that says why it failed.
CHECKPOINT, ERROR = "checkpoint", "error"

_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100
_RETRY_SECONDS = 120.0
_FORBIDDEN = re.compile(r"[^\w\-. /:]")

OnLayer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class RegisterParams(Bounds):
    """Section `register` of params.yaml: where results go, and the bounds of the gate.

    Attributes:
        model_name: registered models are called <model_name>-<scheme>, their versions are the variants.
        experiment: MLflow experiment of the runs.
        max_new_tokens: longest answer of the registered model.
    """

    model_name: str
    experiment: str = "tlq"
    max_new_tokens: int = 64


def register_params() -> RegisterParams | None:
    """The section, None if params.yaml has none: then nothing is recorded in MLflow."""
    content = yaml.safe_load(PARAMS.read_text()) if PARAMS.exists() else {}
    return section("register", RegisterParams) if "register" in content else None


def connect() -> MlflowClient:
    """A client of ``MLFLOW_TRACKING_URI``, or of mlflow.db in this folder.

    Raises:
        ConnectionError: MLflow does not answer.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a new database is made in seventy logged steps
    mlflow.set_tracking_uri(uri)
    try:
        with _alone_in_database(uri):
            client = mlflow.MlflowClient()
            client.search_experiments(max_results=1)
    except MlflowException as error:
        raise ConnectionError(
            f"MLflow at {uri} does not answer ({first_line(error)}); start it, or correct MLFLOW_TRACKING_URI"
        ) from error
    return client


@contextmanager
def _alone_in_database(uri: str) -> Iterator[None]:
    """MLflow 3.17 makes the tables of a new SQLite database without a lock: of two processes at once one would fail."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment called ``name``, made if there is none; another process may make it at the same moment."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
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
    """Id of a new run with MLflow's own tags (user, source, commit) beside ``tags``."""
    from mlflow.tracking.context.registry import resolve_tags

    run = client.create_run(experiment_id(client, experiment), tags=resolve_tags(dict(tags)), run_name=name)
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
    """Parameters under dotted names; those that the run has already keep the value they had."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    params = [Param(name, str(value)) for name, value in flatten(values) if name not in known]
    for start in range(0, len(params), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=params[start : start + _PARAMS_AT_ONCE])


def log_inputs(client: MlflowClient, run_id: str, inputs: Sequence[DatasetInput]) -> None:
    """Data sets that the run has already are not logged twice."""
    if inputs:
        again_if_beaten(lambda: client.log_inputs(run_id, datasets=list(inputs)))


def again_if_beaten(action: Callable[[], None], attempts: int = 5) -> None:
    """Do what may be done twice again if another process was faster with a part of it.

    MLflow's stores look whether a row is there and insert it if not. What somebody else inserts in between breaks a
    constraint of the database (BAD_REQUEST), and is found at the next look.
    """
    from mlflow.exceptions import MlflowException

    for left in reversed(range(attempts)):
        try:
            return action()
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST" or not left:
                raise
    raise ValueError(f"attempts is {attempts}; it must be at least 1")


def set_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags that differ from what the run has."""
    from mlflow.entities import RunTag

    known = client.get_run(run_id).data.tags
    client.log_batch(run_id, tags=[RunTag(name, text) for name, text in tags.items() if known.get(name) != text])


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names, with `_` for what MLflow does not allow in a name."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield _FORBIDDEN.sub("_", name), value


def numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers among nested mappings, as dotted names."""
    for name, value in flatten(values):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a log or a tag."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


# --- Layers ---------------------------------------------------------------------------------------


def layer_metrics(report: LayerReport) -> list[Metric]:
    """The report of a layer as metrics whose step is the layer.

    Errors of the layer are sums over its groups; what was not measured is left out.
    """
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    values: dict[str, float | None] = {
        "layer/seconds": report.seconds,
        "layer/peak_host_bytes": report.peak_host_bytes,
        "layer/peak_device_bytes": report.peak_device_bytes,
    }
    for name in ("error_before", "error_after"):
        errors: dict[str, float | None] = {group.group: getattr(group, name) for group in report.groups}
        values |= {f"layer/{group}/{name}": error for group, error in errors.items()}
        known = [error for error in errors.values() if error is not None]
        values[f"layer/{name}"] = sum(known) if known else None
    return [Metric(name, float(value), now, report.layer) for name, value in values.items() if value is not None]


def fill_in_layers(client: MlflowClient, run_id: str, calibration: CalibrationReport) -> int:
    """Log the layers of calibration.json that the run does not have yet; returns how many."""
    logged: dict[str, set[int]] = {}
    missing: list[Metric] = []
    layers = 0
    for metrics in map(layer_metrics, calibration.layers):
        if not metrics:
            continue
        name, step = metrics[0].key, metrics[0].step  # a layer's metrics are logged together: one stands for all
        if name not in logged:
            logged[name] = {metric.step for metric in client.get_metric_history(run_id, name)}
        if step not in logged[name]:
            missing += metrics
            layers += 1
    log_metrics(client, run_id, missing)
    return layers


# --- A calibration, live --------------------------------------------------------------------------


class LiveRun:
    """The run of a variant while it is calibrated.

    Metrics that cannot be sent are kept and sent with those of a later layer; calibration goes on meanwhile.
    """

    def __init__(self, client: MlflowClient, run_id: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.client = client
        self.run_id = run_id
        self._clock = clock
        self._unsent: list[Metric] = []
        self._next_try = clock()
        self._warned = False

    def log_layer(self, report: dict[str, Any]) -> None:
        self._unsent += layer_metrics(LayerReport.from_dict(report))
        if self._clock() >= self._next_try:
            self._attempt(self._send)

    def end(self, status: str, tags: Mapping[str, str]) -> None:
        def finish() -> None:
            self._send()
            set_tags(self.client, self.run_id, tags)
            self.client.set_terminated(self.run_id, status)

        self._attempt(finish)

    def _send(self) -> None:
        log_metrics(self.client, self.run_id, self._unsent)
        self._unsent = []

    def _attempt(self, action: Callable[[], None]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            action()
        except (MlflowException, OSError) as error:
            self._next_try = self._clock() + _RETRY_SECONDS
            level = logging.DEBUG if self._warned else logging.WARNING
            self._warned = True
            logger.log(
                level,
                "run %s: MLflow does not answer (%s); calibration goes on. Metrics of its layers are sent when MLflow "
                "is back, at the latest by stage `register`, from calibration.json",
                self.run_id,
                first_line(error),
            )


@contextmanager
def tracked_calibration(
    out: Path, model: Path, recipe: Recipe, scheme: Scheme, leads: bool
) -> Iterator[OnLayer | None]:
    """Show the making of checkpoint ``out`` in MLflow; yields what to call with the report of each finished layer.

    A calibration that is continued continues its run. The run ends FINISHED with the checkpoint's digest as a tag,
    FAILED with the reason, or KILLED when it was interrupted. Nothing is recorded by other ranks than the leading one,
    and nothing if params.yaml has no section `register`.

    Raises:
        ConnectionError: MLflow does not answer when the work is to begin.
    """
    params = register_params() if leads else None
    if params is None:
        yield None
        return
    live, continued = _open(connect(), params, out.name, model, recipe, scheme)
    try:
        yield live.log_layer
    except BlockingIOError as error:
        if not continued:  # else the run belongs to the process that does this work
            live.end("FAILED", {ERROR: first_line(error)})
        raise
    except KeyboardInterrupt:
        live.end("KILLED", {ERROR: "interrupted; the same command continues"})
        raise
    except BaseException as error:
        live.end("FAILED", {ERROR: first_line(error)})
        raise
    live.end("FINISHED", {CHECKPOINT: digest(out)})


def _open(
    client: MlflowClient, params: RegisterParams, variant: str, model: Path, recipe: Recipe, scheme: Scheme
) -> tuple[LiveRun, bool]:
    """The run of this work and whether it was begun before."""
    content = yaml.safe_load(PARAMS.read_text())
    made_with = {name: content[name] for name in SECTIONS if name in content}
    made_with |= {"recipe": asdict(recipe), "scheme": asdict(scheme)}
    tags = {"stage": "calibrate", "variant": variant, "fingerprint": _fingerprint(made_with, variant, model)}
    begun = [run for run in find_runs(client, params.experiment, tags) if CHECKPOINT not in run.data.tags]
    if begun:
        run_id = str(begun[0].info.run_id)
        resume(client, run_id)
        logger.info("%s continues MLflow run %s", variant, run_id)
        return LiveRun(client, run_id), True
    run_id = new_run(client, params.experiment, variant, {**tags, **lineage(variant), **machine()})
    log_params(client, run_id, made_with)
    log_inputs(client, run_id, calibration_inputs(recipe))
    return LiveRun(client, run_id), False


def _fingerprint(made_with: Mapping[str, Any], variant: str, model: Path) -> str:
    """Changes with whatever makes it other work: parameters, model, or DVC's hashes of the data."""
    stages = ("prepare", "importance", "calibset")
    data = {output.path: output.md5 for output in locked_outputs([variant]) if output.stage in stages}
    parts = {"params": made_with, "data": data, "model": model_digest(model)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


# --- Ends -----------------------------------------------------------------------------------------


def resume(client: MlflowClient, run_id: str) -> None:
    """Mark a run that ended, or that was cut off, as running again."""
    client.update_run(run_id, status="RUNNING")
    if ERROR in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, ERROR)


@contextmanager
def running(client: MlflowClient, run_id: str) -> Iterator[None]:
    """A run that is RUNNING inside the block, then FINISHED; FAILED with the reason as a tag, KILLED by Ctrl-C."""
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
    """MLflow may be what failed: then the log says it, and the error that brought us here is the one to see."""
    from mlflow.exceptions import MlflowException

    try:
        client.set_tag(run_id, ERROR, reason)
        client.set_terminated(run_id, status)
    except (MlflowException, OSError) as unreachable:
        logger.warning("run %s: that it is %s is not recorded in MLflow: %s", run_id, status, first_line(unreachable))


@contextmanager
def recorded_failure(stage: str, variant: str) -> Iterator[None]:
    """Leave a FAILED run with the reason in MLflow if the block fails; the error goes on its way in any case."""
    try:
        yield
    except Exception as error:
        params = register_params()
        if params is not None:
            _record(params, stage, variant, error)
        raise


def _record(params: RegisterParams, stage: str, variant: str, error: Exception) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client = connect()
        tags = {"stage": stage, "variant": variant, ERROR: first_line(error)}
        client.set_terminated(new_run(client, params.experiment, f"{stage} {variant}", tags), "FAILED")
    except (MlflowException, OSError) as unreachable:
        logger.warning("the failure of %s %s is not recorded in MLflow: %s", stage, variant, first_line(unreachable))


def pages(search: Callable[[str | None], Any]) -> Iterable[Any]:
    """Everything that a search of MLflow finds, page by page."""
    token = None
    while True:
        found = search(token)
        yield from found
        token = found.token
        if not token:
            return
