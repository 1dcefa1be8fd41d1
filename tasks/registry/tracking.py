"""Track every variant in one MLflow run, from the first calibrated layer to the registered version.

Stage `calibrate` opens the run of a variant and logs every finished layer; stage `register` continues the run.
MLflow is imported inside functions, because its import takes two seconds and other ranks do not need it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tasks.config.params import PARAMS, section
from tasks.config.sections import RegisterParams
from tasks.registry.connection import connect, first_line
from tasks.registry.layers import layer_metrics
from tasks.registry.lineage import locked_outputs
from tasks.registry.provenance import calibration_inputs, lineage, machine
from tasks.registry.runs import (
    CHECKPOINT,
    ERROR,
    find_runs,
    log_inputs,
    log_metrics,
    log_params,
    new_run,
    resume,
    set_tags,
)
from tlq.calibration.job import CalibrationJob
from tlq.models.stored import source_digest
from tlq.results import LayerReport
from tlq.runtime.digest import checkpoint_digest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

logger = logging.getLogger("tlq.tracking")

#: Sections of params.yaml that a checkpoint is made with, in addition to its recipe and scheme.
SECTIONS = ("model", "prepare", "importance", "calibset", "calibrate")
_RETRY_SECONDS = 120.0

OnLayer = Callable[[dict[str, Any]], None]


def register_params() -> RegisterParams | None:
    """Section `register` of params.yaml; None if it is missing, and then nothing is recorded in MLflow."""
    content = yaml.safe_load(PARAMS.read_text()) if PARAMS.exists() else {}
    return section("register", RegisterParams) if "register" in content else None


# --- Live calibration -----------------------------------------------------------------------------


class LiveRun:
    """The run of a variant while it is calibrated.

    Metrics that cannot be sent are kept and sent with the metrics of a later layer; calibration does not wait.
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
def tracked_calibration(out: Path, model: Path, job: CalibrationJob) -> Iterator[OnLayer | None]:
    """Record the calibration of checkpoint ``out`` in MLflow; yields a function to call with each layer's report.

    A resumed calibration continues its run. The run ends FINISHED with the checkpoint's digest as a tag, FAILED with
    the reason, or KILLED if it was interrupted. Only the leading rank records, and only if params.yaml has a section
    `register`; otherwise this yields None.

    Raises:
        ConnectionError: MLflow does not answer at the start.
    """
    params = register_params() if job.ranks.leads else None
    if params is None:
        yield None
        return
    live, continued = _open(connect(), params, out.name, model, job)
    try:
        yield live.log_layer
    except BlockingIOError as error:
        if not continued:  # else another process owns the run
            live.end("FAILED", {ERROR: first_line(error)})
        raise
    except KeyboardInterrupt:
        live.end("KILLED", {ERROR: "interrupted; the same command continues"})
        raise
    except BaseException as error:
        live.end("FAILED", {ERROR: first_line(error)})
        raise
    live.end("FINISHED", {CHECKPOINT: checkpoint_digest(out)})


def _open(
    client: MlflowClient, params: RegisterParams, variant: str, model: Path, job: CalibrationJob
) -> tuple[LiveRun, bool]:
    """The run of this calibration, and whether an earlier process began it."""
    content = yaml.safe_load(PARAMS.read_text())
    made_with = {name: content[name] for name in SECTIONS if name in content}
    made_with |= {"recipe": asdict(job.recipe), "scheme": asdict(job.scheme)}
    tags = {"stage": "calibrate", "variant": variant, "fingerprint": _fingerprint(made_with, variant, model)}
    begun = [run for run in find_runs(client, params.experiment, tags) if CHECKPOINT not in run.data.tags]
    if begun:
        run_id = str(begun[0].info.run_id)
        resume(client, run_id)
        logger.info("%s continues MLflow run %s", variant, run_id)
        return LiveRun(client, run_id), True
    run_id = new_run(client, params.experiment, variant, {**tags, **lineage(variant), **machine()})
    log_params(client, run_id, made_with)
    log_inputs(client, run_id, calibration_inputs(job.recipe, job.scheme))
    return LiveRun(client, run_id), False


def _fingerprint(made_with: Mapping[str, Any], variant: str, model: Path) -> str:
    """Digest of everything that the calibration depends on: parameters, model, and DVC's hashes of the data."""
    stages = ("prepare", "importance", "calibset")
    data = {output.path: output.md5 for output in locked_outputs([variant]) if output.stage in stages}
    parts = {"params": made_with, "data": data, "model": source_digest(model)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


# --- Failures -------------------------------------------------------------------------------------


@contextmanager
def recorded_failure(stage: str, variant: str) -> Iterator[None]:
    """Record a FAILED run with the reason in MLflow if the block fails, and raise the error again."""
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
