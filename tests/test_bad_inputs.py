"""Every bad input of support/bad_inputs.py is refused in one line that names it, within ten seconds.

A run takes every eighth case, `make soak` the others. ``TLQ_TEST_TABLE=file.md`` writes a table of what was tried:

    TLQ_TEST_TABLE=table.md python -m pytest -m "soak or not soak" tests/test_bad_inputs.py
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pandas as pd
import pytest
import torch
import yaml
from support.bad_inputs import VARIANT, Case, cases
from support.benchmark_rows import textvqa_rows, write_rows
from support.forked import Forked

from tasks.command import run
from tasks.config.params import read, section
from tasks.config.presets import SECTIONS
from tasks.stages import calibrate, calibset, evaluate, importance, prepare, register
from tlq import cli

SECONDS = 10.0
EVERY = 8

STAGES: dict[str, Callable[[], Any]] = {
    "params": lambda: [section(name, cls) for name, cls in SECTIONS.items() if name in read()],
    "prepare": prepare.main,
    "importance": importance.main,
    "calibset": calibset.main,
    "calibrate": lambda: calibrate.main(*VARIANT),
    "evaluate": lambda: evaluate.main("full"),
    "register": register.main,
}


def selected() -> list[Any]:
    return [
        pytest.param(case, id=case.title, marks=[] if number % EVERY == 0 else [pytest.mark.soak])
        for number, case in enumerate(cases())
    ]


@pytest.fixture(scope="module")
def whole(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny project, with a benchmark and a section for each stage."""
    folder = tmp_path_factory.mktemp("whole") / "project"
    shutil.copytree(project, folder)
    write_rows(folder / "textvqa.parquet", textvqa_rows(4))
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["evaluate"] = {
        "benchmarks": [{"task": "demo_textvqa", "data": "textvqa.parquet"}],
        "limit": 2,
        "max_new_tokens": 2,
        "resamples": 100,
    }
    params["register"] = {"model_name": "tiny"}
    params["variants"] = {"recipes": ["rtn"], "schemes": ["w3a16"]}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


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


def attempt(stage: str, folder: Path) -> None:
    """Run a stage in a project as its command does; what it writes goes to files of the folder."""
    os.chdir(folder)
    log = (folder / "log.txt").open("w", buffering=1)
    os.dup2(log.fileno(), 2)
    os.dup2(log.fileno(), 1)
    sys.stdout = sys.stderr = log
    for handler in logging.root.handlers[:]:
        logging.root.removeHandler(handler)
    os.environ["MLFLOW_TRACKING_URI"] = "sqlite:///mlflow.db"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    torch.set_num_threads(1)
    if stage == "tlq":
        sys.argv = ["tlq", "quantize", *json.loads((folder / "arguments.json").read_text())]
        sys.exit(cli.main())
    else:
        run(STAGES[stage])
    log.flush()


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
    process.join(3 * SECONDS)
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
    return ("slow line" if seconds > 2 * SECONDS else "clear line"), last


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
