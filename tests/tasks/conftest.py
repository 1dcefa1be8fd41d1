"""A project whose report stage has run, and an MLflow database to copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.registry_results import write_project
from support.report_results import write_results

from tasks.stages.report import main
from tlq.samples import Sample


@pytest.fixture(scope="session")
def reported(
    project: Path, tiny_checkpoint: Path, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy of the tiny project with two variants, scores and the report on them."""
    folder = tmp_path_factory.mktemp("reported") / "project"
    shutil.copytree(project, folder)
    write_results(folder, tiny_checkpoint, samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main()
    return folder


@pytest.fixture(scope="session")
def new_tracking(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """Put an empty MLflow database into a folder; its address. Making one takes seconds, copying it none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()

    def put(folder: Path) -> str:
        return f"sqlite:///{shutil.copyfile(path, folder / 'mlflow.db')}"

    return put


@pytest.fixture
def workspace(tmp_path: Path, new_tracking: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder without variants, in which the test works, and its empty MLflow database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_tracking(tmp_path))
    write_project(tmp_path)
    return tmp_path
