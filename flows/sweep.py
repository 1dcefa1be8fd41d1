"""Flow `sweep`: quantize and score every model with every recipe and scheme.

    python -m flows.sweep --study paper-demo
    python -m flows.sweep --models qwen2-vl-2b qwen2-vl-7b --data sharegpt4v --benchmarks benchmarks

Recipes and schemes are a matrix inside the pipeline, so a sweep is one run of flow `quantize` per model, one after the
other: they share the workspace. Each is saved as a DVC experiment, whose dvc.lock is the model's own. A study is a
sweep with a name (presets/sweep): it keeps its results in sweeps/<name>.csv, and the same command continues it.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State

from flows.artifacts import score_rows
from flows.command import add_common_options, main, settings_of
from flows.form import (
    BenchmarksName,
    DataName,
    Limit,
    Options,
    QuantizeOptions,
    RecipeName,
    SchemeName,
    StudyName,
    preset_names,
)
from flows.hooks import HOOKS
from flows.names import run_name
from flows.parameters import ParametersError
from flows.quantize import quantize
from flows.stages import ROOT, StageFailed
from flows.study import Results, Study, model_name


@flow(name="sweep", flow_run_name=run_name, **HOOKS)
def sweep(
    models: tuple[str, ...] = (),
    data: DataName = "",
    benchmarks: BenchmarksName = "",
    recipes: tuple[RecipeName, ...] = (),
    schemes: tuple[SchemeName, ...] = (),
    limit: Limit | None = None,
    options: Options = Options(),
    study: StudyName = "",
) -> str:
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
        study: A sweep by name, which gives what is empty above. Models with results in sweeps/<name>.csv are not run
            again; remove the file to start anew.
    """
    chosen = Study.read(study) if study else None
    if chosen is not None:
        models, data, benchmarks = models or chosen.models, data or chosen.data, benchmarks or chosen.benchmarks
        recipes, schemes = recipes or chosen.recipes, schemes or chosen.schemes
    if not models:
        raise ParametersError("a sweep needs models: name presets or folders of checkpoints, or a study")
    choices = {
        "data": data,
        "benchmarks": benchmarks,
        "recipes": recipes,
        "schemes": schemes,
        "limit": limit,
        "options": QuantizeOptions(**options.model_dump()),
    }
    wanted = {f"{recipe}-{scheme}" for recipe in recipes for scheme in schemes} if chosen is not None else set()
    results, failed = Results(study), {}
    for number, model in enumerate(models, 1):
        name = model_name(model)
        if results.has(name, wanted):
            get_run_logger().info("model %d of %d: %s has its results already", number, len(models), model)
            continue
        get_run_logger().info("model %d of %d: %s", number, len(models), model)
        state: State = quantize(model=model, **choices, return_state=True)
        if state.is_completed():
            results.put(name, score_rows(variants_registered()))
        else:
            failed[model] = state.message or str(state.name)
        if results.rows:
            create_table_artifact(results.rows, key="sweep", description="Scores of every model and variant so far")
    if failed:
        reasons = "; ".join(f"{model}: {reason}" for model, reason in failed.items())
        raise StageFailed(f"{len(failed)} of {len(models)} models failed: {reasons}")
    return results.table(chosen.published if chosen is not None else {})


def variants_registered() -> Sequence[str]:
    """Variants of the last run, full precision first."""
    return [row["variant"] for row in json.loads((ROOT / "registry.json").read_text())]


def add_options(parser: ArgumentParser) -> None:
    """Add an option for each parameter of the flow."""
    parser.add_argument("--study", default="", choices=preset_names("sweep"), help="a sweep of presets/sweep")
    parser.add_argument("--models", nargs="+", default=[], metavar="MODEL", help="presets or folders of checkpoints")
    parser.add_argument("--data", default="", choices=preset_names("calibration"), help="calibration data")
    parser.add_argument("--benchmarks", default="", choices=preset_names("benchmarks"), help="benchmarks")
    parser.add_argument("--recipes", nargs="+", default=[], metavar="RECIPE", help="methods")
    parser.add_argument("--schemes", nargs="+", default=[], metavar="SCHEME", help="number formats")
    add_common_options(parser)


def parameters_of(options: Namespace) -> dict[str, Any]:
    """The parameters of the flow that a command line gives."""
    further = Options(settings=settings_of(options), promote=options.promote)
    names = ("study", "data", "benchmarks", "limit")
    several = ("models", "recipes", "schemes")
    given = {name: getattr(options, name) for name in names} | {name: tuple(getattr(options, name)) for name in several}
    return {**given, "options": further}


if __name__ == "__main__":
    main(sweep, __doc__, add_options, parameters_of)
