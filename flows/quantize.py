"""Flow `quantize`: from calibration data to registered, scored models.

    python -m flows.quantize

The flow runs the DVC stages in order. With PREFECT_API_URL set, the run appears on that server; without it, Prefect
starts a server for the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows import parameters
from flows.artifacts import publish_overrides, publish_results
from flows.command import main
from flows.hooks import HOOKS
from flows.names import experiment_name, run_name
from flows.parameters import Limit, RecipeName, SchemeName, StageName
from flows.stages import LAST, check_tracking, following, report_and_register, run_stage, stage, stages_at_once
from tasks.config.params import VariantParams, section


@flow(
    name="quantize",
    flow_run_name=run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=stages_at_once()),  # type: ignore[arg-type]
    **HOOKS,
)
def quantize(
    model: str = "",
    name: str = "",
    recipes: tuple[RecipeName, ...] = (),
    schemes: tuple[SchemeName, ...] = (),
    limit: Limit | None = None,
    settings: dict[str, Any] | None = None,
    force: tuple[StageName, ...] = (),
) -> str:
    """Prepare data, score tokens, choose the token set, then calibrate, evaluate and register every variant.

    Without parameters the flow runs the stale stages with the values of params.yaml. The parameters given replace
    values of params.yaml for this run, which is saved as a DVC experiment. Returns the table of scores.

    Args:
        model: Preset (`qwen2-vl-2b`) or folder of the checkpoint to quantize. Empty: `model.path` of params.yaml.
        name: Registered models are called `<name>-<scheme>`. Empty: the model's name if one is given, else
            `register.model_name` of params.yaml.
        recipes: Quantization methods. Empty: `variants.recipes` of params.yaml.
        schemes: Number formats, each combined with every recipe. Empty: `variants.schemes` of params.yaml.
        limit: Items per benchmark, 0 for all. Empty: `evaluate.limit` of params.yaml.
        settings: Any other values of params.yaml by dotted name, for instance {"calibset.seed": 1}.
        force: Stages to run even if they are not stale.
    """
    values = parameters.overrides(model, name, recipes, schemes, limit, settings)
    publish_overrides(values, experiment_name())
    with parameters.overridden(values):
        variants = section("variants", VariantParams, parameters.PARAMS).names
        with following(stages_of(variants)):
            run_stages(variants, force)
        return publish_results(["full", *variants])


def stages_of(variants: Sequence[str]) -> list[str]:
    """All stages of a run, in order."""
    downloads = [f"fetch@{name}" for name in section("fetch", dict, parameters.PARAMS)]
    made = [f"{kind}@{variant}" for kind in ("calibrate", "evaluate") for variant in variants]
    return ["demo", *downloads, "baseline", "prepare", "importance", "calibset", *made, *LAST]


def run_stages(variants: Sequence[str], force: Sequence[str]) -> None:
    """Run every stage in order, the variants concurrently.

    Args:
        force: stages to run even if they are not stale; names of ``parameters.STAGES``.

    Raises:
        StageFailed: a stage failed.
    """
    check_tracking()
    run_stage("demo", "demo" in force)
    for name in section("fetch", dict, parameters.PARAMS):
        run_stage(f"fetch@{name}", "fetch" in force)
    baseline = stage.submit("baseline", "baseline" in force)
    for name in ("prepare", "importance", "calibset"):
        run_stage(name, name in force)
    calibrated = [stage.submit(f"calibrate@{variant}", "calibrate" in force) for variant in variants]
    scored = [
        stage.submit(f"evaluate@{variant}", "evaluate" in force, wait_for=[done, baseline], return_state=False)
        for variant, done in zip(variants, calibrated, strict=True)
    ]
    for future in [*calibrated, *scored]:
        future.result()
    report_and_register(force)


if __name__ == "__main__":
    main(quantize, __doc__)
