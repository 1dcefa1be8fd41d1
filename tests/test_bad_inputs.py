"""Every bad input of support/bad_inputs.py is refused in one line that names it, within seconds.

A run takes every eighth case, `make soak` the others; `make hardening` writes a table of all to docs/hardening.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.bad_inputs import Case, cases
from support.forked_stages import complete
from support.outcomes import outcome

EVERY = 8


def selected() -> list[Any]:
    return [
        pytest.param(case, id=case.title, marks=[] if number % EVERY == 0 else [pytest.mark.soak])
        for number, case in enumerate(cases())
    ]


@pytest.fixture(scope="module")
def whole(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete(project, tmp_path_factory.mktemp("whole") / "project")


@pytest.mark.parametrize("case", selected())
def test_bad_input_ends_in_one_line_that_names_it(case: Case, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    shutil.copytree(whole, folder)
    found = outcome(case, folder)
    shutil.rmtree(folder, ignore_errors=True)
    assert found.word in (("accepted", "listed") if case.mentions is None else ("clear error",)), found.line
