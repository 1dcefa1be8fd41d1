"""Every bad input of support/bad_inputs.py is refused in one line that names it, within seconds.

A run takes every eighth case, `make soak` the others. ``TLQ_TEST_TABLE=file.md`` writes a table of what was tried:

    TLQ_TEST_TABLE=table.md python -m pytest -m "soak or not soak" tests/test_bad_inputs.py
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.bad_inputs import Case, cases
from support.forked import Forked
from support.forked_stages import attempt, complete

#: An idle machine takes less than half of it.
SECONDS = 20.0
EVERY = 8


def selected() -> list[Any]:
    return [
        pytest.param(case, id=case.title, marks=[] if number % EVERY == 0 else [pytest.mark.soak])
        for number, case in enumerate(cases())
    ]


@pytest.fixture(scope="module")
def whole(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete(project, tmp_path_factory.mktemp("whole") / "project")


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, str, str, str]]]:
    """Rows of the table: door, input, outcome, line."""
    rows: list[tuple[str, str, str, str]] = []
    yield rows
    if place := os.environ.get("TLQ_TEST_TABLE"):
        frame = pd.DataFrame(rows, columns=["door", "input", "outcome", "last line"])
        count = frame.groupby("door", sort=False)["outcome"].value_counts().unstack(fill_value=0)
        text = [
            f"{len(frame)} inputs.",
            "",
            "| door | " + " | ".join(count.columns) + " |",
            "|---" * (len(count.columns) + 1) + "|",
        ]
        text += [
            f"| {door} | " + " | ".join(str(value) for value in row) + " |"
            for door, row in zip(count.index, count.to_numpy(), strict=True)
        ]
        text += ["", "| door | input | outcome | last line |", "|---|---|---|---|"]
        text += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        Path(place).write_text("\n".join(text) + "\n")


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """What came of a case, in a word, and the last line of its log."""
    earlier = dict(os.environ)
    case.change(folder)
    process = Forked(attempt, case.stage, folder)
    try:
        started = time.monotonic()
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(earlier)
    process.join(2 * SECONDS)
    seconds = time.monotonic() - started
    if process.is_alive():
        process.kill()
        process.join()
        return "hang", ""
    text = (folder / "log.txt").read_text(errors="replace")
    lines = [line for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if "Traceback" in text or process.exitcode not in (0, 1, 2, 75):
        return "traceback", last
    if process.exitcode == 0:
        return "taken", last
    errors = [line for line in lines if line.startswith(("ERROR", "tlq: error", "tlq quantize: error", "error"))]
    if len(errors) != 1 or errors[0] != last:
        return "poor line", last
    if case.mentions is not None and case.mentions not in last:
        return "nameless line", last
    return ("slow line" if seconds > SECONDS else "clear line"), last


@pytest.mark.parametrize("case", selected())
def test_bad_input_ends_in_one_line_that_names_it(
    case: Case, whole: Path, tmp_path: Path, table: list[tuple[str, str, str, str]]
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(whole, folder)
    found, line = outcome(case, folder)
    shutil.rmtree(folder, ignore_errors=True)
    table.append((case.door, case.name, found, line.replace(str(folder), ".")[:300]))
    assert found == ("taken" if case.mentions is None else "clear line"), line
