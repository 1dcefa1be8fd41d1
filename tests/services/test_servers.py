"""Which services are started, and with what."""

from __future__ import annotations

import os

import pytest

from services import servers as services
from services.servers import Machine, gpu_workers
from services.supervisor import HOST, Service, ServiceError, Supervisor


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Service]:
    """Services in the order in which they would be started; nothing is."""
    found: list[Service] = []
    monkeypatch.setattr(Supervisor, "start", lambda self, service: found.append(service))
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "TLQ_DATABASE_URL"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    return found


def test_servers_listen_on_the_loopback_interface_and_are_named_to_the_worker(started: list[Service]) -> None:
    Machine(41001, 41002)._start_servers(with_mlflow=True)
    assert [service.name for service in started] == ["prefect", "mlflow"]
    for service, port in zip(started, ("41001", "41002"), strict=True):
        assert service.command[service.command.index("--host") + 1] == HOST == "127.0.0.1"
        assert service.command[service.command.index("--port") + 1] == port
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:41001/api"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:41002"


def test_servers_that_the_environment_names_are_used(started: list[Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://head:4200/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://head:5000")
    monkeypatch.setenv("TLQ_DATABASE_URL", "no address; nobody looks at it")
    Machine(41001, 41002)._start_servers(with_mlflow=True)
    assert started == []


def test_the_password_of_the_database_is_on_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    url = services.database.postgres("postgresql://tlq:secret@localhost/tlq")
    for service in (services.prefect_server(1, url), services.mlflow_server(2, url)):
        assert not any("secret" in word for word in service.command)
        assert any("secret" in value for value in service.environment.values())


def test_each_gpu_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "visible_gpus", lambda: ["2", "5"])
    workers = list(gpu_workers(2))
    assert [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["2", "5"]
    assert len({worker.name for worker in workers}) == 2
    for worker in workers:
        assert worker.command[worker.command.index("--limit") + 1] == "1"
    with pytest.raises(ServiceError, match="3 workers for 2 GPUs"):
        list(gpu_workers(3))


def test_without_gpus_workers_compute_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "visible_gpus", list)
    assert [dict(worker.environment) for worker in gpu_workers(3)] == [{}, {}, {}]
