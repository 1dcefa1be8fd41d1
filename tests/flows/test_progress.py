"""Progress bars on a stage's output become a progress artifact of its task run."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from subprocess import PIPE, STDOUT
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from support.waiting import Clock
from tqdm import tqdm

from flows import progress
from flows.progress import BAR_ENVIRONMENT, Bar, lines_and_pauses, with_progress

Calls = list[tuple[float, str]]


def bars(total: int, name: str, postfix: dict[str, str] | None = None) -> list[str]:
    """Lines of a progress bar in the output of a stage."""
    stream = io.StringIO()
    form = BAR_ENVIRONMENT["TQDM_BAR_FORMAT"]
    with tqdm(total=total, desc=name, unit="layer", file=stream, mininterval=0, bar_format=form) as bar:
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
    line = "progress: tlq w3a16: 14 of 28 done in 01:10, 01:12 left ( 5.05s/layer, error=0.0191)"
    assert Bar.read(line) == Bar("tlq w3a16", 14, 28, 70, 72, " 5.05s/layer, error=0.0191")
    last = Bar.read([line for line in bars(3, "importance") if line.strip()][-1])
    assert last is not None
    assert (last.name, last.done, last.total) == ("importance", 3, 3)
    first = Bar.read(next(line for line in bars(8, "a: b (c)") if line.strip()))
    assert first == Bar("a: b (c)", 0, 8, 0, None, "?layer/s")
    long = Bar.read("progress: 1 of 2 done in 1:00:05, 1:00:05 left (?)")
    assert long is not None
    assert (long.name, long.elapsed) == ("", 3605)
    for other in ("INFO tlq: 1 of 2 done in 00:01, 00:01 left (1s/it)", "progress: 3 of ? done in 00:01, ? left (?)"):
        assert Bar.read(other) is None


def test_the_first_bar_of_a_stage_is_read_before_its_first_step_is_done() -> None:
    """tqdm ends a bar's line only when it writes the next one, so a reader of lines would be one step behind."""
    code = "from tqdm import tqdm; import time\nwith tqdm(total=6, desc='layers'): time.sleep(60)"
    command = [sys.executable, "-c", code]
    environment = os.environ | BAR_ENVIRONMENT
    with subprocess.Popen(command, env=environment, stdout=PIPE, stderr=STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            read = (Bar.read(line) for line in lines_and_pauses(process.stdout, 0.2) if line is not None)
            first = next(bar for bar in read if bar is not None)
            assert process.poll() is None
        finally:
            process.kill()
    assert (first.name, first.done, first.total) == ("layers", 0, 6)


def test_a_silent_stream_yields_pauses() -> None:
    def stream() -> Iterator[str]:
        yield "one"
        time.sleep(0.5)
        yield "two"

    lines = list(lines_and_pauses(stream(), 0.1))
    assert [line for line in lines if line is not None] == ["one", "two"]
    assert 2 <= lines.count(None) <= 5


def test_a_bar_shows_the_elapsed_time_while_its_first_step_takes_long(artifacts: dict[str, Calls]) -> None:
    clock = Clock()

    def output() -> Iterator[str | None]:
        yield "progress: tlq w3a16: 0 of 6 done in 00:00, ? left (?layer/s)"
        for clock.now in (60.0, 120.0):
            yield None
        yield "progress: tlq w3a16: 1 of 6 done in 02:10, 10:50 left (130s/layer)"
        clock.now = 150.0
        yield None

    list(with_progress(output(), "calibrate@tlq-w3a16", clock))
    assert [text.partition(" (")[0] for _, text in artifacts["progress-calibrate-tlq-w3a16"]] == [
        "tlq w3a16: 0 of 6 done in 00:00, time left not known yet",
        "tlq w3a16: 0 of 6 done in 01:00, time left not known yet",
        "tlq w3a16: 0 of 6 done in 02:00, time left not known yet",
        "tlq w3a16: 1 of 6 done in 02:10, 10:50 left",
        "tlq w3a16: 1 of 6 done in 02:40, 10:20 left",
    ]


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
