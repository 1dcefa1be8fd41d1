"""The last lines of a flow in a terminal: the champions of the run, and commands for the shell that the flow ran in."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_API_URL, PREFECT_HOME

from benchmarks.results import Summary
from flows.stages import ROOT
from tasks.config.environment import without_secrets


def champions() -> list[str]:
    """One line per registered model of the last run: its champion with version and scores, or that it has none here."""
    rows = [row for row in json.loads((ROOT / "registry.json").read_text()) if row.get("model")]
    lines = ["Champions"]
    for model in dict.fromkeys(row["model"] for row in rows):
        versions = [row for row in rows if row["model"] == model]
        holder = next((row for row in versions if "champion" in row["aliases"]), None)
        lines.append(f"  {_champion(holder)}" if holder else f"  {_no_champion(model, versions)}")
    return lines


def _champion(row: dict[str, Any]) -> str:
    summary = Summary.load(ROOT / "evaluation" / row["variant"] / "summary.json")
    retention = "" if summary.retention is None else f", {summary.retention:.1f} % of full precision"
    return f"{row['model']} version {row['version']}: {row['variant']}, score {summary.score:.1f}{retention}"


def _no_champion(model: str, versions: Sequence[dict[str, Any]]) -> str:
    passed = [row["variant"] for row in versions if row["gate"]["passed"]]
    if passed:
        return f"{model}: the champion is an earlier version; {', '.join(passed)} passed the gate but is no better"
    return f"{model}: no version of this run passes the gate; registry.json has the reasons"


def next_steps() -> list[str]:
    """Headings and, indented, commands that can be pasted into the shell from which this process was started.

    The commands name this process's Python, its Prefect home and its MLflow store.
    """
    python = _python()
    folder = [] if Path.cwd() == ROOT else ["Go to the project's folder", f"  cd {shlex.quote(str(ROOT))}"]
    report = f'  {python} -m webbrowser -t "file://$PWD/report/index.html"'
    metrics = f"  {python} -m dvc metrics show"
    checkpoints = "  ls models"
    headed = ["Report", report, *_mlflow(), *_prefect(python), "Scores", metrics, "Checkpoints", checkpoints]
    return [*folder, *headed]


def mlflow_command(uri: str) -> str:
    """The command that shows an MLflow store without a server; ``uri`` may be empty for the default store.

    An address that may hold a password is not written out: the command names the variable that has it.
    """
    store = shlex.quote(uri or "sqlite:///mlflow.db") if uri == without_secrets(uri) else '"$MLFLOW_TRACKING_URI"'
    return f"{_python()} -m mlflow ui --backend-store-uri {store}"


def _mlflow() -> list[str]:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith(("http://", "https://")):
        return [f"Runs and registered models: {without_secrets(uri)}"]
    return ["Runs and registered models, in MLflow", f"  {mlflow_command(uri)}"]


def _prefect(python: str) -> list[str]:
    if url := PREFECT_API_URL.value():
        return [f"This run in Prefect: {url.removesuffix('/api')}"]
    home = shlex.quote(_relative(Path(PREFECT_HOME.value())))
    return ["This run in Prefect", f"  PREFECT_HOME={home} {python} -m prefect server start"]


def _python() -> str:
    return shlex.quote(_relative(Path(sys.executable)))


def _relative(path: Path) -> str:
    """A path from the project's folder if it lies in it, without following links: `.venv/bin/python` is one."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
