"""The MLflow UI in a browser: a registered model with its scores and aliases, and a run with its layers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.registry_results import write_project, write_variant
from support.servers import wait_until_ready
from support.tiny_project import free_port

from tasks.config.params import section
from tasks.config.sections import EvaluateParams, ModelParams, RegisterParams
from tasks.registry.connection import connect
from tasks.stages.register import Registrar, register_all

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[dev]'")

CHROMIUM = os.environ.get("TLQ_CHROMIUM") or shutil.which("chromium") or ""
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium, or set TLQ_CHROMIUM to its path"),
]

_PAGE_MILLISECONDS = 120_000


@pytest.fixture(scope="module")
def rows(
    new_tracking: Callable[[Path], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[dict[str, Any]]]:
    """registry.json of a project with a variant that passes and one that does not, in the project's folder."""
    folder = tmp_path_factory.mktemp("registered")
    write_project(folder)
    write_variant(folder, "rtn-w3a16", right=20)
    write_variant(folder, "tlq-w3a16", right=49)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", new_tracking(folder))
        params = section("register", RegisterParams)
        registrar = Registrar(connect(), params, section("evaluate", EvaluateParams), section("model", ModelParams))
        yield register_all(registrar, ["rtn-w3a16", "tlq-w3a16"])


@pytest.fixture(scope="module")
def server(rows: list[dict[str, Any]]) -> Iterator[str]:
    """`mlflow server` on the project's database; yields its address."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1", "--port", str(port)]
    store = ["--backend-store-uri", os.environ["MLFLOW_TRACKING_URI"], "--workers", "1"]
    with Path("server.log").open("w") as log:
        process = subprocess.Popen([*command, *store], stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(f"{address}/health", process, Path("server.log"))
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.fixture(scope="module")
def page(server: str) -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        opened = chromium.new_page(viewport={"width": 1400, "height": 1000})
        opened.set_default_timeout(_PAGE_MILLISECONDS)
        yield opened
        chromium.close()


def see(page: Any, *texts: str) -> None:
    for text in texts:
        page.get_by_text(text).first.wait_for(state="visible")


def test_a_registered_model_shows_scores_and_aliases(page: Any, server: str) -> None:
    page.goto(f"{server}/#/models/tiny-w3a16")
    see(page, "tiny-w3a16", "Version 2", "champion", "candidate", "score: 98", "gate: passed", "outcome: champion")


def test_a_version_shows_its_table_of_scores(page: Any, server: str) -> None:
    page.goto(f"{server}/#/models/tiny-w3a16/versions/2")
    see(page, "demo_textvqa", "98.0 ±")


def test_a_run_shows_scores_layers_and_data(page: Any, server: str, rows: list[dict[str, Any]]) -> None:
    page.goto(f"{server}/#/experiments/1/runs/{rows[2]['run_id']}")
    see(page, "tlq-w3a16", "mean/retention", "layer/error_after", "demo_textvqa")
