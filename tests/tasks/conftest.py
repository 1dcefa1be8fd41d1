"""A project whose report stage has run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from report_results import write_results

from tasks.report.__main__ import main
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
