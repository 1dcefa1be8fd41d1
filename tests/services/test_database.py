"""PostgreSQL for both servers: addresses, errors, and a real server where Debian's package is installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from support.servers import client
from support.tiny_project import free_port, make_project, serving

from services.database import create_schemas, mlflow_environment, postgres, prefect_environment
from services.supervisor import ServiceError

URL = "postgresql://tlq:se%2Fcret@db.local:5433/models?sslmode=require"


def test_each_server_gets_the_address_for_its_driver() -> None:
    url = postgres(URL)
    prefect = prefect_environment(url)["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    mlflow = mlflow_environment(url, Path("/project"))["MLFLOW_BACKEND_STORE_URI"]
    assert prefect == "postgresql+asyncpg://tlq:se%2Fcret@db.local:5433/models?ssl=require"
    assert mlflow.startswith("postgresql+psycopg2://tlq:se%2Fcret@db.local:5433/models?")
    assert sqlalchemy.make_url(mlflow).query == {"sslmode": "require", "options": "-csearch_path=mlflow"}


def test_both_servers_use_files_without_an_address() -> None:
    assert prefect_environment(None) == {}
    assert mlflow_environment(None, Path("/project")) == {"MLFLOW_BACKEND_STORE_URI": "sqlite:////project/mlflow.db"}


@pytest.mark.parametrize("address", ["mysql://u:secret@h/d", "postgresql://u:secret@h", "no address"])
def test_other_addresses_are_refused_without_showing_the_password(address: str) -> None:
    with pytest.raises(ServiceError, match="postgresql://user:password@host/database") as caught:
        postgres(address)
    assert "secret" not in str(caught.value)


def test_a_database_that_does_not_answer_is_named() -> None:
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install '.[postgres]'")
    with pytest.raises(ServiceError, match=r"TLQ_DATABASE_URL: postgresql://127.0.0.1:\d+/d cannot be used"):
        create_schemas(postgres(f"postgresql://u:secret@127.0.0.1:{free_port()}/d"))


def binaries() -> Path | None:
    """Folder of `initdb` and `pg_ctl`."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def as_server_user(*command: str) -> None:
    """Run a command as user `postgres` if this process is root, because PostgreSQL refuses to run as root."""
    prefix = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    done = subprocess.run([*prefix, *command], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    """Address of an empty database on a PostgreSQL server that this test starts."""
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install '.[postgres]'")
    programs = binaries()
    if programs is None:
        pytest.skip("no PostgreSQL server: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="tlq-postgres-"))
    if os.getuid() == 0:
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("running as root, and PostgreSQL has no user `postgres` to run as")
        os.chown(folder, user.pw_uid, user.pw_gid)
    port, data = free_port(), str(folder / "data")
    as_server_user(str(programs / "initdb"), "-D", data, "-U", "tlq", "-A", "trust", "--no-sync", "-E", "UTF8")
    options = f"-p {port} -h 127.0.0.1 -k {folder} -F"
    as_server_user(str(programs / "pg_ctl"), "-D", data, "-w", "-o", options, "-l", str(folder / "log"), "start")
    try:
        yield f"postgresql://tlq@127.0.0.1:{port}/postgres"
    finally:
        as_server_user(str(programs / "pg_ctl"), "-D", data, "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder)


def tables(url: str, schema: str) -> set[str]:
    engine = sqlalchemy.create_engine(url)
    try:
        return set(sqlalchemy.inspect(engine).get_table_names(schema))
    finally:
        engine.dispose()


@pytest.mark.soak
def test_both_servers_keep_their_data_in_postgresql(postgres_url: str, tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    with serving(folder, {"TLQ_DATABASE_URL": postgres_url}) as services:
        deployments = client(services.prefect).post("/api/deployments/filter", json={})
        assert {each["name"] for each in deployments.json()} == {"quantize", "evaluate", "sweep"}
        models = "/api/2.0/mlflow/registered-models/create"
        client(services.mlflow).post(models, json={"name": "demo-w3a16"})
        processes = services.descendants()
        assert services.stop() == 0
        assert not [each for each in processes if each.is_running()]
    assert {"deployment", "flow_run", "alembic_version"} <= tables(postgres_url, "prefect")
    assert {"registered_models", "alembic_version"} <= tables(postgres_url, "mlflow")
    assert tables(postgres_url, "public") == set()
    engine = sqlalchemy.create_engine(postgres_url)
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("select name from mlflow.registered_models")).all() == [
            ("demo-w3a16",)
        ]
        assert connection.execute(sqlalchemy.text("select count(*) from prefect.deployment")).scalar() == 3
    engine.dispose()
    assert not (folder / "mlflow.db").exists()
    assert not (folder / ".prefect" / "prefect.db").exists()
