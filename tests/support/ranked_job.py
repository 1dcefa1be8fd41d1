"""A small calibration in a separate process, for tests that run it on ranks, kill it and check the rest."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch

from support.exporting import read_tensors
from support.tiny import random_samples, write_tiny_qwen2_vl
from tasks.files import write_samples

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import os
import sys
import time
from pathlib import Path
import tasks
import torch
import tlq.quantization.rounding
from tasks.command import run
from tasks.files import read_samples
from tasks.cluster.launch import meeting_place, on_ranks
from tasks.cluster.rank import RankCommand
from tlq.calibration.job import CalibrationJob
from tlq.job import quantize_checkpoint
from tlq.models.batches import calibration_batches
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.parallel import joined_ranks
from tlq.recipes import get_recipe
from tlq.importance.gradients import score_resumably
from tlq.importance.losses import AnswerLoss
from tlq.runtime.resume import ResumeState
from tlq.models.streaming import StreamedModel
from tlq.importance.weighting import Weighting
from tlq.importance.pool import TokenPool
from tlq.importance.token_set import TokenBudget
from tlq.importance.token_weights import to_batches, token_set

folder, recipe, scheme = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
tlq.quantization.rounding._LEAST_ROWS = 32  # so that weights as small as these are rounded in several parts

def work():
    torch.set_num_threads(1)
    samples = read_samples(folder / "samples.parquet")
    model = StreamedModel(folder / "model")
    with joined_ranks(torch.device("cpu"), meeting_place()) as ranks:
        quantizer = WeightQuantizer(get_scheme(scheme), model.checkpoint_dtype)
        batches = calibration_batches(model, samples, 2, 512)
        def weigh():
            scores = score_resumably(model, batches, AnswerLoss(), ResumeState(folder / "scores"), ranks)
            pool = TokenPool.of(batches)
            return to_batches(token_set(scores, pool, "token", Weighting(), TokenBudget(300), 0), batches)
        job = CalibrationJob(get_recipe(recipe), quantizer, batches, ranks=ranks)
        pause = float(os.environ.get("TEST_SECONDS_PER_LAYER", "0"))
        quantize_checkpoint(model, folder / "out", job, weigh, on_layer=lambda report: time.sleep(pause))

run(lambda: on_ranks(RankCommand("ranks_worker", tuple(sys.argv[1:])), work))
"""


def write_job(folder: Path) -> Path:
    """A model of four layers and 24 samples, which make 12 micro-batches, and the module that calibrates it."""
    write_tiny_qwen2_vl(folder / "model", layers=4)
    write_samples(random_samples(24), folder / "samples.parquet")
    (folder / "ranks_worker.py").write_text(WORKER)
    return folder


def start(job: Path, name: str, recipe: str, scheme: str, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start the job in a separate folder, as a process with additional ``environment``."""
    folder = job / name
    folder.mkdir(exist_ok=True)
    for part in ("model", "samples.parquet"):
        if not (folder / part).exists():
            (folder / part).symlink_to(job / part)
    return subprocess.Popen(
        [sys.executable, "-m", "ranks_worker", str(folder), recipe, scheme],
        env={**job_environment(job), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def job_environment(job: Path) -> dict[str, str]:
    """Environment for one thread per rank on the CPU, without the variables that change where the job runs."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TLQ_", "PREFECT_"))}
    return {
        **kept,
        "TLQ_RESTARTS": "100",
        "TLQ_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{job}{os.pathsep}{ROOT}",
    }


def finish(process: subprocess.Popen[str], folder: Path) -> dict[str, torch.Tensor]:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-3000:]
    return read_tensors(folder / "out")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes of the job in ``folder``, the stage's own first, then its ranks."""
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        line = process.info["cmdline"] or []
        if "ranks_worker" in line and str(folder) in line:
            found.append(process)
    return sorted(found, key=lambda process: process.info["create_time"])


def wait_until_gone(folder: Path) -> None:
    """Assert that no process of the job outlives the process that started it."""
    for _ in range(400):
        if not processes_of(folder):
            return
        time.sleep(0.1)
    raise AssertionError(f"orphans: {processes_of(folder)}")
