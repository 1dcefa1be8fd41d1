"""Progress bars on a stage's output become a progress artifact of its task run."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from tqdm import tqdm

from flows import progress
from flows.progress import Bar, with_progress

Calls = list[tuple[float, str]]


def bars(total: int, name: str, postfix: dict[str, str] | None = None) -> list[str]:
    """Lines of a progress bar on an output that is not a terminal."""
    stream = io.StringIO()
    with tqdm(total=total, desc=name, unit="layer", file=stream, mininterval=0) as bar:
        for _ in range(total):
            if postfix:
                bar.set_postfix(postfix, refresh=False)
            bar.update()
    return stream.getvalue().replace("\r", "\n").splitlines()


@pytest.fixture
def artifacts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Calls]:
    """Artifacts of a stand-in for the server: percent and description by key."""
    keys: dict[UUID, str] = {}
    shown: dict[str, Calls] = {}

    def create(percent: float, key: str, description: str) -> UUID:
        number = uuid4()
        keys[number] = key
        shown[key] = [(percent, description)]
        return number

    def update(number: UUID, percent: float, description: str) -> UUID:
        shown[keys[number]].append((percent, description))
        return number

    monkeypatch.setattr(progress, "create_progress_artifact", create)
    monkeypatch.setattr(progress, "update_progress_artifact", update)
    return shown


def ticking(step: float) -> Callable[[], float]:
    time = iter(step * number for number in range(10_000))
    return lambda: next(time)


def test_bars_of_tqdm_are_parsed() -> None:
    line = "tlq w3a16:  50%|█████     | 14/28 [01:10<01:12, 5.05s/layer, error=0.0191]"
    assert Bar.read(line) == Bar("tlq w3a16", 14, 28, "01:10", "01:12", "5.05s/layer, error=0.0191")
    last = Bar.read(bars(3, "importance")[-1])
    assert last is not None
    assert (last.name, last.done, last.total) == ("importance", 3, 3)
    assert Bar.read("answers:   0%|          | 0/8 [00:00<?, ?item/s]") == Bar("answers", 0, 8, "00:00", "?", "?item/s")
    assert Bar.read("INFO tlq: 50% of | 1/2 [files]") is None
    assert Bar.read("0it [00:00, ?it/s]") is None


def test_every_layer_is_shown_with_error_and_time_left(artifacts: dict[str, Calls]) -> None:
    lines = ["Running stage", *bars(4, "tlq w3a16", {"error": "0.02"}), "exported"]
    assert list(with_progress(lines, "calibrate@tlq-w3a16", ticking(5))) == lines
    (key,) = artifacts
    assert key == "progress-calibrate-tlq-w3a16"
    assert [percent for percent, _ in artifacts[key]] == [0, 25, 50, 75, 100]
    text = artifacts[key][2][1]
    assert text.startswith("tlq w3a16: 2 of 4 done in 00:00, ")
    assert "left (" in text
    assert "error=0.02" in text


def test_quick_steps_are_shown_at_intervals_and_the_last_always(artifacts: dict[str, Calls]) -> None:
    list(with_progress(bars(100, "answers"), "evaluate", ticking(0.1)))
    shown = artifacts["progress-evaluate"]
    assert 3 < len(shown) < 30
    assert shown[-1][0] == 100


def test_a_stage_without_a_bar_has_no_artifact(artifacts: dict[str, Calls]) -> None:
    assert list(with_progress(["one", "two"], "calibset")) == ["one", "two"]
    assert artifacts == {}


def test_an_unreachable_server_does_not_end_the_stage(
    artifacts: dict[str, Calls], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: Iterator[bool] = iter([False, True, True])
    create = progress.create_progress_artifact

    def unsteady(*args: Any, **named: Any) -> UUID:
        if not next(answers):
            raise httpx.ConnectError("connection refused")
        return create(*args, **named)

    monkeypatch.setattr(progress, "create_progress_artifact", unsteady)
    with caplog.at_level(logging.WARNING):
        list(with_progress(bars(3, "tlq"), "calibrate", ticking(5)))
    assert "progress of calibrate could not be shown: connection refused" in caplog.text
    assert [percent for percent, _ in artifacts["progress-calibrate"]][-1] == 100
