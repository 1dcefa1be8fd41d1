"""Flow `quantize`: from calibration data to registered, scored models.

    python -m flows.quantize

Sequences the DVC stages. Without a Prefect server it runs all the same (Prefect starts one for the run); with
PREFECT_API_URL set the run shows there.
"""

from __future__ import annotations

import json
import sys

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.task_runners import ThreadPoolTaskRunner

from flows.stages import ROOT, StageFailed, check_tracking, stage, stages_at_once
from tasks.params import VariantParams, section

WHERE = """pictures      report/scores.png, report/tokens.png
checkpoints   models/
MLflow        mlflow ui --backend-store-uri sqlite:///mlflow.db
Prefect       PREFECT_HOME=.prefect prefect server start
lineage       dvc dag, dvc metrics show, dvc plots show"""


@flow(name="quantize", task_runner=ThreadPoolTaskRunner(max_workers=stages_at_once()))  # type: ignore[arg-type]
def quantize() -> str:
    """Prepare data, score tokens, choose the token set, then calibrate, evaluate and register every variant.

    The stages' parameters come from params.yaml. Returns the table of scores.
    """
    variants = section("variants", VariantParams, ROOT / "params.yaml").names
    check_tracking()
    stage("demo")
    for name in section("fetch", dict, ROOT / "params.yaml"):
        stage(f"fetch@{name}")
    baseline = stage.submit("baseline")
    for name in ("prepare", "importance", "calibset"):
        stage.submit(name).result()
    calibrated = [stage.submit(f"calibrate@{variant}") for variant in variants]
    scored = [
        stage.submit(f"evaluate@{variant}", wait_for=[done, baseline], return_state=False)
        for variant, done in zip(variants, calibrated, strict=True)
    ]
    for future in [*calibrated, *scored]:
        future.result()
    stage("report")
    stage("register")
    return publish_scores(["full", *variants])


def publish_scores(variants: list[str]) -> str:
    """The scores as a table for the terminal, and as an artifact of the flow run."""
    table = (ROOT / "report" / "scores.txt").read_text().rstrip("\n")
    rows = [json.loads((ROOT / "evaluation" / name / "summary.json").read_text()) for name in variants]
    create_table_artifact(
        [{"variant": name, **row} for name, row in zip(variants, rows, strict=True)],
        key="scores",
        description="Scores by variant; retention is the percentage of full precision.",
    )
    create_markdown_artifact(f"```\n{table}\n```", key="scores-text", description="Scores with intervals")
    return table


def main() -> None:
    try:
        table = quantize()
    except StageFailed as error:
        sys.exit(f"\n{error}")
    sys.stdout.write(f"\n{table}\n\n{WHERE}\n")


if __name__ == "__main__":
    main()
