"""The services that a machine starts, and their environments."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from services import database, servers
from services.servers import Machine, gpu_workers
from services.supervisor import Service, ServiceError, Supervisor

VARIABLES = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "TLQ_DATABASE_URL")


class Recorder(Supervisor):
    """Records the services in the order of their start and starts none."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, folder)
        self.started: list[Service] = []

    def start(self, service: Service) -> None:
        self.started.append(service)


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    for name in VARIABLES:
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    return Recorder(tmp_path)


def test_start_servers_names_its_servers_in_the_environment(recorder: Recorder) -> None:
    Machine(41001, 41002, recorder).start_servers(with_mlflow=True)
    assert {service.name: service.health for service in recorder.started} == {
        "prefect": "http://127.0.0.1:41001/api/health",
        "mlflow": "http://127.0.0.1:41002/health",
    }
    assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:41001/api"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:41002"


def test_start_servers_starts_none_that_the_environment_names(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://head:4200/api")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://head:5000")
    monkeypatch.setenv("TLQ_DATABASE_URL", "no address, and not used")
    Machine(41001, 41002, recorder).start_servers(with_mlflow=True)
    assert recorder.started == []
    assert os.environ["PREFECT_API_URL"] == "http://head:4200/api"


def test_servers_get_the_database_password_in_the_environment_only() -> None:
    """Every user of a machine can read command lines."""
    url = database.postgres("postgresql://tlq:secret@localhost/tlq")
    for service in (servers.prefect_server(1, url), servers.mlflow_server(2, url)):
        assert not any("secret" in word for word in service.command)
        assert any("secret" in value for value in service.environment.values())


def test_gpu_workers_get_one_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "visible_gpus", lambda: ["2", "5"])
    workers = list(gpu_workers(2))
    assert [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in workers] == ["2", "5"]
    assert len({worker.name for worker in workers}) == 2
    assert all("--limit 1 " in " ".join(worker.command) for worker in workers)
    assert all(worker.restarts for worker in workers)
    with pytest.raises(ServiceError, match="3 workers for 2 GPUs"):
        list(gpu_workers(3))


def test_gpu_workers_without_gpus_compute_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "visible_gpus", list)
    assert [dict(worker.environment) for worker in gpu_workers(3)] == [{}, {}, {}]
