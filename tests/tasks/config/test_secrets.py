"""No password of an address reaches a message, a link, a command or a run's tag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import make_url

from flows.next_steps import mlflow_command
from services import database
from services.supervisor import ServiceError
from tasks.config.environment import redacted, without_secrets
from tasks.registry.connection import connect
from tasks.registry.runs import new_run

SECRET = "s3cr%40t"
ADDRESSES = [
    f"postgresql://tlq:{SECRET}@db.example:5432/tlq",
    f"https://user:{SECRET}@mlflow.example/path",
    f"postgresql://db.example/tlq?user=tlq&password={SECRET}",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_shown_without_its_secrets(address: str) -> None:
    assert "s3cr" not in without_secrets(address)
    assert "example" in without_secrets(address)
    for text in (f"cannot open {address}", "password s3cr@t is wrong", f"password {SECRET} is wrong"):
        assert "s3cr" not in redacted(text, address)


@pytest.mark.parametrize("address", ["sqlite:///mlflow.db", "http://127.0.0.1:5000", "", "mlruns"])
def test_an_address_without_secrets_stays_as_it_is(address: str) -> None:
    assert without_secrets(address) == address
    assert redacted("cannot open it", address) == "cannot open it"


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_unreachable_mlflow_is_named_without_its_password(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException(f"cannot connect to {address}, password s3cr@t")

    monkeypatch.setattr("mlflow.MlflowClient", refuse)
    with pytest.raises(ConnectionError, match="MLflow at .*example.* does not answer") as caught:
        connect()
    assert "s3cr" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("address", ADDRESSES)
def test_the_command_that_shows_mlflow_names_the_variable(address: str) -> None:
    assert mlflow_command(address).endswith('--backend-store-uri "$MLFLOW_TRACKING_URI"')


def test_a_database_that_refuses_is_named_without_its_password() -> None:
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install '.[postgres]'")
    with pytest.raises(ServiceError, match="TLQ_DATABASE_URL: .*127.0.0.1.* cannot be used") as caught:
        database.create_schemas(make_url(f"postgresql://tlq:{SECRET}@127.0.0.1:1/tlq?application_name=s3cr"))
    assert "s3cr" not in str(caught.value)
    with pytest.raises(ServiceError) as caught:
        database.postgres(f"mysql://tlq:{SECRET}@127.0.0.1/tlq?password={SECRET}")
    assert "s3cr" not in str(caught.value)


def test_a_runs_tag_names_the_git_remote_without_its_token(
    tmp_path: Path, new_tracking: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_tracking(tmp_path))
    monkeypatch.setattr(
        "mlflow.tracking.context.registry.resolve_tags",
        lambda tags: tags | {"mlflow.source.git.repoURL": "https://user:s3cr@git.example/tlq.git"},
    )
    client = connect()
    tags = client.get_run(new_run(client, "tlq", "made", {})).data.tags
    assert tags["mlflow.source.git.repoURL"] == "https://git.example/tlq.git"
