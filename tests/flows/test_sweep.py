"""Flow `sweep` runs flow `quantize` once per model, collects the scores, and continues after a failed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prefect import State
from prefect.artifacts import Artifact
from prefect.states import Completed, Failed

from benchmarks.results import Summary
from flows import artifacts, sweep
from flows.stages import StageFailed


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
    sweep.sweep(["data/models/a", "b"], recipes=("tlq",), schemes=("w3a16",), limit=4, data="demo")
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
        sweep.sweep(["broken", "good"])
    assert {model for model, *_ in table()} == {"good"}
