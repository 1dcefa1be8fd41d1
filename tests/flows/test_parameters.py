"""Parameters of a run reach params.yaml, are saved as an experiment, and are removed afterwards."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows import parameters
from flows.parameters import ParametersError, overridden, overrides, with_overrides

TEXT = """# Comments stay.
model: {path: data/demo/model}     # the checkpoint
variants:
  recipes: [rtn, tlq]
evaluate:
  limit: 250     # items
calibset:
  budget: {tokens: 4}
"""


def test_empty_parameters_change_nothing() -> None:
    assert overrides() == {}
    assert overrides(model="", recipes=(), schemes=(), settings={}) == {}


def test_a_model_names_its_registered_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "ROOT", tmp_path)
    (tmp_path / "data/models/qwen2-vl-2b").mkdir(parents=True)
    assert overrides(model="data/models/qwen2-vl-2b") == {
        "model.path": "data/models/qwen2-vl-2b",
        "register.model_name": "qwen2-vl-2b",
    }
    assert overrides(model="data/models/qwen2-vl-2b", name="mine")["register.model_name"] == "mine"


def test_a_missing_model_is_refused() -> None:
    with pytest.raises(ParametersError, match="model qwen9: neither a preset nor a folder"):
        overrides(model="qwen9")


@pytest.mark.skipif(not parameters.PRESETS.is_dir(), reason="no presets in this checkout")
def test_a_model_preset_is_chosen_by_its_name() -> None:
    values = overrides(model="qwen2-vl-2b", limit=8)
    assert values == {"preset": "qwen2-vl-2b", "evaluate.limit": 8}
    params = yaml.safe_load(with_overrides(parameters.PARAMS.read_text(), values))
    assert params["model"]["path"] == "data/models/qwen2-vl-2b"
    assert params["register"]["model_name"] == "qwen2-vl-2b"
    assert params["fetch"]["qwen2-vl-2b"]["revision"]
    assert params["evaluate"]["limit"] == 8


def test_limit_zero_means_all_items() -> None:
    assert overrides(limit=0) == {"evaluate.limit": None}
    assert overrides(limit=20, settings={"calibset.seed": 1}) == {"evaluate.limit": 20, "calibset.seed": 1}


def test_values_are_put_in_by_name_and_comments_stay() -> None:
    text = with_overrides(TEXT, {"evaluate.limit": 8, "variants.recipes": ["tlq-c"], "calibset.budget.tokens": 2})
    assert "# Comments stay." in text
    assert "# items" in text
    assert yaml.safe_load(text) == {
        "model": {"path": "data/demo/model"},
        "variants": {"recipes": ["tlq-c"]},
        "evaluate": {"limit": 8},
        "calibset": {"budget": {"tokens": 2}},
    }


@pytest.mark.parametrize("name", ["calibst.seed", "limit"])
def test_a_section_that_params_yaml_lacks_is_refused(name: str) -> None:
    with pytest.raises(ParametersError, match=f"{name}: no such section in params.yaml; choose one of model, variants"):
        with_overrides(TEXT, {name: 1})


def test_a_name_below_a_plain_value_is_refused() -> None:
    with pytest.raises(ParametersError, match="evaluate.limit.most: limit is a plain value"):
        with_overrides(TEXT, {"evaluate.limit.most": 1})


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one DVC stage that copies a parameter to a metric."""
    (tmp_path / "params.yaml").write_text(TEXT)
    (tmp_path / "dvc.yaml").write_text(
        yaml.safe_dump(
            {
                "stages": {
                    "score": {
                        "cmd": "grep limit params.yaml > out.txt && echo '{\"score\": 1}' > metrics.json",
                        "params": ["evaluate"],
                        "outs": ["out.txt"],
                        "metrics": [{"metrics.json": {"cache": False}}],
                    }
                }
            }
        )
    )
    for command in (
        ["git", "init", "--quiet", "."],
        ["git", "config", "user.name", "t"],
        ["git", "config", "user.email", "t@localhost"],
        [sys.executable, "-m", "dvc", "init", "--quiet"],
        ["git", "add", "--all"],
        ["git", "commit", "--quiet", "-m", "start"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setattr(parameters, "ROOT", tmp_path)
    monkeypatch.setattr(parameters, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(parameters, "experiment_name", lambda: "brave-newt")
    monkeypatch.setattr(parameters, "get_run_logger", lambda: logging.getLogger("flow-test"))
    return tmp_path


def dvc(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_run_with_other_values_is_an_experiment_and_params_yaml_is_as_before(workspace: Path) -> None:
    with overridden({"evaluate.limit": 8}):
        dvc(workspace, "repro", "--quiet")
        assert "limit: 8" in (workspace / "out.txt").read_text()
    assert (workspace / "params.yaml").read_text() == TEXT
    rows = json.loads(dvc(workspace, "exp", "show", "--json"))
    experiments = [revision for row in rows for found in row["experiments"] or [] for revision in found["revs"]]
    assert [revision["name"] for revision in experiments] == ["brave-newt"]
    data = experiments[0]["data"]
    assert data["params"]["params.yaml"]["data"]["evaluate"] == {"limit": 8}
    assert data["metrics"]["metrics.json"]["data"] == {"score": 1}


def test_a_failed_run_leaves_params_yaml_as_before_and_no_experiment(workspace: Path) -> None:
    with pytest.raises(RuntimeError, match="stage"), overridden({"evaluate.limit": 8}):
        raise RuntimeError("stage failed")
    assert (workspace / "params.yaml").read_text() == TEXT
    assert "brave-newt" not in dvc(workspace, "exp", "list")


def test_a_run_without_a_git_identity_is_refused(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    subprocess.run(["git", "config", "--unset", "user.email"], cwd=workspace, check=True)
    with pytest.raises(ParametersError, match="git has no user.email"), overridden({"evaluate.limit": 8}):
        pytest.fail("nothing may run")
    assert (workspace / "params.yaml").read_text() == TEXT


def test_changes_of_params_yaml_during_a_run_are_kept(
    workspace: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = TEXT.replace("250", "100")
    monkeypatch.setattr(parameters, "save_experiment", lambda name: None)
    with overridden({"evaluate.limit": 8}):
        (workspace / "params.yaml").write_text(mine)
    assert (workspace / "params.yaml").read_text() == mine
    assert "was changed during the run" in caplog.text
