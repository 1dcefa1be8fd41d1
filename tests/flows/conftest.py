"""A Prefect server for the tests, and flows whose stages are recorded and not run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows import evaluate, quantize, stages


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A temporary Prefect server with an empty database."""
    with prefect_test_harness(server_startup_timeout=300):
        yield
        # At the end of the session pytest has closed the stream to which Prefect logs that the server stops.
        logging.getLogger("prefect").setLevel(logging.WARNING)


@pytest.fixture
def commands(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The stages that a flow runs, in order: name, and whether it was forced. Their results are not published."""
    run: list[tuple[str, bool]] = []

    def record(command: list[str], name: str, forward: Callable[[str], None] | None = None) -> None:
        run.append((name, "--force" in command))

    monkeypatch.setattr(stages, "run_command", record)
    for flow in (evaluate, quantize):
        monkeypatch.setattr(flow, "publish_results", lambda variants: " ".join(variants))
    return run
