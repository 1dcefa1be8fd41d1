"""Running stages as commands: logs, failures, interruption."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_progress_bars_are_thinned_and_advice_is_dropped() -> None:
    ticks: Iterator[float] = iter([0.0, 1.0, 11.0, 12.0])
    lines = [
        "importance:  10%|#   | 1/10",
        "importance:  50%|##  | 5/10",
        "importance:  60%|### | 6/10",
        "\tgit add dvc.lock",
        "",
        "INFO tlq: done",
    ]
    assert list(stages.worth_logging(lines, lambda: next(ticks))) == ["importance:  50%|##  | 5/10", "INFO tlq: done"]


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


def test_a_stage_finds_the_python_of_its_flow(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """dvc.yaml calls `python`, which may be another one or missing on the path of the flow's process."""
    monkeypatch.setenv("PATH", str(tmp_path))
    found = logged(caplog, "import shutil; print(shutil.which('python'))")
    assert [Path(path).parent for path in found] == [Path(sys.executable).parent]
