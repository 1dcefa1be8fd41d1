"""Flow `quantize`: from calibration data to registered, scored models.

    python -m flows.quantize

The flow runs the DVC stages in order. With PREFECT_API_URL set, the run appears on that server; without it, Prefect
starts a server for the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows import parameters
from flows.artifacts import publish_overrides, publish_results
from flows.command import main
from flows.hooks import HOOKS
from flows.parameters import Limit, RecipeName, SchemeName, StageName
from flows.stages import check_tracking, report_and_register, stage, stages_at_once, stopping_stages
from tasks.config.params import VariantParams, section

WHERE = """report        report/index.html
pictures      report/scores.png, report/importance.png
checkpoints   models/
MLflow        mlflow ui --backend-store-uri sqlite:///mlflow.db
Prefect       PREFECT_HOME=.prefect prefect server start
lineage       dvc dag, dvc metrics show, dvc plots show"""


@flow(name="quantize", task_runner=ThreadPoolTaskRunner(max_workers=stages_at_once()), **HOOKS)  # type: ignore[arg-type]
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
    publish_overrides(values, flow_run.name)
    with stopping_stages(), parameters.overridden(values):
        variants = section("variants", VariantParams, parameters.PARAMS).names
        run_stages(variants, force)
        return publish_results(["full", *variants])


def run_stages(variants: Sequence[str], force: Sequence[str]) -> None:
    """Run every stage in order, the variants concurrently.

    Args:
        force: stages to run even if they are not stale; names of ``parameters.STAGES``.

    Raises:
        StageFailed: a stage failed.
    """
    check_tracking()
    stage("demo", "demo" in force)
    for name in section("fetch", dict, parameters.PARAMS):
        stage(f"fetch@{name}", "fetch" in force)
    baseline = stage.submit("baseline", "baseline" in force)
    for name in ("prepare", "importance", "calibset"):
        stage.submit(name, name in force).result()
    calibrated = [stage.submit(f"calibrate@{variant}", "calibrate" in force) for variant in variants]
    scored = [
        stage.submit(f"evaluate@{variant}", "evaluate" in force, wait_for=[done, baseline], return_state=False)
        for variant, done in zip(variants, calibrated, strict=True)
    ]
    for future in [*calibrated, *scored]:
        future.result()
    report_and_register(force)


if __name__ == "__main__":
    main(quantize, __doc__, WHERE)
