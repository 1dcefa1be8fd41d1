"""Log the reports of calibrated layers as MLflow metrics, one step per layer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tasks.registry.runs import log_metrics
from tlq.results import CalibrationReport, LayerReport

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric


def layer_metrics(report: LayerReport) -> list[Metric]:
    """Metrics of a layer's report; their step is the layer index.

    The error of a layer is the sum over its groups, whose own errors are in calibration.json. Values that were not
    measured are left out.
    """
    from mlflow.entities import Metric

    now = int(1000 * time.time())
    values: dict[str, float | None] = {"layer/seconds": report.seconds}
    for name in ("error_before", "error_after"):
        errors: list[float | None] = [getattr(group, name) for group in report.groups]
        known = [error for error in errors if error is not None]
        values[f"layer/{name}"] = sum(known) if known else None
    return [Metric(name, float(value), now, report.layer) for name, value in values.items() if value is not None]


def fill_in_layers(client: MlflowClient, run_id: str, calibration: CalibrationReport) -> int:
    """Log the layers of calibration.json that the run does not have yet; returns their number."""
    logged: dict[str, set[int]] = {}
    missing: list[Metric] = []
    layers = 0
    for metrics in map(layer_metrics, calibration.layers):
        if not metrics:
            continue
        name, step = metrics[0].key, metrics[0].step  # a layer's metrics are logged together, so checking one is enough
        if name not in logged:
            logged[name] = {metric.step for metric in client.get_metric_history(run_id, name)}
        if step not in logged[name]:
            missing += metrics
            layers += 1
    log_metrics(client, run_id, missing)
    return layers
