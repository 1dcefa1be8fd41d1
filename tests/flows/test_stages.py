"""Running stages as commands: logs, failures, interruption."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prefect.client.schemas.objects import StateType
from support.waiting import Clock

from flows import stages


@pytest.fixture(autouse=True)
def _plain_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "get_run_logger", lambda: logging.getLogger("flow-test"))


def test_output_of_a_command_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stages.run_command([sys.executable, "-c", "print('one'); print('two')"], "hello")
    assert [record.message for record in caplog.records] == ["one", "two"]


def test_a_failure_carries_the_last_lines() -> None:
    command = [sys.executable, "-c", "import sys; print('model.path: not found'); sys.exit(3)"]
    with pytest.raises(stages.StageFailed, match=r"prepare failed: model\.path: not found"):
        stages.run_command(command, "prepare")


def bar(done: int) -> str:
    return f"progress: importance: {done} of 10 done in 00:{done:02}, 01:00 left ({done}batch/s)"


def test_progress_bars_are_thinned_and_advice_is_dropped() -> None:
    ticks: Iterator[float] = iter([0.0, 1.0, 11.0, *[12.0] * 6])
    lines = [bar(1), bar(5), bar(6), bar(10), bar(10), "\tgit add dvc.lock", "", "INFO tlq: done"]
    logged = [text for text in stages.worth_logging(lines, lambda: next(ticks)) if text]
    assert logged == [bar(5), bar(10), "INFO tlq: done"]  # the log does not end with a bar that seems to stand still


def test_the_log_of_a_silent_stage_says_every_minute_that_it_runs() -> None:
    clock = Clock()

    def output() -> Iterator[str | None]:
        for clock.now in (30.0, 60.0, 90.0):
            yield None
        yield "progress: layers: 0 of 6 done in 00:00, ? left (?layer/s)"
        for clock.now in (150.0, 180.0, 210.0):
            yield None

    assert [text for text in stages.worth_logging(output(), clock) if text] == [
        "still running after 01:00",
        "progress: layers: 0 of 6 done in 00:00, ? left (?layer/s)",
        "progress: layers: 0 of 6 done in 01:00, time left not known yet (?layer/s)",
        "progress: layers: 0 of 6 done in 02:00, time left not known yet (?layer/s)",
    ]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with a DVC stage `score` that has run once."""
    stage = {"cmd": "cat in.txt > out.txt", "deps": ["in.txt"], "outs": ["out.txt"]}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"score": stage}}))
    (tmp_path / "in.txt").write_text("1")
    for command in (["git", "init", "--quiet", "."], [sys.executable, "-m", "dvc", "init", "--quiet"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def test_a_stage_that_dvc_does_not_run_ends_as_skipped_or_cached(repository: Path) -> None:
    def state() -> tuple[str | None, StateType, str | None]:
        lines: list[str] = []
        stages.run_command([*stages.REPRO, "score"], "score", repository, lines.append)
        ended = stages._completed(lines)
        return ended.name, ended.type, ended.message

    assert state() == ("Completed", StateType.COMPLETED, None)
    assert state() == ("Skipped", StateType.COMPLETED, "skipped, nothing that it depends on has changed")
    (repository / "in.txt").write_text("2")
    assert state() == ("Completed", StateType.COMPLETED, None)
    (repository / "in.txt").write_text("1")
    assert state() == ("Cached", StateType.COMPLETED, "its result was in DVC's cache")


def test_a_flows_stage_keeps_a_users_file_in_its_output_folder(repository: Path) -> None:
    stage = {"cmd": "mkdir out && cat in.txt > out/scores.txt", "deps": ["in.txt"], "outs": ["out"]}
    (repository / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"score": stage}}))
    (repository / "out").mkdir()
    (repository / "out/notes.txt").write_text("mine")
    lines: list[str] = []
    stages.run_command([*stages.REPRO, "score"], "score", repository, lines.append)
    assert (repository / "kept/out/notes.txt").read_text() == "mine"
    assert [line for line in lines if "notes.txt" in line and "kept/out" in line]


def logged(caplog: pytest.LogCaptureFixture, code: str) -> list[str]:
    """Lines that a stage's command logs when it runs ``code``."""
    caplog.clear()
    caplog.set_level(logging.INFO)
    stages.run_command([sys.executable, "-c", code], "stage")
    return [record.message for record in caplog.records]


def test_concurrent_stages_share_the_cores(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = "import os; print(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.setattr("os.cpu_count", lambda: 9)
    monkeypatch.setenv("TLQ_PARALLEL", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert stages.stages_at_once() == 2
    assert logged(caplog, threads) == ["4"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the user's number of threads has precedence
    assert logged(caplog, threads) == ["7"]


def test_a_stage_receives_no_signal_that_was_meant_for_its_flow(caplog: pytest.LogCaptureFixture) -> None:
    """A worker that cancels a run signals its whole group; a stage that ended first would count as failed."""
    groups = logged(caplog, "import os; print(os.getpgrp())")
    assert groups != [str(os.getpgrp())]


def test_a_stage_finds_the_python_of_its_flow(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """dvc.yaml calls `python`, which may be another one or missing on the path of the flow's process."""
    monkeypatch.setenv("PATH", str(tmp_path))
    found = logged(caplog, "import shutil; print(shutil.which('python'))")
    assert [Path(path).parent for path in found] == [Path(sys.executable).parent]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("flows.quantize", ["transformers.modeling_utils"]),
        ("tasks.stages.calibset", ["transformers.modeling_utils"]),
        ("tasks.registry.check", ["torch", "transformers"]),
        ("tasks.reproduce", ["torch", "transformers", "prefect"]),
    ],
)
def test_what_starts_often_imports_no_models(module: str, absent: list[str]) -> None:
    """They take seconds of CPU, which a run spends once a stage."""
    code = f"import sys, {module}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
