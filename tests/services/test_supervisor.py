"""The supervisor waits for services, restarts or reports those that end, and stops their child processes."""

from __future__ import annotations

import re
import shlex
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.tiny_project import free_port

from services import supervisor
from services.supervisor import Service, ServiceError, Supervisor, check_port

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def services(tmp_path: Path) -> Supervisor:
    return Supervisor(tmp_path, tmp_path / "logs")


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def http_server(port: int, folder: Path) -> list[str]:
    return [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]


def test_start_waits_until_the_service_is_healthy_and_says_so(
    services: Supervisor, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "REMINDER_SECONDS", 0.0)
    caplog.set_level("INFO", "tlq.services")
    port = free_port()
    try:
        late = ["sh", "-c", f"sleep 1.5; exec {shlex.join(http_server(port, tmp_path))}"]
        services.start(Service("web", late, {}, f"http://127.0.0.1:{port}/"))
        assert supervisor.is_healthy(f"http://127.0.0.1:{port}/")
        assert not supervisor.is_healthy(f"http://127.0.0.1:{port}/missing")
        first, *middle, last = [record.message for record in caplog.records]
        assert first == f"waiting for web at http://127.0.0.1:{port}/ (up to 180 s)"
        assert all(line.startswith("still waiting for web, ") for line in middle)
        assert middle
        assert re.fullmatch(r"web is there after \d+ s", last)
    finally:
        services.stop()
    assert not supervisor.is_healthy(f"http://127.0.0.1:{port}/")


def test_watch_reports_a_service_that_ends_with_its_last_lines(services: Supervisor) -> None:
    services.start(Service("lasting", SLEEP))
    services.start(Service("prefect", [sys.executable, "-c", "print('no such column'); raise SystemExit(3)"]))
    try:
        with pytest.raises(ServiceError, match=r"prefect ended with status 3:\nno such column\n\(the whole log"):
            services.watch()
    finally:
        services.stop()


def test_watch_restarts_a_service_except_one_that_fails_to_start(
    services: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that ended after ``LEAST_SECONDS`` is restarted; after its second start it ends at once, an error."""
    monkeypatch.setattr(supervisor, "LEAST_SECONDS", 1.0)
    code = "import pathlib, time; mark = pathlib.Path('started'); first = not mark.exists(); mark.touch(); "
    code += "time.sleep(2 if first else 0); raise SystemExit(7)"
    services.start(Service("worker", [sys.executable, "-c", code], restarts=True))
    first = services.running["worker"].pid
    with pytest.raises(ServiceError, match="worker ended with status 7"):
        services.watch()
    assert services.running["worker"].pid != first


def test_start_reports_a_service_that_ends_before_it_is_healthy(services: Supervisor) -> None:
    with pytest.raises(ServiceError, match="mlflow ended with status 1"):
        services.start(
            Service("mlflow", [sys.executable, "-c", "raise SystemExit(1)"], {}, f"http://127.0.0.1:{free_port()}/")
        )
    services.stop()


def test_start_reports_a_service_that_does_not_become_healthy(
    services: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "START_SECONDS", 0.5)
    with pytest.raises(ServiceError, match=r"mlflow does not answer at http://127\.0\.0\.1:\d+/ after 0 s"):
        services.start(Service("mlflow", SLEEP, {}, f"http://127.0.0.1:{free_port()}/"))
    services.stop()


def test_stop_ends_the_children_of_a_service(services: Supervisor) -> None:
    nested = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait())"
    )
    services.start(Service("nested", [sys.executable, "-c", nested]))
    top = psutil.Process(services.running["nested"].pid)
    wait_until(top.children)
    children = top.children()
    services.stop()
    assert not any(psutil.pid_exists(each.pid) and each.status() != psutil.STATUS_ZOMBIE for each in children)
    assert not services.running


def test_a_service_gets_its_environment_and_folder(services: Supervisor, tmp_path: Path) -> None:
    code = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], os.getcwd(), flush=True); time.sleep(60)"
    services.start(Service("gpu-1", [sys.executable, "-c", code], {"CUDA_VISIBLE_DEVICES": "3"}))
    log = tmp_path / "logs" / "gpu-1.log"
    wait_until(lambda: log.read_text().strip())
    services.stop()
    assert log.read_text().split() == ["3", str(tmp_path)]


def test_check_port_names_a_port_in_use_and_its_variable() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"port {port} for MLflow is not free .*in use.*TLQ_MLFLOW_PORT"):
            check_port(port, "MLflow", "TLQ_MLFLOW_PORT")
    check_port(free_port(), "MLflow", "TLQ_MLFLOW_PORT")
