"""Registration in MLflow: versions, lineage, idempotence, an unreachable server, serving by reference."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from tasks import register
from tasks.params import ModelParams
from tasks.register import RegisterParams

METRICS = {
    "variant": "rtn-w3a16",
    "benchmarks": {"demo_chartqa": {"score": 70.0, "low": 60.0, "high": 80.0, "n": 10, "parts": {}}},
    "mean": {"score": 70.0, "low": 60.0, "high": 80.0, "retention": 98.5, "kl": 0.01},
}
PARAMS = RegisterParams(model_name="tiny")
MODEL = ModelParams(path="unused")


@pytest.fixture
def workspace(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder with one variant that is ready to be registered."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    shutil.copytree(tiny_checkpoint, tmp_path / "models/rtn-w3a16")
    (tmp_path / "models/rtn-w3a16/calibration.json").write_text("{}")
    (tmp_path / "evaluation/rtn-w3a16").mkdir(parents=True)
    (tmp_path / "evaluation/rtn-w3a16/metrics.json").write_text(json.dumps(METRICS))
    (tmp_path / "params.yaml").write_text("recipes: {rtn: {}}\nmodel: {path: unused}\n")
    (tmp_path / "dvc.lock").write_text(
        "stages: {prepare: {outs: [{path: data/prepared, md5: aa}]}, calibrate@rtn-w3a16: {outs: [{path: m, md5: bb}]},"
        " calibrate@tlq-w3a16: {outs: [{path: other, md5: cc}]}}"
    )
    return tmp_path


def test_a_version_has_scores_lineage_and_answers_questions(workspace: Path) -> None:
    client = register.connect()
    row = register.register("rtn-w3a16", PARAMS, MODEL, client)
    assert (row["model"], row["version"]) == ("tiny-w3a16", 1)
    run = client.get_run(row["run_id"])
    assert run.data.metrics["mean.retention"] == 98.5
    assert run.data.params["model.path"] == "unused"
    assert run.data.tags["dvc.data/prepared"] == "aa"
    assert run.data.tags["dvc.m"] == "bb"
    assert "dvc.other" not in run.data.tags

    model = mlflow.pyfunc.load_model("models:/tiny-w3a16/1")
    from tiny import png

    answers = model.predict(pd.DataFrame({"image": [png(0)], "question": ["What is it?"]}))
    assert len(answers) == 1
    assert isinstance(answers[0], str)
    with pytest.raises(mlflow.exceptions.MlflowException, match="unreadable image"):
        model.predict(pd.DataFrame({"image": [b"junk"], "question": ["What is it?"]}))


def test_registering_twice_makes_one_version_and_new_scores_make_another(workspace: Path) -> None:
    client = register.connect()
    first = register.register("rtn-w3a16", PARAMS, MODEL, client)
    assert register.register("rtn-w3a16", PARAMS, MODEL, client) == first
    changed = METRICS | {"mean": {"score": 71.0}}
    (workspace / "evaluation/rtn-w3a16/metrics.json").write_text(json.dumps(changed))
    assert register.register("rtn-w3a16", PARAMS, MODEL, client)["version"] == 2


def test_a_checkpoint_that_changed_is_refused(workspace: Path) -> None:
    register.register("rtn-w3a16", PARAMS, MODEL, register.connect())
    (workspace / "models/rtn-w3a16/calibration.json").write_text('{"changed": true}')
    with pytest.raises(ValueError, match="is not the checkpoint that was registered"):
        mlflow.pyfunc.load_model("models:/tiny-w3a16/1")


def test_missing_scores_say_what_to_run(workspace: Path) -> None:
    (workspace / "evaluation/rtn-w3a16/metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="run `dvc repro evaluate` first"):
        register.register("rtn-w3a16", PARAMS, MODEL, register.connect())


def test_an_unreachable_server_is_one_line_within_seconds(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (workspace / "params.yaml").write_text("register: {model_name: tiny}\n")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tasks.register", "--check"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 1
    assert "http://127.0.0.1:9 does not answer" in errors[0]
    assert time.monotonic() - started < 60
