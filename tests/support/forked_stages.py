"""Stages in forked processes, which start at once, on a tiny project that has what each of them needs."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
import yaml

from support.benchmark_rows import textvqa_rows, write_rows
from tasks.command import run
from tasks.config.params import read, section
from tasks.config.presets import SECTIONS
from tasks.stages import allocate, calibrate, calibset, evaluate, importance, prepare, register
from tlq import cli

#: Recipe and scheme of the calibration.
VARIANT = ("tlq-c", "w3a16")

STAGES: dict[str, Callable[[], Any]] = {
    "params": lambda: [section(name, cls) for name, cls in SECTIONS.items() if name in read()],
    "prepare": prepare.main,
    "importance": importance.main,
    "calibset": calibset.main,
    "allocate": allocate.main,
    "calibrate": lambda: calibrate.main(*VARIANT),
    "evaluate": lambda: evaluate.main("full"),
    "register": register.main,
}


def complete(project: Path, folder: Path) -> Path:
    """A copy of the tiny project in ``folder``, with a benchmark and a section for each stage."""
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


def attempt(stage: str, folder: Path) -> None:
    """Run a stage in a project as its command does; what it writes goes to files of the folder."""
    os.chdir(folder)
    log = (folder / "log.txt").open("w", buffering=1)
    os.dup2(log.fileno(), 2)
    os.dup2(log.fileno(), 1)
    sys.stdout = sys.stderr = log
    for handler in logging.root.handlers[:]:
        logging.root.removeHandler(handler)
    os.environ.setdefault("TLQ_DEVICE", "cpu")  # a case may have set another
    os.environ["MLFLOW_TRACKING_URI"] = "sqlite:///mlflow.db"
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    torch.set_num_threads(1)
    if stage == "tlq":
        sys.argv = ["tlq", "quantize", *json.loads((folder / "arguments.json").read_text())]
        sys.exit(cli.main())
    else:
        run(STAGES[stage])
    log.flush()
