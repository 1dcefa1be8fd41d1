"""Flow `quantize`: from calibration data to registered, scored models.

    python -m flows.quantize
    python -m flows.quantize --model qwen2-vl-2b --data textvqa-train --benchmarks text-benchmarks

The flow runs the DVC stages in order. With PREFECT_API_URL set, the run appears on that server; without it, Prefect
starts a server for the run.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows import parameters
from flows.artifacts import publish_overrides, publish_results
from flows.command import add_common_options, main, settings_of
from flows.form import (
    STAGES,
    BenchmarksName,
    DataName,
    Inputs,
    Limit,
    QuantizeOptions,
    RecipeName,
    SchemeName,
    preset_names,
)
from flows.hooks import HOOKS
from flows.names import experiment_name, run_name
from flows.stages import LAST, check_tracking, following, report_and_register, run_stage, stage, stages_at_once
from tasks.config.params import section
from tasks.config.sections import VariantParams
from tlq.recipes import RECIPES


@flow(
    name="quantize",
    flow_run_name=run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=stages_at_once()),
    **HOOKS,
)
def quantize(
    model: str = "",
    data: DataName = "",
    benchmarks: BenchmarksName = "",
    recipes: tuple[RecipeName, ...] = (),
    schemes: tuple[SchemeName, ...] = (),
    limit: Limit | None = None,
    options: QuantizeOptions = QuantizeOptions(),
) -> str:
    """Prepare data, score tokens, choose the token set, then calibrate, evaluate and register every variant.

    Without parameters the flow runs the stale stages with the values of params.yaml. The parameters given replace
    values of params.yaml for this run, which is saved as a DVC experiment. Returns the table of scores.

    Args:
        model: Preset (`qwen2-vl-2b`) or folder of the checkpoint to quantize; a real model also needs `data` and
            `benchmarks`. Empty: `model.path` of params.yaml.
        data: Calibration data, `demo` for the demo's. Empty: section `prepare` of params.yaml.
        benchmarks: Benchmarks, `demo` for the demo's. Empty: `evaluate.benchmarks` of params.yaml.
        recipes: Quantization methods. Empty: `variants.recipes` of params.yaml.
        schemes: Number formats, each combined with every recipe. Empty: `variants.schemes` of params.yaml.
        limit: Items per benchmark, 0 for all. Empty: `evaluate.limit` of params.yaml.
        options: Other values of params.yaml, promotion to champion, name of the registered models, stages to force.
    """
    values = parameters.overrides(Inputs(model, data, benchmarks), recipes, schemes, limit, options)
    publish_overrides(values, experiment_name())
    with parameters.overridden(values):
        variants = section("variants", VariantParams, parameters.PARAMS).names
        with following(stages_of(variants)):
            run_stages(variants, options.force)
        return publish_results(["full", *variants])


def stages_of(variants: Sequence[str]) -> list[str]:
    """All stages of a run, in order."""
    downloads = [f"fetch@{name}" for name in section("fetch", dict, parameters.PARAMS)]
    made = [f"{kind}@{variant}" for kind in ("calibrate", "evaluate") for variant in variants]
    return ["demo", *downloads, "baseline", "prepare", "importance", "calibset", "allocate", *made, *LAST]


def run_stages(variants: Sequence[str], force: Sequence[str]) -> None:
    """Run every stage in order, the variants concurrently.

    Args:
        force: stages to run even if they are not stale; names of ``form.STAGES``.

    Raises:
        StageFailed: a stage failed.
    """
    checked = check_tracking.submit()  # next to the demo, which takes seconds; what takes longer waits for it
    run_stage("demo", "demo" in force)
    checked.result()
    for name in section("fetch", dict, parameters.PARAMS):
        run_stage(f"fetch@{name}", "fetch" in force)
    baseline = stage.submit("baseline", "baseline" in force)
    for name in ("prepare", "importance", "calibset", "allocate"):
        run_stage(name, name in force)
    calibrated = [stage.submit(f"calibrate@{variant}", "calibrate" in force) for variant in variants]
    scored = [
        stage.submit(f"evaluate@{variant}", "evaluate" in force, wait_for=[done, baseline], return_state=False)
        for variant, done in zip(variants, calibrated, strict=True)
    ]
    for future in [*calibrated, *scored]:
        future.result()
    report_and_register(force)


def add_options(parser: ArgumentParser) -> None:
    """Add an option for each parameter of the flow."""
    parser.add_argument("--model", default="", help="preset or folder of the checkpoint to quantize")
    parser.add_argument("--data", default="", choices=preset_names("calibration"), help="calibration data")
    parser.add_argument("--benchmarks", default="", choices=preset_names("benchmarks"), help="benchmarks")
    parser.add_argument("--recipes", nargs="+", default=[], choices=[*RECIPES], metavar="RECIPE", help="methods")
    parser.add_argument("--schemes", nargs="+", default=[], metavar="SCHEME", help="number formats, mix3.5 too")
    parser.add_argument("--name", default="", help="registered models are called NAME-SCHEME")
    parser.add_argument("--force", nargs="+", default=[], choices=STAGES, metavar="STAGE", help="stages to run anyway")
    add_common_options(parser)


def parameters_of(options: Namespace) -> dict[str, Any]:
    """The parameters of the flow that a command line gives."""
    further = QuantizeOptions(
        settings=settings_of(options), promote=options.promote, name=options.name, force=options.force
    )
    given = {name: getattr(options, name) for name in ("model", "data", "benchmarks", "recipes", "schemes", "limit")}
    return {**given, "options": further}


if __name__ == "__main__":
    main(quantize, __doc__, add_options, parameters_of)
