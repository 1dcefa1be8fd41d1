"""Flow `sweep` runs flow `quantize` once per model, collects the scores, and continues after a failed model."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import State
from prefect.artifacts import Artifact
from prefect.states import Completed, Failed

from benchmarks.results import Summary
from flows import artifacts, form, study, sweep
from flows.parameters import ParametersError
from flows.stages import StageFailed
from tlq.quantization.formats import get_scheme
from tlq.recipes import get_recipe


@pytest.fixture
def runs(prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The parameters of every run of `quantize`, which leaves a model's results in the project's folder or fails."""
    seen: list[dict[str, Any]] = []

    def quantize(**parameters: Any) -> State[Any]:
        seen.append(parameters)
        name = Path(parameters["model"]).name
        if name == "broken":
            return Failed(message="calibrate@tlq-w3a16 failed: no")
        registry = [{"variant": "full"}, {"variant": "tlq-w3a16", "model": f"{name}-w3a16", "version": 3}]
        (tmp_path / "registry.json").write_text(json.dumps(registry))
        for variant, score in (("full", 91.0), ("tlq-w3a16", float(len(seen)))):
            folder = tmp_path / "evaluation" / variant
            folder.mkdir(parents=True, exist_ok=True)
            Summary(score, {"textvqa": score}, n=4, skipped=0).save(folder / "summary.json")
        return Completed()

    monkeypatch.setattr(sweep, "quantize", quantize)
    for module in (sweep, artifacts):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return seen


def table() -> list[tuple[str, str, str, float]]:
    """The rows that the Prefect UI shows: model, variant, registered version, score."""
    artifact: Any = Artifact.get("sweep")
    rows = json.loads(str(artifact.data))
    return [(row["model"], row["variant"], row["registered"], row["score"]) for row in rows]


def test_sweep_quantizes_every_model_alike_and_collects_their_scores(runs: list[dict[str, Any]]) -> None:
    sweep.sweep(("data/models/a", "b"), recipes=("tlq",), schemes=("w3a16",), limit=4, data="demo")
    assert [run.pop("model") for run in runs] == ["data/models/a", "b"]
    assert runs[0] == runs[1]
    assert (runs[0]["recipes"], runs[0]["schemes"], runs[0]["limit"]) == (("tlq",), ("w3a16",), 4)
    assert (runs[0]["data"], runs[0]["benchmarks"]) == ("demo", "")
    assert table() == [
        ("a", "full", "", 91.0),
        ("a", "tlq-w3a16", "a-w3a16/3", 1.0),
        ("b", "full", "", 91.0),
        ("b", "tlq-w3a16", "b-w3a16/3", 2.0),
    ]


@pytest.mark.usefixtures("runs")
def test_sweep_goes_on_after_a_failed_model_and_names_it_at_the_end() -> None:
    with pytest.raises(StageFailed, match="1 of 2 models failed. broken: calibrate@tlq-w3a16 failed: no"):
        sweep.sweep(("broken", "good"))
    assert {model for model, *_ in table()} == {"good"}


STUDY = {
    "models": ["a", "data/models/b"],
    "data": "demo",
    "benchmarks": "demo",
    "recipes": ["tlq"],
    "schemes": ["w3a16"],
    "published": {"textvqa": "75.8"},
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A study of two models, in the place of the presets."""
    (tmp_path / "presets/sweep").mkdir(parents=True)
    (tmp_path / "presets/sweep/small.yaml").write_text(yaml.safe_dump(STUDY))
    for module in (study, form):
        monkeypatch.setattr(module, "PRESETS", tmp_path / "presets")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    return "small"


def test_a_study_is_continued_where_it_was_stopped(runs: list[dict[str, Any]], small: str, tmp_path: Path) -> None:
    """Its results outlast the workspace, which holds one model at a time."""
    first = sweep.sweep(models=("a",), study=small)
    assert (runs[0]["data"], runs[0]["recipes"], runs[0]["schemes"]) == ("demo", ("tlq",), ("w3a16",))
    assert "published" in first
    second = sweep.sweep(study=small)
    assert [run["model"] for run in runs] == ["a", "data/models/b"]
    assert [row.split()[:2] for row in second.splitlines()[1:]] == [
        ["a", "full"],
        ["a", "tlq-w3a16"],
        ["b", "full"],
        ["b", "tlq-w3a16"],
        ["published", "TLQ"],
    ]
    assert second.splitlines()[-1].split()[-1] == "75.8"
    assert sweep.sweep(study=small) == second
    assert len(runs) == 2
    (tmp_path / "sweeps/small.csv").unlink()
    sweep.sweep(study=small)
    assert len(runs) == 4


def test_a_failed_model_of_a_study_is_run_again(runs: list[dict[str, Any]], small: str) -> None:
    for _ in range(2):
        with pytest.raises(StageFailed, match="1 of 2 models failed"):
            sweep.sweep(("broken", "good"), study=small)
    assert [run["model"] for run in runs] == ["broken", "good", "broken"]


def test_a_sweep_of_more_recipes_runs_its_models_again(runs: list[dict[str, Any]], small: str) -> None:
    sweep.sweep(("a",), study=small)
    sweep.sweep(("a",), study=small, recipes=("tlq", "rtn"))
    assert len(runs) == 2


@pytest.mark.usefixtures("runs")
def test_a_sweep_without_models_and_an_unknown_study_are_refused(small: str, tmp_path: Path) -> None:
    with pytest.raises(ParametersError, match="a sweep needs models"):
        sweep.sweep()
    with pytest.raises(ParametersError, match="study big: no preset; choose one of small"):
        sweep.sweep(study="big")
    (tmp_path / "presets/sweep/small.yaml").write_text(yaml.safe_dump({**STUDY, "recipe": "tlq"}))
    with pytest.raises(ParametersError, match=r"small\.yaml: .*recipe"):
        sweep.sweep(study=small)


@pytest.mark.parametrize("name", form.preset_names("sweep"))
def test_shipped_studies_name_presets_recipes_and_schemes_that_exist(name: str) -> None:
    read = study.Study.read(name)
    for model in read.models:
        assert model in form.preset_names("model") or (sweep.ROOT / model).is_dir()
    assert read.data in form.preset_names("calibration")
    assert read.benchmarks in form.preset_names("benchmarks")
    assert all(get_recipe(recipe) for recipe in read.recipes)
    assert all(get_scheme(scheme) for scheme in read.schemes)


def test_the_command_line_of_a_sweep() -> None:
    parser = ArgumentParser()
    sweep.add_options(parser)
    given = sweep.parameters_of(parser.parse_args(["--study", "paper-demo", "--limit", "20", "--recipes", "rtn"]))
    assert given == {
        "study": "paper-demo",
        "models": (),
        "data": "",
        "benchmarks": "",
        "limit": 20,
        "recipes": ("rtn",),
        "schemes": (),
        "options": form.Options(),
    }
