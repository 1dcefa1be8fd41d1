"""Publish the results of a finished run in the Prefect UI: tables, pictures, links."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from benchmarks.results import Summary
from flows.next_steps import mlflow_command
from flows.stages import ROOT
from tasks.config.environment import without_secrets

#: Pictures of the report that a run shows: artifact key, file, description.
PICTURES = (
    ("scores-picture", "scores.png", "Scores by variant, with 95 % intervals"),
    (
        "importance-picture",
        "importance.png",
        "Which tokens matter: importance over samples, next to the token-level set",
    ),
)

_WIDTH = 1200  # pixels; artifacts live in Prefect's database


def publish_results(variants: Sequence[str]) -> str:
    """Publish the results of a run as artifacts; returns the table of scores for the terminal."""
    table = (ROOT / "report" / "scores.txt").read_text().rstrip("\n")
    create_table_artifact(
        score_rows(variants), key="scores", description="Scores by variant; retention is in percent of full precision."
    )
    create_markdown_artifact(f"```\n{table}\n```", key="scores-text", description="Scores with intervals")
    for key, file, description in PICTURES:
        create_image_artifact(data_url(ROOT / "report" / file), key=key, description=description)
    link_registry(os.environ.get("MLFLOW_TRACKING_URI", ""))
    return table


def score_rows(variants: Sequence[str]) -> list[dict[str, Any]]:
    """One row per variant: its summary, and its registered name and version."""
    registered = {row["variant"]: row for row in json.loads((ROOT / "registry.json").read_text())}
    return [
        {
            "variant": name,
            "registered": _version(registered.get(name, {})),
            **Summary.load(ROOT / "evaluation" / name / "summary.json").to_dict(),
        }
        for name in variants
    ]


def _version(row: Mapping[str, Any]) -> str:
    return f"{row['model']}/{row['version']}" if row.get("model") else ""


def link_registry(tracking_uri: str) -> None:
    """Publish a link to the registered models or, without an MLflow server, the command that shows them."""
    if tracking_uri.startswith(("http://", "https://")):
        create_link_artifact(
            f"{without_secrets(tracking_uri).rstrip('/')}/#/models",
            "Registered models in MLflow",
            key="mlflow",
            description="MLflow",
        )
        return
    text = f"`{mlflow_command(tracking_uri)}` in the project's folder shows runs and registered models."
    create_markdown_artifact(text, key="mlflow", description="MLflow")


def data_url(picture: Path) -> str:
    """``data:`` URI of a picture, which the UI shows without a file server."""
    with Image.open(picture) as image:
        image.thumbnail((_WIDTH, 4 * _WIDTH))
        buffer = io.BytesIO()
        image.convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def publish_overrides(values: Mapping[str, Any], experiment: str) -> None:
    """Publish the parameters of this run, and the command that restores the run."""
    if not values:
        return
    rows = "\n".join(f"| `{name}` | `{json.dumps(value)}` |" for name, value in values.items())
    text = (
        f"| params.yaml | this run |\n|---|---|\n{rows}\n\n"
        f"If the run succeeds, it is saved as the experiment `{experiment}`: `dvc exp show` lists it, "
        f"`dvc exp apply {experiment}` restores it."
    )
    create_markdown_artifact(text, key="parameters", description="Values that differ from params.yaml")
