"""`python -m tasks.registry.check`: the level of its log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tasks
from tasks.errors import TRY_AGAIN


def check(**environment: str) -> tuple[int, str]:
    """Exit status and log of the command in this folder, with an MLflow that does not answer."""
    addresses = {"PYTHONPATH": str(Path(tasks.__file__).parents[1]), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "tasks.registry.check"]
    environment = {**os.environ, **addresses, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stderr


@pytest.mark.usefixtures("workspace")
def test_debug_adds_the_traceback_of_an_expected_error() -> None:
    status, log = check(TLQ_LOG="debug")
    assert status == TRY_AGAIN
    assert "DEBUG tlq: traceback\nTraceback (most recent call last)" in log
    assert log.splitlines()[-1].startswith("ERROR tlq: ")
    status, log = check(TLQ_LOG="info")
    assert status == TRY_AGAIN
    assert "Traceback" not in log


@pytest.mark.usefixtures("workspace")
def test_an_unknown_level_is_one_line() -> None:
    status, log = check(TLQ_LOG="loud")
    assert status == 1
    assert log == "ERROR tlq: TLQ_LOG is 'loud', must be one of debug, info, warning, error, critical\n"
