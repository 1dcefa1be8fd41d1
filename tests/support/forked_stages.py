"""Stages in forked processes, which start at once, on a tiny project that has what each of them needs."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import pandas as pd
import torch
import yaml
from tqdm import tqdm

from support.benchmark_rows import textvqa_rows, write_rows
from support.tiny import random_samples, write_tiny_qwen2_vl
from tasks.command import run
from tasks.config.params import read, section
from tasks.config.presets import SECTIONS
from tasks.stages import calibrate, calibset, evaluate, importance, prepare, register
from tlq import cli
from tlq.samples import Sample

#: Recipe and scheme of the calibration.
VARIANT = ("tlq-c", "w3a16")

STAGES: dict[str, Callable[[], Any]] = {
    "params": lambda: [section(name, cls) for name, cls in SECTIONS.items() if name in read()],
    "prepare": prepare.main,
    "importance": importance.main,
    "calibset": calibset.main,
    "calibrate": lambda: calibrate.main(*VARIANT),
    "evaluate": lambda: evaluate.main("full"),
    "register": register.main,
}


def first_stages(checkpoint: Path, samples: Sequence[Sample], folder: Path) -> Path:
    """Run `prepare`, `importance` and `calibset` on a tiny model in the empty ``folder``, by their own main()."""
    rows = [
        {
            "id": sample.id,
            "image": sample.images[0],
            "question": sample.messages[0]["content"].removeprefix("<image>"),
            "answer": sample.messages[1]["content"],
        }
        for sample in samples
    ]
    pd.DataFrame(rows).to_parquet(folder / "questions.parquet")
    params = {
        "model": {"path": str(checkpoint)},
        "prepare": {"kind": "parquet", "path": "questions.parquet", "columns": {"id": "id"}, "samples": 6},
        "importance": {"samples": 5, "batch_size": 3},
        "calibset": {"budget": {"tokens_per_layer": 64}},
        "calibrate": {"batch_size": 2},
        "recipes": {name: {"equalization": {"points": 4}} for name in ("mbq", "tlq", "tlq-c")},
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    cache = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    try:
        with chdir(folder):
            for stage in (prepare, importance, calibset):
                stage.main()
    finally:
        datasets.config.HF_DATASETS_CACHE = cache
    return folder


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


@contextmanager
def tiny_project() -> Iterator[Path]:
    """A temporary folder with a project ``whole``, in which the first stages have run on a tiny model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "project").mkdir()
        first = first_stages(write_tiny_qwen2_vl(folder / "tiny"), random_samples(6), folder / "project")
        complete(first, folder / "whole")
        yield folder


def attempt(stage: str, folder: Path) -> None:
    """Run a stage in a project as its command does; what it writes goes to files of the folder."""
    os.chdir(folder)
    log = (folder / "log.txt").open("w", buffering=1)
    os.dup2(log.fileno(), 2)
    os.dup2(log.fileno(), 1)
    sys.stdout = sys.stderr = log
    sys.stdin = io.StringIO("y\n" * 100)  # whoever asks whether to run a stranger's code gets a yes
    for handler in logging.root.handlers[:]:
        logging.root.removeHandler(handler)
    tqdm.set_lock(threading.RLock())  # its own is shared by all forked processes, and one killed in it would stop them
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
