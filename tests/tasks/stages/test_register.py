"""Registration in MLflow: versions, lineage, gate and aliases, idempotence, an unreachable server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from support.disks import full_disk
from support.registry_results import BENCHMARKS, layer_report, write_params, write_scores, write_variant

import tasks
from tasks.config.params import section
from tasks.config.sections import EvaluateParams, ModelParams, RegisterParams, VariantParams
from tasks.errors import TRY_AGAIN
from tasks.registry.connection import connect
from tasks.registry.layers import layer_metrics
from tasks.registry.runs import CHECKPOINT, log_metrics, new_run
from tasks.registry.versions import aliases, model_versions
from tasks.stages.register import Registrar, main, register_all
from tlq.export.engines import ENGINES
from tlq.quantization.formats import get_scheme
from tlq.results import LayerReport
from tlq.runtime.digest import checkpoint_digest

NAME = "tiny-w3a16"


@pytest.fixture
def workspace(workspace: Path) -> Path:
    """A project folder with one variant that is ready to be registered."""
    write_variant(workspace, "rtn-w3a16")
    return workspace


def registrar() -> Registrar:
    return Registrar(
        connect(),
        section("register", RegisterParams),
        section("evaluate", EvaluateParams),
        section("model", ModelParams),
    )


def register(*variants: str) -> dict[str, dict[str, Any]]:
    """Rows of registry.json by variant."""
    return {row["variant"]: row for row in register_all(registrar(), variants)}


def champion() -> int | None:
    return aliases(connect(), NAME).get("champion")


def runs(client: MlflowClient) -> int:
    return len(client.search_runs([each.experiment_id for each in client.search_experiments()]))


def test_a_run_holds_scores_layers_data_lineage_and_artifacts(workspace: Path) -> None:
    (workspace / "report/cards").mkdir(parents=True)
    (workspace / "report/index.html").write_text("<p>page")
    (workspace / "report/cards/rtn-w3a16.md").write_text("# card")
    row = register("rtn-w3a16")["rtn-w3a16"]
    client = connect()
    run = client.get_run(row["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["mean/retention"] == pytest.approx(96.0)
    of_layers = {"layer/seconds", "layer/error_before", "layer/error_after"}
    assert run.data.metrics.keys() - of_layers == {
        *("mean/score", "mean/retention", "mean/flips", "mean/kl", "size_bytes", "seconds", "peak_host_bytes"),
        *(f"{name}/score" for name in BENCHMARKS),
    }
    assert not {"checkpoint", "digest", "commit"} & run.data.params.keys()
    steps = {metric.step: metric.value for metric in client.get_metric_history(row["run_id"], "layer/error_before")}
    assert steps == {0: 2.0, 1: 3.0}
    assert of_layers <= run.data.metrics.keys()
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert (model.source_run_id, str(model.status)) == (row["run_id"], "READY")
    assert {"checkpoint", "digest", "commit"} <= model.tags.keys()
    assert run.data.params["model.path"] == "unused"
    assert run.data.params["calibrate.overrides._.layers.0._"] == "full_precision"
    tags = run.data.tags
    assert (tags["dvc.data/prepared"], tags["dvc.models/rtn-w3a16"]) == ("aa", "bb")
    assert "dvc.models/tlq-w3a16" not in tags
    assert {"git_commit", "version.torch", "hardware.cpu", "hardware.cores", "hardware.gpus"} <= tags.keys()
    assert [each.dataset.name for each in run.inputs.dataset_inputs] == list(BENCHMARKS)
    assert json.loads(run.inputs.dataset_inputs[0].dataset.profile)["num_rows"] == 50
    artifacts = {each.path for each in client.list_artifacts(row["run_id"])}
    assert {"calibration.json", "metrics.json", "item_scores.parquet", "report"} <= artifacts
    assert {each.path for each in client.list_artifacts(row["run_id"], "report")} == {
        "report/index.html",
        "report/rtn-w3a16.md",
    }


def test_a_version_refers_to_its_checkpoint_and_shows_its_scores(workspace: Path) -> None:
    row = register("rtn-w3a16")["rtn-w3a16"]
    assert (row["model"], row["version"], row["gate"]) == (NAME, 1, {"passed": True, "reasons": []})
    assert row["aliases"] == ["candidate", "champion"]
    version = connect().get_model_version(NAME, "1")
    engines = {f"engine.{name}": engine.of(get_scheme("w3a16")).runs for name, engine in ENGINES.items()}
    assert engines["engine.vllm"] == "native"
    own = {"variant": "rtn-w3a16", "score": "96", "gate": "passed", "outcome": "champion"}
    assert version.tags == own | engines
    assert version.description.startswith("rtn-w3a16: score 96, retention 96, kl 0.1\n")
    assert "\n\n## Gate\n\nThe version passed.\n\n## Champion\n\n" in version.description
    model = mlflow.models.Model.load(version.source)
    assert model.flavors["python_function"]["config"]["checkpoint"] == str(workspace / "models/rtn-w3a16")


def test_a_report_that_comes_later_is_attached(workspace: Path) -> None:
    row = register("rtn-w3a16")["rtn-w3a16"]
    (workspace / "report").mkdir()
    (workspace / "report/index.html").write_text("<p>page")
    assert register("rtn-w3a16")["rtn-w3a16"] == row
    assert [each.path for each in connect().list_artifacts(row["run_id"], "report")] == ["report/index.html"]


def test_registering_again_changes_nothing(workspace: Path) -> None:
    write_variant(workspace, "tlq-w3a16", right=50)
    first = register("rtn-w3a16", "tlq-w3a16")
    client = connect()
    before = (runs(client), [version.last_updated_timestamp for version in model_versions(client, NAME)])
    assert register("rtn-w3a16", "tlq-w3a16") == first
    assert (runs(client), [each.last_updated_timestamp for each in model_versions(client, NAME)]) == before


def test_new_scores_make_a_new_version_and_a_run_of_their_own(workspace: Path) -> None:
    first = register("rtn-w3a16")["rtn-w3a16"]
    write_scores(workspace, "rtn-w3a16", right=47)
    second = register("rtn-w3a16")["rtn-w3a16"]
    assert second["version"] == 2
    assert second["run_id"] != first["run_id"]


def test_the_run_of_the_calibration_is_continued_and_missing_layers_are_filled_in(workspace: Path) -> None:
    client = connect()
    tags = {"stage": "calibrate", "variant": "rtn-w3a16", CHECKPOINT: checkpoint_digest(workspace / "models/rtn-w3a16")}
    run_id = new_run(client, "tlq", "rtn-w3a16", tags)
    log_metrics(client, run_id, layer_metrics(LayerReport.from_dict(layer_report(0))))
    assert register("rtn-w3a16")["rtn-w3a16"]["run_id"] == run_id
    assert [metric.step for metric in client.get_metric_history(run_id, "layer/seconds")] == [0, 1]
    assert client.get_run(run_id).info.status == "FINISHED"


# --- Gate and aliases -----------------------------------------------------------------------------


def test_a_better_version_becomes_champion_a_worse_one_does_not(workspace: Path) -> None:
    write_variant(workspace, "mbq-w3a16", right=44)
    write_variant(workspace, "tlq-w3a16", right=50)
    rows = register("rtn-w3a16", "mbq-w3a16", "tlq-w3a16")
    assert [rows[name]["aliases"] for name in ("rtn-w3a16", "mbq-w3a16")] == [[], []]
    assert rows["tlq-w3a16"]["aliases"] == ["candidate", "champion"]
    write_variant(workspace, "awq-w3a16", right=43)
    assert register("awq-w3a16")["awq-w3a16"]["aliases"] == ["candidate"]
    version = connect().get_model_version(NAME, "4")
    assert version.tags["outcome"] == "not_better"
    assert "\n\n## Champion\n\nmean score -14.00 [" in version.description


def test_equal_scores_are_decided_by_kl(workspace: Path) -> None:
    write_variant(workspace, "mbq-w3a16", kl=0.2)
    write_variant(workspace, "tlq-w3a16", kl=0.05)
    assert register("rtn-w3a16", "mbq-w3a16")["rtn-w3a16"]["aliases"] == ["champion"]
    assert register("tlq-w3a16")["tlq-w3a16"]["aliases"] == ["candidate", "champion"]


def test_the_new_version_of_a_champion_variant_becomes_champion(workspace: Path) -> None:
    assert register("rtn-w3a16")["rtn-w3a16"]["aliases"] == ["candidate", "champion"]
    write_variant(workspace, "rtn-w3a16", salt="made again")
    row = register("rtn-w3a16")["rtn-w3a16"]
    assert (row["version"], row["aliases"]) == (2, ["candidate", "champion"])


def test_a_version_that_fails_keeps_the_reasons_and_gets_no_alias(workspace: Path) -> None:
    write_variant(workspace, "tlq-w3a16", right=20)
    rows = register("tlq-w3a16", "rtn-w3a16")
    assert rows["tlq-w3a16"]["aliases"] == []
    assert len(rows["tlq-w3a16"]["gate"]["reasons"]) == 3
    version = connect().get_model_version(NAME, str(rows["tlq-w3a16"]["version"]))
    run = connect().get_run(version.run_id)
    assert version.tags["gate"] == run.data.tags["gate"] == "failed"
    assert "\n\n## Gate\n\n- mean retention: 40 %, register.min_retention needs" in version.description
    assert rows["tlq-w3a16"]["gate"]["reasons"][0].startswith("mean retention: 40 %, register.min_retention needs")
    assert champion() == rows["rtn-w3a16"]["version"]


def test_scores_on_other_items_do_not_move_the_alias_until_the_champion_is_scored_again(workspace: Path) -> None:
    write_variant(workspace, "tlq-w3a16", right=46)
    register("rtn-w3a16")
    write_params(workspace, "evaluate", seed=1)
    assert register("tlq-w3a16")["tlq-w3a16"]["aliases"] == ["candidate"]
    assert connect().get_model_version(NAME, "2").tags["outcome"] == "not_compared"
    assert register("rtn-w3a16", "tlq-w3a16")["rtn-w3a16"]["version"] == 3
    assert champion() == 3
    assert connect().get_model_version(NAME, "2").tags["outcome"] == "not_better"


def test_a_stricter_gate_applies_to_registered_versions(workspace: Path) -> None:
    write_variant(workspace, "tlq-w3a16", right=50)
    register("rtn-w3a16", "tlq-w3a16")
    write_params(workspace, "register", min_retention=99.0)
    rows = register("rtn-w3a16", "tlq-w3a16")
    assert rows["rtn-w3a16"]["gate"]["reasons"] == ["mean retention: 96 %, register.min_retention needs at least 99 %"]
    write_params(workspace, "register", min_retention=50.0)
    assert register("rtn-w3a16")["rtn-w3a16"]["gate"] == {"passed": True, "reasons": []}
    version = connect().get_model_version(NAME, "1")
    assert version.tags["gate"] == "passed"
    assert "mean retention" not in version.description
    assert champion() == 2


def test_a_champion_that_fails_a_new_bound_is_replaced(workspace: Path) -> None:
    write_variant(workspace, "tlq-w3a16", right=50, kl=0.2)
    write_variant(workspace, "rtn-w3a16", right=49, kl=0.1)
    assert register("rtn-w3a16", "tlq-w3a16")["rtn-w3a16"]["aliases"] == ["champion"]  # by KL
    write_params(workspace, "register", min_retention=99.0)
    rows = register("rtn-w3a16", "tlq-w3a16")
    assert rows["rtn-w3a16"]["aliases"] == []
    assert rows["tlq-w3a16"]["aliases"] == ["candidate", "champion"]
    write_params(workspace, "register", min_retention=101.0)
    rows = register("rtn-w3a16", "tlq-w3a16")  # nobody else may be used: what is served is not taken away
    assert rows["tlq-w3a16"]["aliases"] == ["champion"]


def test_a_champion_that_fails_when_scored_again_is_replaced(workspace: Path) -> None:
    write_variant(workspace, "tlq-w3a16", right=47, kl=0.3)
    assert register("rtn-w3a16", "tlq-w3a16")["rtn-w3a16"]["aliases"] == ["champion"]
    write_scores(workspace, "rtn-w3a16", right=30)
    rows = register("rtn-w3a16", "tlq-w3a16")  # scored again with the same items, and now it fails
    assert rows["tlq-w3a16"]["aliases"] == ["candidate", "champion"]
    assert "champion" not in rows["rtn-w3a16"]["aliases"]


def test_an_alias_moved_by_hand_stays_where_it_is(workspace: Path) -> None:
    write_variant(workspace, "tlq-w3a16", right=50)
    register("rtn-w3a16", "tlq-w3a16")
    connect().set_registered_model_alias(NAME, "champion", "1")
    assert register("rtn-w3a16", "tlq-w3a16")["rtn-w3a16"]["aliases"] == ["champion"]


def test_a_run_that_does_not_promote_registers_and_moves_no_alias(workspace: Path) -> None:
    register("rtn-w3a16")
    write_params(workspace, "register", promote=False)
    write_variant(workspace, "tlq-w3a16", right=50)
    row = register("rtn-w3a16", "tlq-w3a16")["tlq-w3a16"]
    assert (row["version"], row["gate"]["passed"], row["aliases"]) == (2, True, [])
    assert aliases(connect(), NAME) == {"champion": 1, "candidate": 1}
    version = connect().get_model_version(NAME, "2")
    assert version.tags["outcome"] == "withheld"
    assert "register.promote is false" in version.description
    assert "start that run again with `promote`" in version.description


def test_a_withheld_version_competes_only_when_it_is_registered_again_with_promotion(workspace: Path) -> None:
    write_params(workspace, "register", promote=False)
    write_variant(workspace, "tlq-w3a16", right=50)
    register("tlq-w3a16")
    write_params(workspace, "register", promote=True)
    assert register("rtn-w3a16")["rtn-w3a16"]["aliases"] == ["candidate", "champion"]
    assert connect().get_model_version(NAME, "1").tags["outcome"] == "withheld"
    row = register("rtn-w3a16", "tlq-w3a16")["tlq-w3a16"]
    assert (row["version"], champion()) == (1, 1)
    version = connect().get_model_version(NAME, "1")
    assert version.tags["outcome"] == "champion"
    assert "register.promote" not in version.description


def test_a_run_that_does_not_promote_judges_only_withheld_versions_again(workspace: Path) -> None:
    register("rtn-w3a16")
    write_variant(workspace, "tlq-w3a16", right=48)
    write_params(workspace, "register", promote=False)
    register("tlq-w3a16")
    write_params(workspace, "register", min_retention=99.0)
    rows = register("rtn-w3a16", "tlq-w3a16")
    assert [rows[name]["gate"]["passed"] for name in ("rtn-w3a16", "tlq-w3a16")] == [True, False]
    assert connect().get_model_version(NAME, "2").tags["outcome"] == "withheld"
    assert champion() == 1


def test_a_withheld_version_that_was_made_champion_by_hand_can_be_replaced(workspace: Path) -> None:
    write_params(workspace, "register", promote=False)
    register("rtn-w3a16")
    connect().set_registered_model_alias(NAME, "champion", "1")
    write_params(workspace, "register", promote=True)
    write_variant(workspace, "tlq-w3a16", right=50)
    assert register("tlq-w3a16")["tlq-w3a16"]["aliases"] == ["candidate", "champion"]
    assert connect().get_model_version(NAME, "1").tags["outcome"] == "not_better"


# --- Failures -------------------------------------------------------------------------------------


def test_missing_scores_say_what_to_run_and_the_failure_is_recorded(workspace: Path) -> None:
    (workspace / "evaluation/rtn-w3a16/metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="run `dvc repro evaluate@rtn-w3a16` first"):
        register("rtn-w3a16")
    client = connect()
    (failed,) = client.search_runs(["1"], "attributes.status = 'FAILED'")
    assert failed.data.tags["variant"] == "rtn-w3a16"
    assert "metrics.json: not found" in failed.data.tags["error"]


def test_an_interrupted_registration_is_marked_failed_and_continued(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_model_artifacts", full_disk)
        with pytest.raises(OSError, match="No space left"):
            register("rtn-w3a16")
    client = connect()
    (failed,) = client.search_runs(["1"], "attributes.status = 'FAILED'")
    assert failed.data.tags["error"] == "[Errno 28] No space left on device"
    row = register("rtn-w3a16")["rtn-w3a16"]
    run = client.get_run(row["run_id"])
    assert (row["run_id"], run.info.status) == (failed.info.run_id, "FINISHED")
    assert "error" not in run.data.tags
    states = [str(model.status) for model in client.search_logged_models(["1"])]
    assert sorted(states) == ["FAILED", "READY"]


def test_the_stage_writes_what_it_registered(workspace: Path) -> None:
    main()
    full, row = json.loads((workspace / "registry.json").read_text())
    assert (full["variant"], full["model"], full["gate"]) == ("full", None, None)
    assert row["variant"] == section("variants", VariantParams).names[0]
    first = (workspace / "registry.json").read_bytes()
    main()
    assert (workspace / "registry.json").read_bytes() == first


def check() -> subprocess.CompletedProcess[str]:
    """`python -m tasks.registry.check` in this folder, with the code under test."""
    environment = {**os.environ, "PYTHONPATH": str(Path(tasks.__file__).parents[1])}
    command = [sys.executable, "-m", "tasks.registry.check"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_an_unreachable_server_is_one_line_within_seconds(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    started = time.monotonic()
    done = check()
    assert done.returncode == TRY_AGAIN
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 1
    assert "http://127.0.0.1:9 does not answer" in errors[0]
    assert time.monotonic() - started < 60
