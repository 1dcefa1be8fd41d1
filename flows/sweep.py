"""Flow `sweep`: quantize and score every model with every recipe and scheme.

Recipes and schemes are a matrix inside the pipeline, so a sweep is one run of flow `quantize` per model, one after the
other: they share the workspace. Each is saved as a DVC experiment, whose dvc.lock is the model's own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State

from flows.artifacts import score_rows
from flows.form import BenchmarksName, DataName, Limit, Options, QuantizeOptions, RecipeName, SchemeName
from flows.hooks import HOOKS
from flows.names import run_name
from flows.quantize import quantize
from flows.stages import ROOT, StageFailed


@flow(name="sweep", flow_run_name=run_name, **HOOKS)
def sweep(
    models: list[str],
    data: DataName = "",
    benchmarks: BenchmarksName = "",
    recipes: tuple[RecipeName, ...] = (),
    schemes: tuple[SchemeName, ...] = (),
    limit: Limit | None = None,
    options: Options = Options(),
) -> None:
    """Quantize, score and register several models; if one fails, the others still run.

    Each model is a run of flow `quantize` and a DVC experiment, see `dvc exp show`. Its models are registered as
    `<model>-<scheme>`.

    Args:
        models: Presets (`qwen2-vl-2b`) or folders of checkpoints; real models also need `data` and `benchmarks`.
        data: Calibration data, `demo` for the demo's. Empty: section `prepare` of params.yaml.
        benchmarks: Benchmarks, `demo` for the demo's. Empty: `evaluate.benchmarks` of params.yaml.
        recipes: Quantization methods. Empty: `variants.recipes` of params.yaml.
        schemes: Number formats, each made with every recipe. Empty: `variants.schemes` of params.yaml.
        limit: Items per benchmark, 0 for all. Empty: `evaluate.limit` of params.yaml.
        options: Other values of params.yaml and promotion to champion, for every model.
    """
    choices = {
        "data": data,
        "benchmarks": benchmarks,
        "recipes": recipes,
        "schemes": schemes,
        "limit": limit,
        "options": QuantizeOptions(**options.model_dump()),
    }
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for number, model in enumerate(models, 1):
        get_run_logger().info("model %d of %d: %s", number, len(models), model)
        state: State = quantize(model=model, **choices, return_state=True)
        if state.is_completed():
            rows += [{"model": Path(model).name, **row} for row in score_rows(variants_registered())]
        else:
            failed[model] = state.message or str(state.name)
        if rows:
            create_table_artifact(rows, key="sweep", description="Scores of every model and variant so far")
    if failed:
        reasons = "; ".join(f"{model}: {reason}" for model, reason in failed.items())
        raise StageFailed(f"{len(failed)} of {len(models)} models failed: {reasons}")


def variants_registered() -> Sequence[str]:
    """Variants of the last run, full precision first."""
    return [row["variant"] for row in json.loads((ROOT / "registry.json").read_text())]
