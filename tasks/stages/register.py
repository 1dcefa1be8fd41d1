"""Stage `register`: record each quantized variant and its scores as one MLflow run and one registered model version.

Reads models/<variant>, evaluation/<variant> and report/; writes registry.json: variant, model, version, run, verdict
of the gate, aliases. The stage continues the run that stage `calibrate` logged the layers to, or else creates a run. A
variant whose checkpoint and scores are already registered is skipped. With `register.promote` false, new versions are
withheld from promotion and no alias moves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import yaml
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, Schema
from mlflow.types.schema import AnyType

import tlq
from benchmarks.compare import FULL
from tasks import registry
from tasks.command import command_line
from tasks.config.params import PARAMS, section
from tasks.config.sections import EvaluateParams, ModelParams, RegisterParams, VariantParams
from tasks.files import EVALUATION, MODELS, REPORT, VariantName
from tasks.registry.connection import connect
from tasks.registry.gate import Verdict, judge
from tasks.registry.layers import fill_in_layers
from tasks.registry.promotion import ITEM_SCORES, WHY_WITHHELD, WITHHELD, is_withheld, judge_again, promote
from tasks.registry.provenance import benchmark_inputs, calibration_inputs, lineage, machine
from tasks.registry.result import Result, read_result
from tasks.registry.runs import (
    CHECKPOINT,
    find_runs,
    log_inputs,
    log_metrics,
    log_params,
    new_run,
    running,
    set_tags,
)
from tasks.registry.tracking import recorded_failure
from tasks.registry.versions import (
    OUTCOME,
    SCORE,
    VARIANT,
    aliases,
    described,
    forget_outcome,
    identity,
    model_versions,
    verdict_of,
    verdict_tag,
)
from tlq.export.engines import ENGINES
from tlq.runtime.files import write_text

logger = logging.getLogger("tlq.register")

REGISTRY = Path("registry.json")
_LOCK = Path(".tlq/register.lock")
#: An image is of any type: for a binary column MLflow decodes base64 itself, drops letters that are no base64, and
#: names no row. `served_model` decodes it.
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(AnyType(), "image"), ColSpec("string", "question")]),
    outputs=Schema([ColSpec("string")]),
)
#: Packages that the registered model imports.
_PACKAGES = ("mlflow", "torch", "transformers", "compressed-tensors", "accelerate", "safetensors", "pandas", "pillow")


@dataclass(frozen=True)
class Registrar:
    """Record results in MLflow, each result once."""

    client: MlflowClient
    params: RegisterParams
    evaluation: EvaluateParams
    model: ModelParams

    def register(self, variant: str) -> ModelVersion:
        """The registered version of a variant; created if no version has this checkpoint and these scores.

        Aliases do not change.
        """
        with recorded_failure("register", variant):
            result = read_result(variant, self.evaluation)
        scheme = VariantName.parse(variant).scheme
        name = f"{self.params.model_name}-{scheme}"
        verdict = judge(result.metrics, self.params)
        for reason in verdict.reasons:
            logger.warning("%s does not pass the gate: %s", variant, reason)
        with _alone():
            found = _registered(self.client, name, result)
            if found is None:
                found = self._new_version(name, scheme, result, verdict)
                logger.info("%s registered as version %s of %s", variant, found.version, name)
            else:
                logger.info("%s is already version %s of %s", variant, found.version, name)
                found = self._judge_again(found, verdict)
            self._attach_report(str(found.run_id), variant)
        return found

    def _judge_again(self, version: ModelVersion, verdict: Verdict) -> ModelVersion:
        """Apply the verdict to a registered version, and let it compete if this run promotes.

        A run that does not promote leaves the verdicts of competing versions alone, because they decide the champion.
        """
        if is_withheld(version) and self.params.promote:
            forget_outcome(self.client, version)
            version = self.client.get_model_version(version.name, version.version)
        elif not is_withheld(version) and not self.params.promote:
            return version
        if judge_again(self.client, version, verdict):
            set_tags(self.client, str(version.run_id), verdict_tag(verdict))
        return version

    def record_baseline(self) -> str:
        """Id of a run with full precision's scores, for comparison with variants in the MLflow UI."""
        with recorded_failure("register", FULL):
            result = read_result(FULL, self.evaluation)
        with _alone():
            return self._baseline_run(result)

    def _baseline_run(self, result: Result) -> str:
        for found in find_runs(self.client, self.params.experiment, {"variant": FULL, "registered": "baseline"}):
            if all(found.data.tags.get(key) == value for key, value in result.identity.items()):
                return str(found.info.run_id)
        tags = {"stage": "register", **result.identity, **machine(), **lineage(FULL)}
        run_id = new_run(self.client, self.params.experiment, FULL, tags)
        with running(self.client, run_id):
            self._log_scores(run_id, result)
            set_tags(self.client, run_id, {"registered": "baseline"})
        return run_id

    def _new_version(self, name: str, scheme: str, result: Result, verdict: Verdict) -> ModelVersion:
        """Add scores and artifacts to the calibration's run, and create a version of its checkpoint."""
        run_id = self._calibration_run(result.variant, result.identity[CHECKPOINT])
        score = result.metrics.mean.score
        tags = {VARIANT: result.variant, **({} if score is None else {SCORE: f"{score:.4g}"}), **verdict_tag(verdict)}
        if result.calibration is not None:
            tags |= {f"engine.{key}": engine.of(result.calibration.scheme).runs for key, engine in ENGINES.items()}
        withheld = {} if self.params.promote else {OUTCOME: WITHHELD}
        with running(self.client, run_id):
            self._log_calibration(run_id, result)
            model_id = self._log_model(run_id, result)
            self._log_scores(run_id, result, model_id)
            set_tags(self.client, run_id, {**result.identity, **verdict_tag(verdict)})
            _ensure_model(self.client, name, scheme)
            created = self.client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id=run_id,
                tags=tags | withheld,
                description=described(result.summary, verdict, WHY_WITHHELD if withheld else ""),
                model_id=model_id,
            )
            set_tags(self.client, run_id, {"registered": f"{name} version {created.version}"})
        return created

    def _calibration_run(self, variant: str, checkpoint: str) -> str:
        """The run of the checkpoint's calibration if no version belongs to it yet; else a new run."""
        for made in find_runs(self.client, self.params.experiment, {"variant": variant, CHECKPOINT: checkpoint}):
            if "registered" not in made.data.tags:
                return str(made.info.run_id)
        tags = {"stage": "register", "variant": variant, CHECKPOINT: checkpoint, **machine(), **lineage(variant)}
        return new_run(self.client, self.params.experiment, variant, tags)

    def _log_calibration(self, run_id: str, result: Result) -> None:
        """Log the layers that the run does not have yet, and the data that the recipe calibrated on."""
        assert result.calibration is not None, f"{result.variant}: full precision has no calibration"
        filled = fill_in_layers(self.client, run_id, result.calibration)
        if filled:
            logger.info("%s: metrics of %d layers taken from calibration.json", result.variant, filled)
        log_inputs(self.client, run_id, calibration_inputs(result.calibration.recipe, result.calibration.scheme))
        self.client.log_artifact(run_id, str(MODELS / result.variant / "calibration.json"))

    def _log_scores(self, run_id: str, result: Result, model_id: str | None = None) -> None:
        """Log parameters, data, DVC's hashes, and scores of benchmarks and items for a run and its logged model."""
        log_params(self.client, run_id, yaml.safe_load(PARAMS.read_text()))
        log_inputs(self.client, run_id, benchmark_inputs(self.evaluation.benchmarks))
        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, 0, model_id, run_id=run_id) for name, value in result.main_metrics.items()]
        log_metrics(self.client, run_id, metrics)
        hashes = {name: tag for name, tag in lineage(result.variant).items() if name.startswith("dvc.")}
        set_tags(self.client, run_id, hashes)
        self.client.log_artifact(run_id, str(EVALUATION / result.variant / "metrics.json"))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ITEM_SCORES
            result.items.to_parquet(path, index=False)
            self.client.log_artifact(run_id, str(path))

    def _log_model(self, run_id: str, result: Result) -> str:
        """Id of a model of the run: its code and the checkpoint's path; the checkpoint itself is not copied.

        ``mlflow.pyfunc.log_model`` would add the path, the digest and the commit to the run's parameters, and every
        comparison of runs would begin with them.
        """
        origin = {
            "checkpoint": str((MODELS / result.variant).resolve()),
            "relative": str(MODELS / result.variant),
            "digest": result.identity[CHECKPOINT],
            "commit": lineage(result.variant)["git_commit"],
        }
        experiment = self.client.get_run(run_id).info.experiment_id
        model = self.client.create_logged_model(experiment, result.variant, source_run_id=run_id, tags=origin)
        try:
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                # An input example would require a run of the model.
                warnings.filterwarnings("ignore", message=".*An input example was not provided.*")
                mlflow.pyfunc.save_model(
                    f"{folder}/model",
                    python_model=str(Path(registry.__file__).with_name("served_model.py")),
                    code_paths=[str(Path(tlq.__file__).parent)],
                    signature=SIGNATURE,
                    pip_requirements=[f"{package}=={version(package)}" for package in _PACKAGES],
                    model_config={**origin, "dtype": self.model.dtype, "max_new_tokens": self.params.max_new_tokens},
                )
                self.client.log_model_artifacts(model.model_id, f"{folder}/model")
        except BaseException:
            self.client.finalize_logged_model(model.model_id, "FAILED")
            raise
        self.client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _attach_report(self, run_id: str, variant: str) -> None:
        """Store the report page and the variant's card as artifacts of the run; newer ones replace them."""
        files = [path for path in (REPORT / "index.html", REPORT / "cards" / f"{variant}.md") if path.exists()]
        state = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        if files and self.client.get_run(run_id).data.tags.get("report") != state:
            for path in files:
                self.client.log_artifact(run_id, str(path), "report")
            set_tags(self.client, run_id, {"report": state})


def _alone() -> FileLock:
    """A lock that lets one process of this project at a time ask whether a result is registered, and register it."""
    _LOCK.parent.mkdir(exist_ok=True)
    return FileLock(_LOCK)


def _ensure_model(client: MlflowClient, name: str, scheme: str) -> None:
    """Create registered model ``name`` if it does not exist; another process may create it at the same time."""
    try:
        client.create_registered_model(name, description=f"Versions are variants of scheme {scheme}.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _registered(client: MlflowClient, name: str, result: Result) -> ModelVersion | None:
    """The version of ``name`` with exactly this checkpoint and these scores, if it exists."""
    for candidate in model_versions(client, name):
        if candidate.tags.get(VARIANT) != result.variant:
            continue
        found = identity(client, candidate)
        if all(found.get(key) == value for key, value in result.identity.items()):
            return candidate
    return None


def registry_row(variant: str, version: ModelVersion, names: Mapping[str, int]) -> dict[str, Any]:
    """A variant's entry in registry.json; ``names`` are the aliases of its model."""
    verdict = verdict_of(version)
    return {
        "variant": variant,
        "model": version.name,
        "version": int(version.version),
        "run_id": version.run_id,
        "gate": {"passed": verdict.passed, "reasons": list(verdict.reasons)},
        "aliases": sorted(alias for alias, number in names.items() if number == int(version.version)),
    }


def register_all(registrar: Registrar, variants: Sequence[str]) -> list[dict[str, Any]]:
    """Record full precision, register every variant, then move the aliases if the run promotes.

    Returns the rows of registry.json.
    """
    client = registrar.client
    full = {"variant": FULL, "model": None, "version": None, "run_id": registrar.record_baseline()}
    made = {variant: registrar.register(variant) for variant in variants}
    models = dict.fromkeys(each.name for each in made.values())
    if registrar.params.promote:
        for name in models:
            promote(client, name)
    else:
        logger.warning("register.promote is false: no alias moves")
    names = {name: aliases(client, name) for name in models}
    rows = [
        registry_row(variant, client.get_model_version(each.name, each.version), names[each.name])
        for variant, each in made.items()
    ]
    return [{**full, "gate": None, "aliases": []}, *rows]


def main() -> None:
    params = section("register", RegisterParams)
    registrar = Registrar(connect(), params, section("evaluate", EvaluateParams), section("model", ModelParams))
    rows = register_all(registrar, section("variants", VariantParams).names)
    write_text(json.dumps(rows, indent=2) + "\n", REGISTRY)


if __name__ == "__main__":
    command_line(main, __doc__)
