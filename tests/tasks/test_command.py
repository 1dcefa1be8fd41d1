"""The errors of a stage: one line on stderr and an exit status."""

from __future__ import annotations

import logging
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.disks import full_disk

from tasks.command import command_line, device, run
from tasks.planning import add_dry_run
from tlq.runtime.files import new_directory

ROOT = Path(__file__).parents[2]


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [ValueError("two\n  lines"), FileNotFoundError("two lines"), FloatingPointError("two lines")],
    ids=lambda error: type(error).__name__,
)
def test_expected_errors_are_one_line_and_status_one(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(lambda: fail(error))
    assert stopped.value.code == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.getMessage() == "two lines"
    assert record.exc_info is None


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_of_any_library_is_told_with_the_next_step(
    wrapped: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may raise an error of its own from it, and names no file."""
    monkeypatch.chdir(tmp_path)

    def full() -> None:
        try:
            full_disk()
        except OSError as error:
            if not wrapped:
                raise
            raise KeyError("cannot log") from error

    with pytest.raises(SystemExit) as stopped:
        run(full)
    assert stopped.value.code == 1
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    said = record.getMessage()
    assert f"that of {tmp_path} or of temporary files" in said
    assert said.endswith("free some space and run the same command again")
    assert "\n" not in said


def test_defects_keep_their_traceback() -> None:
    with pytest.raises(KeyError):
        run(lambda: fail(KeyError("a defect")))


def test_an_interruption_has_its_own_status(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(lambda: fail(KeyboardInterrupt()))
    assert stopped.value.code == 130
    assert "interrupted; run the same command again" in caplog.text


def test_any_error_after_a_signal_counts_as_an_interruption(caplog: pytest.LogCaptureFixture) -> None:
    """Extension code may raise another error in place of KeyboardInterrupt."""

    def stage() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ValueError("could not determine the shape") from error

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run(stage)
    assert stopped.value.code == 143
    assert "could not determine" not in caplog.text
    assert signal.getsignal(signal.SIGTERM) is handler


def test_sigterm_leaves_no_partial_directory(tmp_path: Path) -> None:
    """A scheduler's SIGTERM arrives while a directory is written."""

    def stage() -> None:
        with new_directory(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the signal was ignored")

    with pytest.raises(SystemExit) as stopped:
        run(stage)
    assert stopped.value.code == 143
    assert list(tmp_path.iterdir()) == []


def test_a_stage_started_in_the_wrong_folder_ends_with_one_line(tmp_path: Path) -> None:
    """The full command line prints only one line on stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "tasks.stages.calibset"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "ERROR tlq: params.yaml: not found; run from the project's top folder\n"


STAGES = ("fetch", "prepare", "importance", "calibset", "allocate", "calibrate", "evaluate", "report", "register")


@pytest.mark.parametrize("module", [*(f"tasks.stages.{stage}" for stage in STAGES), "tasks.preset"])
def test_help_prints_the_docstring_and_runs_nothing(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder has no params.yaml, so a stage that ran would fail or leave a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--help" in printed
    assert len(printed) > 200
    assert list(tmp_path.iterdir()) == []


def test_options_become_arguments_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["stage", "--dry-run"])
    calls: list[bool] = []
    command_line(lambda dry_run: calls.append(dry_run), "A stage.", add_dry_run)
    assert calls == [True]


def test_the_device_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLQ_DEVICE", "meta")
    assert device() == torch.device("meta")
    monkeypatch.delenv("TLQ_DEVICE")
    assert device().type == ("cuda" if torch.cuda.is_available() else "cpu")
