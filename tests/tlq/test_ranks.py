"""The same bits for any number of ranks and after any history of crashes; state on disk that says no to a mismatch."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from exporting import read_tensors
from hypothesis import given
from hypothesis import strategies as st
from tiny import random_samples, write_tiny_qwen2_vl

from tasks.files import write_samples
from tlq.ranks import SHARDS, Ranks, shard_ranges

ROOT = Path(__file__).resolve().parent.parent.parent
WORKER = """
import sys
from pathlib import Path
import torch
from tasks.cli import run
from tasks.files import read_samples
from tasks.launch import on_ranks
from tlq.api import quantize_checkpoint
from tlq.quantizer import get_scheme
from tlq.ranks import joined_ranks
from tlq.recipes import get_recipe
from tlq.scoring import AnswerLoss, score_resumably
from tlq.state import WorkFolder
from tlq.streaming import StreamedModel
from tlq.importance import Weighting
from tlq.samples import encode_batches, image_token_id
from tlq.processor import load_processor
from tlq.tokens import TokenBudget
from tlq.weights import token_set

folder, recipe, scheme = Path(sys.argv[1]), sys.argv[2], sys.argv[3]

def work():
    torch.set_num_threads(1)
    samples = read_samples(folder / "samples.parquet")
    model = StreamedModel(folder / "model")
    with joined_ranks(torch.device("cpu")) as ranks:
        def weigh(model, batches):
            scores = score_resumably(model, batches, len(samples), AnswerLoss(), WorkFolder(folder / "scores"), ranks)
            marks = {s: b.is_image[r, b.valid[r]].numpy() for b in batches for r, s in enumerate(b.samples)}
            is_image = [marks[s] for s in range(len(samples))]
            return token_set(scores, is_image, "token", Weighting(), TokenBudget(300), 0)
        quantize_checkpoint(
            model, folder / "out", samples, get_recipe(recipe), get_scheme(scheme), weigh, 2, 512, ranks
        )

run(lambda: on_ranks("ranks_worker", sys.argv[1:], work))
"""


@given(batches=st.integers(0, 300), size=st.integers(1, 20))
def test_every_micro_batch_belongs_to_one_shard_and_every_shard_to_one_rank(batches: int, size: int) -> None:
    shards = shard_ranges(batches)
    assert [number for shard in shards for number in shard] == list(range(batches))
    assert len(shards) == min(SHARDS, batches)
    assert max(map(len, shards), default=0) - min(map(len, shards), default=0) <= 1
    owned = [shard for rank in range(size) for shard in Ranks(rank, size).own_shards(len(shards))]
    assert owned == list(range(len(shards)))
    dealt = sorted(piece for rank in range(size) for piece in Ranks(rank, size).dealt(batches))
    assert dealt == list(range(batches))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four layers and 24 samples, which make 12 micro-batches."""
    folder = tmp_path_factory.mktemp("job")
    write_tiny_qwen2_vl(folder / "model", layers=4)
    write_samples(random_samples(24), folder / "samples.parquet")
    (folder / "ranks_worker.py").write_text(WORKER)
    return folder


def start(job: Path, name: str, ranks: int, recipe: str, scheme: str) -> subprocess.Popen[str]:
    """The job in a folder of its own, as a process."""
    folder = job / name
    folder.mkdir(exist_ok=True)
    for part in ("model", "samples.parquet"):
        if not (folder / part).exists():
            (folder / part).symlink_to(job / part)
    environment = {
        **os.environ,
        "TLQ_RANKS": str(ranks),
        "TLQ_RESTARTS": "100",
        "TLQ_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{job}{os.pathsep}{ROOT}",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "ranks_worker", str(folder), recipe, scheme],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], folder: Path) -> dict[str, torch.Tensor]:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return read_tensors(folder / "out")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("recipe", "scheme", "counts"), [("tlq-c", "w3a16", (2, 3)), ("tlq", "w4a8", (3,)), ("mbq", "w3a16", (3,))]
)
def test_any_number_of_ranks_gives_the_same_bits(job: Path, recipe: str, scheme: str, counts: tuple[int, ...]) -> None:
    """Second moments, token by token, and through the parent module: every way that errors are added up."""
    runs = {ranks: start(job, f"{recipe}-{scheme}-{ranks}", ranks, recipe, scheme) for ranks in (1, *counts)}
    results = {ranks: finish(process, job / f"{recipe}-{scheme}-{ranks}") for ranks, process in runs.items()}
    assert len(results[1]) > 50
    for ranks in counts:
        assert_equal(results[ranks], results[1])
    report = json.loads((job / f"{recipe}-{scheme}-3" / "out/calibration.json").read_text())
    assert {layer["ranks"] for layer in report["layers"]} == {3}


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes of the job in ``folder``, the stage's own first, then its ranks."""
    found = []
    for process in psutil.process_iter(["cmdline", "create_time"]):
        line = process.info["cmdline"] or []
        if "ranks_worker" in line and str(folder) in line:
            found.append(process)
    return sorted(found, key=lambda process: process.info["create_time"])


def test_random_kills_change_no_bit(job: Path) -> None:
    """SIGKILL hits ranks and the process that started them, at random moments of a run whose size changes.

    Three times here; ``TLQ_TEST_KILLS=20`` for the long version.
    """
    expected = finish(start(job, "undisturbed", 1, "tlq-c", "w3a16"), job / "undisturbed")
    chance = random.Random(7)
    folder = job / "disturbed"
    kills = {"rank": 0, "stage": 0}
    wanted = int(os.environ.get("TLQ_TEST_KILLS", "3"))
    process = start(job, "disturbed", 2, "tlq-c", "w3a16")
    while sum(kills.values()) < wanted and process.poll() is None:
        time.sleep(chance.uniform(2, 9))
        running = processes_of(folder)
        if not running:
            break
        victim = chance.randrange(len(running))
        kind = "stage" if running[victim].pid == process.pid else "rank"
        running[victim].send_signal(signal.SIGKILL)
        kills[kind] += 1
        if kind == "stage":
            process.communicate()
            wait_until_gone(folder)
            process = start(job, "disturbed", chance.choice([1, 2, 3]), "tlq-c", "w3a16")
    assert_equal(finish(process, folder), expected)
    assert sum(kills.values()) == wanted, kills
    wait_until_gone(folder)
    assert not [entry for entry in folder.iterdir() if entry.name.endswith(".work") and "out" in entry.name]


def wait_until_gone(folder: Path) -> None:
    """No process of the job may outlive the one that started it."""
    for _ in range(100):
        if not processes_of(folder):
            return
        time.sleep(0.1)
    raise AssertionError(f"orphans: {processes_of(folder)}")


def test_an_error_that_trying_again_cannot_cure_is_told_once(job: Path) -> None:
    process = start(job, "refused", 2, "tlq", "w9")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output.count("unknown scheme 'w9'; choose one of") == 1
    assert "Traceback" not in output


def test_state_of_other_choices_is_refused_by_name(job: Path) -> None:
    folder = job / "changed"
    process = start(job, "changed", 1, "tlq", "w3a16")
    while not list(folder.glob(".out.work/part-*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    again = start(job, "changed", 1, "tlq-c", "w3a16")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 1
    assert ".out.work was begun with recipe.name 'tlq', now 'tlq-c'; recipe.rounding 'nearest', now 'comp" in output
    assert_equal(
        finish(start(job, "changed", 1, "tlq", "w3a16"), folder),
        finish(start(job, "unchanged", 1, "tlq", "w3a16"), job / "unchanged"),
    )
