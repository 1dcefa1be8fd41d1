"""The connection to MLflow: its database is created whole, and errors of it are one line."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import mlflow
import pytest
from sqlalchemy.exc import OperationalError

from tasks.registry.connection import connect


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")
    return tmp_path


def test_a_disk_that_is_full_while_tables_are_made_leaves_no_database(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow cannot go on with some of its tables, so the same command would never work again."""

    class Full:
        def __init__(self, uri: str) -> None:
            self.path = uri.removeprefix("sqlite:///")

        def search_experiments(self, max_results: int) -> None:
            with sqlite3.connect(self.path) as database:
                database.execute("create table experiments (name text)")
            raise OperationalError("create table", {}, Exception("database or disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(mlflow, "MlflowClient", Full)
        with pytest.raises(OSError, match="mlflow.db: the disk is full; free some space and run the same command"):
            connect()
    assert [path.name for path in folder.iterdir()] == ["mlflow.db.lock"]
    assert [each.name for each in connect().search_experiments()] == ["Default"]
    assert sorted(path.name for path in folder.iterdir()) == ["mlflow.db", "mlflow.db.lock"]
