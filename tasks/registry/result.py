"""The result of a variant: what is recorded of its evaluation and its calibration, and what identifies it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

import pandas as pd

from benchmarks.compare import FULL, scores_table
from benchmarks.results import Metrics
from tasks.config.sections import EvaluateParams
from tasks.files import EVALUATION, MODELS, existing
from tasks.registry.provenance import benchmark_digest
from tasks.registry.runs import CHECKPOINT, allowed_name
from tlq.results import CalibrationReport
from tlq.runtime.digest import checkpoint_digest

#: Parameters of the evaluation that do not change the score of an item.
_NOT_SCORES = ("batch_size", "resamples", "max_skipped", "benchmarks")


@dataclass(frozen=True)
class Result:
    """Results of a variant's evaluation and, except for full precision, its calibration.

    Attributes:
        metrics: evaluation/<variant>/metrics.json.
        calibration: models/<variant>/calibration.json; None for full precision.
        items: task, doc and score of every item.
        identity: tags that say what was scored, how, and with which result.
    """

    variant: str
    metrics: Metrics
    calibration: CalibrationReport | None
    items: pd.DataFrame
    identity: dict[str, str]

    @property
    def main_metrics(self) -> dict[str, float]:
        """The numbers that variants are compared by; metrics.json and calibration.json hold all numbers.

        Scores, retention and flips are in percent, KL in nats per answer token, sizes in bytes.
        """
        mean = self.metrics.mean
        values: dict[str, float | None] = {
            "mean/score": mean.score,
            "mean/retention": mean.retention,
            "mean/flips": mean.flips,
            "mean/kl": mean.kl,
        }
        values |= {f"{name}/score": entry.score for name, entry in self.metrics.entries}
        if self.calibration is not None:
            layers = self.calibration.layers
            values["size_bytes"] = sum(file.stat().st_size for file in (MODELS / self.variant).glob("*.safetensors"))
            values["seconds"] = sum(layer.seconds or 0 for layer in layers)
            for name in ("peak_host_bytes", "peak_device_bytes"):
                peaks = [getattr(layer, name) for layer in layers]
                values[name] = max((peak for peak in peaks if peak is not None), default=None)
        return {allowed_name(name): float(value) for name, value in values.items() if value is not None}

    @property
    def summary(self) -> str:
        """The main numbers in one line, and the scores as a table."""
        mean = self.metrics.mean
        values = {"score": mean.score, "retention": mean.retention, "kl": mean.kl}
        line = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None)
        return f"{self.variant}: {line}\n\n```\n{scores_table([self.metrics])}\n```"


def read_result(variant: str, evaluation: EvaluateParams) -> Result:
    """Read a variant's results. Raises FileNotFoundError, with the stage to run, if a file is missing."""
    stage = "baseline" if variant == FULL else f"evaluate@{variant}"
    metrics = Metrics.load(existing(EVALUATION / variant / "metrics.json", stage))
    items = pd.read_parquet(existing(EVALUATION / variant / "items.parquet", stage), columns=["task", "doc", "score"])
    identity = {
        "variant": variant,
        "evaluation": evaluation_digest(evaluation),
        "scores": json.dumps(metrics.mean.to_dict(), sort_keys=True),
    }
    if variant == FULL:
        return Result(variant, metrics, None, items, identity)
    checkpoint = MODELS / variant
    calibration = CalibrationReport.load(existing(checkpoint / "calibration.json", f"calibrate@{variant}"))
    return Result(variant, metrics, calibration, items, identity | {CHECKPOINT: checkpoint_digest(checkpoint)})


def evaluation_digest(params: EvaluateParams) -> str:
    """Digest of an evaluation: items, full precision's answers, data, parameters. Equal digests: comparable scores."""
    path = existing(EVALUATION / FULL / "items.parquet", "baseline")
    full = pd.read_parquet(path, columns=["task", "doc", "target", "reply"])
    total = hashlib.sha256(full.sort_values(["task", "doc"]).to_csv(index=False).encode())
    choices = {name: value for name, value in params.model_dump().items() if name not in _NOT_SCORES}
    asked = [{**asdict(source), "data": benchmark_digest(source)} for source in params.benchmarks]
    total.update(json.dumps([choices, asked], sort_keys=True).encode())
    return total.hexdigest()
