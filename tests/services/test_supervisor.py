"""Services start in order, are watched, and leave nothing behind."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import psutil
import pytest
from tiny_project import free_port

from services import supervisor
from services.supervisor import Service, ServiceError, Supervisor, check_port

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def services(tmp_path: Path) -> Supervisor:
    return Supervisor(tmp_path, tmp_path / "logs")


def http_server(port: int, folder: Path) -> list[str]:
    return [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]


def test_starting_waits_until_the_service_answers(services: Supervisor, tmp_path: Path) -> None:
    port = free_port()
    try:
        services.start(Service("web", http_server(port, tmp_path), {}, f"http://127.0.0.1:{port}/"))
        assert supervisor.is_healthy(f"http://127.0.0.1:{port}/")
        assert not supervisor.is_healthy(f"http://127.0.0.1:{port}/missing")
    finally:
        services.stop()
    assert not supervisor.is_healthy(f"http://127.0.0.1:{port}/")


def test_a_service_that_ends_is_named_with_its_last_words(services: Supervisor) -> None:
    services.start(Service("lasting", SLEEP))
    services.start(Service("prefect", [sys.executable, "-c", "print('no such column'); raise SystemExit(3)"]))
    try:
        with pytest.raises(ServiceError, match=r"prefect ended by itself with status 3:\nno such column\n\(all of it"):
            services.watch()
    finally:
        services.stop()


def test_a_service_that_may_is_started_again(services: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not one that ends at once each time: that is nothing another start would mend."""
    monkeypatch.setattr(supervisor, "LEAST_SECONDS", 1.0)
    code = "import pathlib, time; mark = pathlib.Path('started'); first = not mark.exists(); mark.touch(); "
    code += "time.sleep(2 if first else 0); raise SystemExit(7)"
    services.start(Service("worker", [sys.executable, "-c", code], restarts=True))
    first = services.running["worker"].pid
    with pytest.raises(ServiceError, match="worker ended by itself with status 7"):
        services.watch()
    assert services.running["worker"].pid != first


def test_one_that_ends_before_it_is_healthy_is_not_waited_for(services: Supervisor) -> None:
    with pytest.raises(ServiceError, match="mlflow ended by itself with status 1"):
        services.start(
            Service("mlflow", [sys.executable, "-c", "raise SystemExit(1)"], {}, f"http://127.0.0.1:{free_port()}/")
        )
    services.stop()


def test_one_that_never_answers_is_given_up(services: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_SECONDS", 0.5)
    with pytest.raises(ServiceError, match=r"mlflow does not answer at http://127\.0\.0\.1:\d+/ after 0 s"):
        services.start(Service("mlflow", SLEEP, {}, f"http://127.0.0.1:{free_port()}/"))
    services.stop()


def test_stopping_ends_children_of_children_too(services: Supervisor) -> None:
    nested = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait())"
    )
    services.start(Service("nested", [sys.executable, "-c", nested]))
    top = psutil.Process(services.running["nested"].pid)
    while not (children := top.children()):
        pass
    services.stop()
    assert not any(psutil.pid_exists(each.pid) and each.status() != psutil.STATUS_ZOMBIE for each in children)
    assert not services.running


def test_environment_of_a_service_is_added_to_ours(services: Supervisor, tmp_path: Path) -> None:
    code = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], os.getcwd(), flush=True); time.sleep(60)"
    services.start(Service("gpu-1", [sys.executable, "-c", code], {"CUDA_VISIBLE_DEVICES": "3"}))
    log = tmp_path / "logs" / "gpu-1.log"
    while not log.read_text().strip():
        pass
    services.stop()
    assert log.read_text().split() == ["3", str(tmp_path)]


def test_a_port_in_use_is_named_with_the_way_out() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"port {port} for MLflow .*in use.*TLQ_MLFLOW_PORT"):
            check_port(port, "MLflow", "TLQ_MLFLOW_PORT")
    check_port(free_port(), "MLflow", "TLQ_MLFLOW_PORT")
