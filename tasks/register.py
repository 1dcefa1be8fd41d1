"""Stage `register`: one MLflow run and one registered model version per quantized variant, with its scores.

Reads models/<variant> and evaluation/<variant>; writes registry.json (variant, run, model, version). A variant whose
checkpoint and scores are registered already is left as it is. `--check` only tells whether MLflow can be reached.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema

import tlq
from tasks.cli import run
from tasks.files import EVALUATION, MODELS
from tasks.params import PARAMS, ModelParams, VariantParams, section
from tlq.checkpoint import digest
from tlq.files import write_text

logger = logging.getLogger("tlq.register")

REGISTRY = Path("registry.json")
DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("binary", "image"), ColSpec("string", "question")]),
    outputs=Schema([ColSpec("string")]),
)


@dataclass(frozen=True)
class RegisterParams:
    """Attributes:
    model_name: registered models are called <model_name>-<scheme>, their versions are the variants.
    experiment: MLflow experiment of the runs.
    max_new_tokens: longest answer of the registered model.
    """

    model_name: str
    experiment: str = "tlq"
    max_new_tokens: int = 64


def connect() -> MlflowClient:
    """A client of ``MLFLOW_TRACKING_URI``, or of mlflow.db in this folder.

    Raises:
        ConnectionError: MLflow does not answer.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_TRACKING_URI
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    mlflow.set_tracking_uri(uri)
    client = MlflowClient()
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise ConnectionError(
            f"MLflow at {uri} does not answer ({str(error).splitlines()[0][:200]}); start it, or correct "
            "MLFLOW_TRACKING_URI"
        ) from error
    return client


def register(variant: str, params: RegisterParams, model: ModelParams, client: MlflowClient) -> dict[str, Any]:
    """Record one variant; returns its row of registry.json."""
    checkpoint = MODELS / variant
    metrics = json.loads(_existing(EVALUATION / variant / "metrics.json").read_text())
    identity = {"variant": variant, "digest": digest(checkpoint), "scores": json.dumps(metrics["mean"], sort_keys=True)}
    name = f"{params.model_name}-{variant.rsplit('-', 1)[1]}"
    found = _registered(client, name, identity)
    if found is not None:
        logger.info("%s is already version %s of %s", variant, found["version"], name)
        return found
    with mlflow.start_run(run_name=variant) as active:
        _log_run(variant, metrics, identity)
        mlflow.log_artifact(str(checkpoint / "calibration.json"))
        info = mlflow.pyfunc.log_model(
            name=variant,
            python_model=str(Path(__file__).with_name("served_model.py")),
            code_paths=[str(Path(tlq.__file__).parent)],
            signature=SIGNATURE,
            pip_requirements=[f"{package}=={version(package)}" for package in ("torch", "transformers", "mlflow")],
            model_config={
                "checkpoint": str(checkpoint.resolve()),
                "digest": identity["digest"],
                "commit": _git("rev-parse", "HEAD"),
                "dtype": model.dtype,
                "max_new_tokens": params.max_new_tokens,
            },
        )
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        created = client.create_model_version(
            name, info.model_uri, run_id=active.info.run_id, tags=identity, model_id=info.model_id
        )
    logger.info("%s registered as version %s of %s", variant, created.version, name)
    return _row(variant, name, created.version, active.info.run_id)


def record_baseline(client: MlflowClient) -> dict[str, Any]:
    """A run with the full-precision model's scores, so that variants can be compared with it in the MLflow UI."""
    metrics = json.loads(_existing(EVALUATION / "full" / "metrics.json").read_text())
    with mlflow.start_run(run_name="full") as active:
        _log_run("full", metrics, {"variant": "full"})
    return _row("full", None, None, active.info.run_id)


def _log_run(variant: str, metrics: dict[str, Any], identity: dict[str, str]) -> None:
    """Parameters, scores and lineage into the active run."""
    mlflow.log_params(dict(flatten(_all_params())))
    mlflow.log_metrics(dict(_numbers(metrics)))
    mlflow.set_tags({**provenance(variant), **identity})
    mlflow.log_artifact(str(EVALUATION / variant / "metrics.json"))


def _row(variant: str, name: str | None, number: Any, run_id: str) -> dict[str, Any]:
    return {
        "variant": variant,
        "model": name,
        "version": None if number is None else int(number),
        "run_id": run_id,
    }


def _registered(client: MlflowClient, name: str, identity: dict[str, str]) -> dict[str, Any] | None:
    """The version of ``name`` that has exactly this checkpoint and these scores, if there is one."""
    for candidate in client.search_model_versions(f"name = '{name}'"):
        if all(candidate.tags.get(key) == value for key, value in identity.items()):
            return _row(identity["variant"], name, candidate.version, str(candidate.run_id))
    return None


def provenance(variant: str) -> dict[str, str]:
    """Git commit, DVC hashes of what the variant was made from, and package versions."""
    tags = {"git_commit": _git("rev-parse", "HEAD"), "git_dirty": str(bool(_git("status", "--porcelain")))}
    for package in ("torch", "transformers", "compressed-tensors", "lm-eval"):
        tags[f"version.{package}"] = version(package)
    lock = Path("dvc.lock")
    stages = yaml.safe_load(lock.read_text())["stages"] if lock.exists() else {}
    for name, stage in stages.items():
        if "@" not in name or name.endswith(f"@{variant}"):
            for out in stage.get("outs", []):
                tags[f"dvc.{out['path']}"] = out["md5"]
    return tags


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def _numbers(metrics: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in flatten(metrics):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield name, float(value)


def _all_params() -> dict[str, Any]:
    params: dict[str, Any] = yaml.safe_load(PARAMS.read_text())
    return params


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; run `dvc repro evaluate` first")
    return path


def _git(*arguments: str) -> str:
    """Output of a git command, or "" outside a repository."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only check that MLflow answers")
    check_only = parser.parse_args().check
    params = section("register", RegisterParams)
    client = connect()
    if check_only:
        return
    warnings.filterwarnings(
        "ignore", message=".*An input example was not provided.*"
    )  # it would cost a run of the model
    mlflow.set_experiment(params.experiment)
    model = section("model", ModelParams)
    rows = [register(variant, params, model, client) for variant in section("variants", VariantParams).names]
    write_text(json.dumps([record_baseline(client), *rows], indent=2) + "\n", REGISTRY)


if __name__ == "__main__":
    run(main)
