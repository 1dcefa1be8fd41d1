"""A sweep is one run of the pipeline per model, and one that fails does not stop the others."""

from __future__ import annotations

from typing import Any

import pytest
from prefect import State
from prefect.states import Completed, Failed

from flows import sweep
from flows.stages import StageFailed


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What was run, and the last table; models called `broken` fail."""
    seen: dict[str, Any] = {"parameters": []}

    def quantize(**parameters: Any) -> State[Any]:
        seen["parameters"].append(parameters)
        return Failed(message="calibrate@tlq-w3a16 failed: no") if parameters["model"] == "broken" else Completed()

    monkeypatch.setattr(sweep, "quantize", quantize)
    monkeypatch.setattr(sweep, "variants_registered", lambda: ["full", "tlq-w3a16"])
    monkeypatch.setattr(sweep, "score_rows", lambda variants: [{"variant": name, "score": 90.0} for name in variants])
    monkeypatch.setattr(sweep, "create_table_artifact", lambda rows, **_: seen.update(table=list(rows)))
    return seen


def test_every_model_is_run_with_the_same_recipes_and_schemes(runs: dict[str, Any]) -> None:
    sweep.sweep.fn(["data/models/a", "b"], recipes=("tlq",), schemes=("w3a16",), limit=4)
    assert [each["model"] for each in runs["parameters"]] == ["data/models/a", "b"]
    assert {(each["recipes"], each["schemes"], each["limit"]) for each in runs["parameters"]} == {
        (("tlq",), ("w3a16",), 4)
    }
    assert [(row["model"], row["variant"]) for row in runs["table"]] == [
        ("a", "full"),
        ("a", "tlq-w3a16"),
        ("b", "full"),
        ("b", "tlq-w3a16"),
    ]


def test_a_model_that_fails_is_named_at_the_end(runs: dict[str, Any]) -> None:
    with pytest.raises(StageFailed, match="1 of 2 models failed. broken: calibrate@tlq-w3a16 failed: no"):
        sweep.sweep.fn(["broken", "good"])
    assert {row["model"] for row in runs["table"]} == {"good"}
