"""Advice on failed runs, and the choice of failures to retry."""

from __future__ import annotations

import inspect
import logging
import sys

import pytest
from prefect.states import Failed

from flows import stages
from flows.hooks import HOOKS, advice
from flows.stages import StageFailed, StageUnavailable, is_retryable
from tasks.errors import TRY_AGAIN, is_transient


def test_advice_names_the_failed_stage_and_its_command() -> None:
    text = advice(
        "Flow run encountered an exception: StageFailed: calibrate@tlq-w3a16 failed: ERROR tlq: no space left"
    )
    assert text.startswith("## Stage calibrate@tlq-w3a16 failed\n\n```\nERROR tlq: no space left\n```")
    assert "`python -m tasks.reproduce --single-item calibrate@tlq-w3a16`" in text
    assert "Start the flow again" in text


def test_advice_on_mlflow_names_the_command_that_checks_it() -> None:
    text = advice("Flow run encountered an exception: StageFailed: check MLflow failed: ERROR tlq: store failed: why")
    assert text.startswith("## MLflow did not pass the check\n\n```\nERROR tlq: store failed: why\n```")
    assert "`python -m tasks.registry.check`" in text
    assert "TLQ_LOG=debug" in text
    assert "tasks.reproduce" not in text


def test_advice_on_a_lock_held_by_another_command_is_to_wait() -> None:
    assert "Another `dvc` command is at work" in advice("StageFailed: demo failed: ERROR: '/p/dvc.yaml' is busy")


def test_other_failures_show_their_message() -> None:
    assert "limit: no such section" in advice(
        "Flow run encountered an exception: ParametersError: limit: no such section"
    )


def test_hooks_take_the_names_that_prefect_passes() -> None:
    for hook in [hook for hooks in HOOKS.values() for hook in hooks]:
        assert list(inspect.signature(hook).parameters) == ["flow", "flow_run", "state"]


@pytest.fixture
def _plain_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "get_run_logger", lambda: logging.getLogger("flow-test"))


@pytest.mark.usefixtures("_plain_logger")
@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (f"raise SystemExit({TRY_AGAIN})", StageUnavailable),
        (
            f"print('failed to run: python -m tasks.stages.prepare, exited with {TRY_AGAIN}'); raise SystemExit(255)",
            StageUnavailable,
        ),
        ("print('failed to run: python -m tasks.stages.prepare, exited with 1'); raise SystemExit(255)", StageFailed),
    ],
)
def test_only_an_unavailable_service_is_retried(code: str, kind: type[StageFailed]) -> None:
    with pytest.raises(StageFailed) as caught:
        stages.run_command([sys.executable, "-c", code], "prepare")
    assert type(caught.value) is kind
    state = Failed(data=caught.value)
    assert is_retryable(None, None, state) == (kind is StageUnavailable)


def raised_from(cause: Exception) -> Exception:
    try:
        try:
            raise cause
        except Exception as error:
            raise OSError("data set cannot be read") from error
    except OSError as error:
        return error


def test_is_transient_follows_the_causes_of_an_error() -> None:
    import httpx
    import requests

    busy = httpx.HTTPStatusError("busy", request=httpx.Request("GET", "http://h"), response=httpx.Response(503))
    missing = httpx.HTTPStatusError("gone", request=httpx.Request("GET", "http://h"), response=httpx.Response(404))
    for error in (ConnectionError("MLflow"), httpx.ConnectError("hub"), requests.ConnectionError("hub"), busy):
        assert is_transient(error)
        assert is_transient(raised_from(error))
    for error in (missing, OSError("disk full"), ValueError("bad key"), FileNotFoundError("model.path")):
        assert not is_transient(raised_from(error))
