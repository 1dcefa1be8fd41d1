"""The order in which flows `quantize` and `evaluate` run their stages, and which stages `force` names."""

from __future__ import annotations

import shutil
import sys
import time
from argparse import ArgumentParser
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.utilities.callables import parameter_schema

from flows import command, evaluate, names, parameters, quantize, stages, sweep
from flows.form import ROOT, STAGES, Options, QuantizeOptions
from flows.parameters import ParametersError
from tasks.config.params import ParamsError

Commands = list[tuple[str, bool]]


@pytest.fixture(autouse=True)
def _params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A params.yaml with two variants and one download."""
    params = {
        "fetch": {"qwen": {"out": "data/models/qwen"}},
        "variants": {"recipes": ["rtn", "tlq"], "schemes": ["w3a16"]},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.setattr(parameters, "PARAMS", tmp_path / "params.yaml")
    monkeypatch.setattr(names, "ROOT", tmp_path)


def test_evaluate_reports_before_it_registers(commands: Commands) -> None:
    assert evaluate.evaluate() == "full rtn-w3a16 tlq-w3a16"
    names = [name for name, _ in commands]
    assert names[:2] == ["check MLflow", "baseline"]
    assert sorted(names[2:4]) == ["evaluate@rtn-w3a16", "evaluate@tlq-w3a16"]
    assert names[4:] == ["report", "register"]


def test_evaluate_scores_only_the_models_named(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "find_models", lambda models, variants: [f"{name}-w3a16" for name in models])
    evaluate.evaluate(models=("tlq",), again=True)
    assert commands[1:] == [("baseline", False), ("evaluate@tlq-w3a16", True), ("report", False), ("register", False)]


def test_quantize_evaluates_each_variant_after_its_calibration_and_registers_last(commands: Commands) -> None:
    quantize.quantize()
    names = [name for name, _ in commands]
    assert sorted(names[:2]) == ["check MLflow", "demo"]  # at the same time
    assert names[2] == "fetch@qwen"
    assert names.index("prepare") < names.index("importance") < names.index("calibset")
    for variant in ("rtn-w3a16", "tlq-w3a16"):
        assert names.index("calibset") < names.index(f"calibrate@{variant}") < names.index(f"evaluate@{variant}")
        assert names.index("baseline") < names.index(f"evaluate@{variant}")
    assert names[-2:] == ["report", "register"]
    assert not any(forced for _, forced in commands)


def test_nothing_long_begins_before_mlflow_has_answered(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], name: str, forward: Any = None) -> None:
        commands.append((name, False))
        if name == "check MLflow":
            time.sleep(0.5)  # longer than the demo
            raise stages.StageFailed("check MLflow failed: MLflow at nowhere does not answer")

    monkeypatch.setattr(stages, "run_command", run)
    with pytest.raises(stages.StageFailed, match="^check MLflow failed: MLflow at nowhere does not answer$"):
        quantize.quantize()
    assert sorted(commands) == [("check MLflow", False), ("demo", False)]


def test_a_real_model_alone_is_refused_before_the_first_stage(commands: Commands) -> None:
    shutil.copyfile(ROOT / "params.yaml", parameters.PARAMS)
    with pytest.raises(ParametersError, match="choose data .* and benchmarks"):
        quantize.quantize(model="qwen2-vl-2b")
    assert commands == []


def test_a_gate_that_no_version_can_pass_stops_the_flow_before_its_first_stage(commands: Commands) -> None:
    text = (ROOT / "params.yaml").read_text().replace("{demo_textvqa: 90,", "{textvqa_vlm: 90,")
    parameters.PARAMS.write_text(text)
    for flow in (quantize.quantize, evaluate.evaluate):
        with pytest.raises(ParamsError, match="register.floors: textvqa_vlm not among"):
            flow()
    assert commands == []


def test_the_command_line_has_the_fields_of_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model", "qwen2-vl-2b", "--data", "textvqa-train", "--benchmarks", "text-benchmarks", "--limit", "200"]
    words += ["--recipes", "rtn", "tlq", "--set", "calibset.seed=1", "evaluate.data=null", "--force", "fetch"]
    parser = ArgumentParser()
    quantize.add_options(parser)
    given = quantize.parameters_of(parser.parse_args([*words, "--promote"]))
    assert given == {
        "model": "qwen2-vl-2b",
        "data": "textvqa-train",
        "benchmarks": "text-benchmarks",
        "recipes": ["rtn", "tlq"],
        "schemes": [],
        "limit": 200,
        "options": QuantizeOptions(
            settings={"calibset.seed": 1, "evaluate.data": None}, promote=True, force=("fetch",), name=""
        ),
    }
    plain = quantize.parameters_of(parser.parse_args([]))
    assert plain.pop("options") == QuantizeOptions()
    assert not any(plain.values())
    with pytest.raises(SystemExit):
        parser.parse_args(["--data", "coco"])


def test_models_can_be_scored_again_from_the_command_line() -> None:
    parser = ArgumentParser()
    evaluate.add_options(parser)
    words = ["demo-w3a16@champion", "--limit", "0", "--again", "--set", "evaluate.seed=1", "--no-promote"]
    assert evaluate.parameters_of(parser.parse_args(words)) == {
        "models": ("demo-w3a16@champion",),
        "limit": 0,
        "again": True,
        "options": Options(settings={"evaluate.seed": 1}, promote=False),
    }
    plain = evaluate.parameters_of(parser.parse_args([]))
    assert plain.pop("options") == Options()
    assert not any(plain.values())


def test_the_form_has_menus_of_presets() -> None:
    for flow in (quantize.quantize, sweep.sweep):
        fields = parameter_schema(flow.fn).properties
        assert fields["data"]["enum"] == ["", "demo", "sharegpt4v", "textvqa-train"]
        assert fields["benchmarks"]["enum"] == ["", "benchmarks", "demo", "text-benchmarks"]


def test_a_mistake_on_the_command_line_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def flow(**parameters: object) -> str:
        raise ParametersError("model qwen9: neither a preset nor a folder")

    monkeypatch.setattr(sys, "argv", ["quantize"])
    monkeypatch.setattr(command, "wait_for_prefect", lambda: None)
    with pytest.raises(SystemExit, match="model qwen9: neither"):
        command.main(flow, "")
    monkeypatch.setattr(sys, "argv", ["quantize", "--set", "seed"])
    with pytest.raises(SystemExit, match="--set seed: must be NAME=VALUE"):
        command.main(flow, "", quantize.add_options, quantize.parameters_of)


def test_ctrl_c_in_a_terminal_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def flow(**parameters: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["quantize"])
    monkeypatch.setattr(command, "wait_for_prefect", lambda: None)
    with pytest.raises(SystemExit) as ended:
        command.main(flow, "")
    assert ended.value.code == 130
    assert capsys.readouterr().err.strip() == "interrupted; run the same command again to continue"


def test_force_runs_exactly_the_stages_named(commands: Commands) -> None:
    """Every stage of the flow is in the form's menu, and every entry of the menu forces its stages only."""
    quantize.quantize(options=QuantizeOptions(force=STAGES))
    assert {name for name, forced in commands if not forced} == {"check MLflow"}
    commands.clear()
    quantize.quantize(options=QuantizeOptions(force=("fetch", "calibrate")))
    assert {name for name, forced in commands if forced} == {
        "fetch@qwen",
        "calibrate@rtn-w3a16",
        "calibrate@tlq-w3a16",
    }


def run(flow: Flow[Any, Any], **parameters: Any) -> tuple[str, dict[str, Any]]:
    """Run a flow; its run's name, and its progress artifact."""
    flow_run_id = flow(**parameters, return_state=True).state_details.flow_run_id
    assert flow_run_id is not None
    with get_client(sync_client=True) as client:
        conditions = {
            "artifact_filter": ArtifactFilter.model_validate({"key": {"any_": ["progress"]}}),
            "flow_run_filter": FlowRunFilter.model_validate({"id": {"any_": [flow_run_id]}}),
        }
        (artifact,) = client.read_artifacts(**conditions)
        return client.read_flow_run(flow_run_id).name, artifact.model_dump()


@pytest.mark.usefixtures("commands")
def test_a_run_is_named_by_its_variants_and_day_and_shows_that_every_stage_is_done() -> None:
    name, progress = run(quantize.quantize)
    assert name == f"rtn+tlq w3a16 {date.today().isoformat()}"
    assert progress["data"] == 100
    assert progress["description"] == "13 of 13 stages done; nothing left"


def test_the_log_numbers_the_stages_of_a_run(commands: Commands, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    evaluate.evaluate()
    lines = [record.message for record in caplog.records if record.message.startswith("stage ")]
    assert lines[0].startswith("stage 1 of 5 baseline, ")
    assert lines[1].startswith("stage 1 of 5 baseline: done in 0 s; ")
    assert lines[-1] == "stage 5 of 5 register: done in 0 s; nothing left"
