"""`make serve` with a login: one variable closes the Prefect server to every client without it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import httpx
import psutil
import pytest
from support.tiny_project import free_port

from services.deployments import POOL, create_pool, server
from services.processes import ROOT, tree
from services.servers import Machine
from services.supervisor import Supervisor

LOGIN = ("admin", "a-long-password")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The Prefect server of `make serve`, started with the variable that docs/operate.md names."""
    folder = tmp_path_factory.mktemp("login")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_URI", "TLQ_DATABASE_URL"):
            patch.setenv(name, "to be restored")
            patch.delenv(name)
        patch.setenv("PREFECT_HOME", str(folder))
        patch.setenv("PREFECT_SERVER_API_AUTH_STRING", ":".join(LOGIN))
        started = Machine(free_port(), free_port(), Supervisor(ROOT, folder / "logs"))
        try:
            started.start_servers(with_mlflow=False)
            yield started
        finally:
            started.stop()


def status(auth: tuple[str, str] | None) -> int:
    """The status with which the server answers a request for the flow runs."""
    address = f"{os.environ['PREFECT_API_URL']}/flow_runs/filter"
    return httpx.post(address, json={}, auth=auth, timeout=60, trust_env=False).status_code


@pytest.mark.parametrize("auth", [None, ("admin", "guessed"), ("admin", ""), ("", "a-long-password")])
def test_a_client_without_the_login_is_refused(machine: Machine, auth: tuple[str, str] | None) -> None:
    assert status(auth) == 401


def test_a_client_with_the_login_is_served(machine: Machine) -> None:
    assert status(LOGIN) == 200


def test_the_services_own_client_and_those_that_they_start_have_the_login(machine: Machine) -> None:
    with server() as client:
        create_pool(client)
        assert client.read_work_pool(POOL).name == POOL
    assert os.environ["PREFECT_API_AUTH_STRING"] == ":".join(LOGIN)  # inherited by the worker and the flow runs


def test_the_password_is_in_no_command_line_and_in_no_log(machine: Machine) -> None:
    (process,) = machine.supervisor.running.values()
    words = [word for each in tree(process.pid) for word in psutil.Process(each.pid).cmdline()]
    assert words
    assert not any(LOGIN[1] in word for word in words)
    assert LOGIN[1] not in machine.supervisor.log("prefect").read_text()
    assert LOGIN[1] not in machine.summary()
