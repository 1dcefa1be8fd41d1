"""Parameters of a run reach params.yaml, are saved as an experiment, and are removed afterwards."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import form, parameters
from flows.form import Inputs, Options, QuantizeOptions
from flows.parameters import ParametersError, overridden, overrides, with_overrides
from tasks.config.params import ParamsError

SHIPPED = (form.ROOT / "params.yaml").read_text()
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
    assert overrides(Inputs("", "", ""), recipes=(), schemes=(), options=QuantizeOptions()) == {}


def test_a_model_names_its_registered_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "ROOT", tmp_path)
    (tmp_path / "data/models/qwen2-vl-2b").mkdir(parents=True)
    inputs = Inputs("data/models/qwen2-vl-2b")
    assert overrides(inputs) == {
        "model.path": "data/models/qwen2-vl-2b",
        "register.model_name": "qwen2-vl-2b",
        "register.promote": False,
    }
    assert overrides(inputs, options=QuantizeOptions(name="mine"))["register.model_name"] == "mine"


def test_a_missing_model_is_refused() -> None:
    with pytest.raises(ParametersError, match="model qwen9: neither a preset nor a folder"):
        overrides(Inputs("qwen9"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (Inputs(data="coco"), "data coco: no preset; choose one of demo, sharegpt4v, textvqa-train"),
        (Inputs(benchmarks="all"), "benchmarks all: no preset; choose one of benchmarks, demo, text-benchmarks"),
    ],
)
def test_unknown_data_and_benchmarks_are_refused(inputs: Inputs, message: str) -> None:
    with pytest.raises(ParametersError, match=message):
        overrides(inputs)


def test_presets_of_model_data_and_benchmarks_are_applied() -> None:
    values = overrides(Inputs("qwen2-vl-2b", "textvqa-train", "text-benchmarks"), limit=8)
    presets = {"model": "qwen2-vl-2b", "calibration": "textvqa-train", "benchmarks": "text-benchmarks"}
    assert values == {"preset": presets, "evaluate.limit": 8, "register.promote": False}
    params = yaml.safe_load(with_overrides(SHIPPED, values))
    assert params["model"]["path"] == "data/models/qwen2-vl-2b"
    assert params["register"]["model_name"] == "qwen2-vl-2b"
    assert params["fetch"]["qwen2-vl-2b"]["revision"]
    assert params["evaluate"]["limit"] == 8
    assert params["prepare"]["path"] == "data/calibration/textvqa-train"
    assert params["evaluate"]["benchmarks"][0]["task"] == "textvqa_vlm"
    assert params["register"]["floors"] == {}
    parameters.check(yaml.safe_dump(params), values)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            Inputs("qwen2-vl-2b"),
            r"data/models/qwen2-vl-2b is calibrated on demo data .* and scored on demo benchmarks .*; choose data "
            r"\(sharegpt4v or textvqa-train; demo keeps the demo's\) and benchmarks \(benchmarks or text-benchmarks",
        ),
        (Inputs("qwen2-vl-2b", "demo"), r"scored on demo benchmarks \(demo_textvqa, .*; choose benchmarks"),
        (Inputs("qwen2-vl-2b", "", "text-benchmarks"), r"calibrated on demo data \(data/demo/.*; choose data \("),
    ],
)
def test_a_real_model_in_the_form_needs_data_and_benchmarks(inputs: Inputs, message: str) -> None:
    values = overrides(inputs)
    with pytest.raises(ParametersError, match=message):
        parameters.check(with_overrides(SHIPPED, values), values)


def test_a_checkpoint_folder_in_the_form_needs_data_and_benchmarks() -> None:
    values = {"model.path": "data/models/mine"}
    with pytest.raises(ParametersError, match="data/models/mine is calibrated on demo data"):
        parameters.check(with_overrides(SHIPPED, values), values)


@pytest.mark.parametrize(
    "inputs", [Inputs("qwen2-vl-2b", "demo", "demo"), Inputs("demo"), Inputs(data="textvqa-train")]
)
def test_demo_inputs_that_the_form_names_are_used(inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    values = overrides(inputs)
    parameters.check(with_overrides(SHIPPED, values), values)
    assert not caplog.text


def test_demo_inputs_for_a_real_model_in_params_yaml_are_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameters, "get_run_logger", lambda: logging.getLogger("flow-test"))
    parameters.check(SHIPPED.replace("data/demo/model ", "data/models/mine "), {})
    assert "data/models/mine is calibrated on demo data" in caplog.text
    assert "choose data (sharegpt4v or textvqa-train" in caplog.text


@pytest.mark.parametrize("values", [{}, {"evaluate.limit": 200}, {"register.promote": False}])
def test_a_gate_that_no_version_can_pass_is_refused_before_params_yaml_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    text = SHIPPED.replace("{demo_textvqa: 90,", "{demo_txtvqa: 90,")
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.setattr(parameters, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(parameters, "check_identity", lambda: None)
    message = "register.floors: demo_txtvqa not among evaluate.benchmarks"
    with pytest.raises(ParamsError, match=message), overridden(values):
        pytest.fail("nothing may run")
    assert (tmp_path / "params.yaml").read_text() == text


def test_only_a_run_without_other_values_promotes_unless_it_is_asked() -> None:
    assert overrides() == {}
    assert overrides(limit=20)["register.promote"] is False
    assert overrides(limit=20, options=Options(promote=True))["register.promote"] is True
    assert overrides(options=Options(promote=False)) == {"register.promote": False}
    assert overrides(options=Options(settings={"register.promote": True}))["register.promote"] is True


def test_a_run_that_asks_to_promote_must_score_enough_items() -> None:
    few = overrides(limit=8)
    parameters.check(with_overrides(SHIPPED, few), few)
    asked = overrides(limit=8, options=Options(promote=True))
    with pytest.raises(
        ParamsError, match="evaluate.limit: the limit is 8 items, register.min_items needs at least 100"
    ):
        parameters.check(with_overrides(SHIPPED, asked), asked)


def test_limit_zero_means_all_items() -> None:
    assert overrides(limit=0)["evaluate.limit"] is None
    values = overrides(limit=20, options=Options(settings={"calibset.seed": 1}))
    assert values == {"evaluate.limit": 20, "calibset.seed": 1, "register.promote": False}


def test_a_file_without_a_registry_has_nothing_to_promote() -> None:
    assert "register" not in yaml.safe_load(with_overrides(TEXT, {"evaluate.limit": 8, "register.promote": False}))


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
