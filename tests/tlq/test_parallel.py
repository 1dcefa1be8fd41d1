"""A calibration on ranks that are processes of their own: crashes change no bit, signals and errors end in one line."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import ranked_job
from support.exporting import read_tensors
from support.forked_ranks import RESULT, quantize
from support.ranked_job import assert_equal, finish, processes_of, wait_until_gone, write_job

from tasks.files import read_samples
from tlq.models.batches import calibration_batches
from tlq.models.streaming import StreamedModel
from tlq.parallel import REDUCTION_CHUNKS, Ranks, chunk_ranges
from tlq.quantization import rounding


@given(batches=st.integers(0, 300), size=st.integers(1, 20))
def test_every_micro_batch_belongs_to_one_chunk_and_every_chunk_to_one_rank(batches: int, size: int) -> None:
    chunks = chunk_ranges(batches)
    assert [number for chunk in chunks for number in chunk] == list(range(batches))
    assert len(chunks) == min(REDUCTION_CHUNKS, batches)
    assert max(map(len, chunks), default=0) - min(map(len, chunks), default=0) <= 1
    owned = [chunk for rank in range(size) for chunk in Ranks(rank, size).own_chunks(len(chunks))]
    assert owned == list(range(len(chunks)))
    dealt = sorted(piece for rank in range(size) for piece in Ranks(rank, size).assigned(batches))
    assert dealt == list(range(batches))


@given(chunks=st.integers(0, 5), rows=st.lists(st.integers(1, 3), max_size=3))
def test_a_table_has_the_rows_of_all_parts_in_order(chunks: int, rows: list[int]) -> None:
    parts = [torch.arange(count * chunks).double().view(count, chunks) + 100 * count for count in rows]
    assert Ranks().table(parts, chunks).tolist() == [row for part in parts for row in part.tolist()]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def undisturbed(job: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Result of this process alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    batches = calibration_batches(StreamedModel(job / "model"), read_samples(job / "samples.parquet"), 2, 512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "_LEAST_ROWS", 32)
        quantize(folder, job / "model", batches, "tlq-c", "w3a16")
    return read_tensors(folder / RESULT)


def start(job: Path, name: str, ranks: int, recipe: str, scheme: str) -> subprocess.Popen[str]:
    return ranked_job.start(job, name, recipe, scheme, {"TLQ_RANKS": str(ranks)})


def test_random_kills_change_no_bit(job: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    """SIGKILL hits ranks and the process that started them, at random moments of a run whose size changes.

    Twice here; ``TLQ_TEST_KILLS=20`` kills twenty times.
    """
    chance = random.Random(7)
    folder = job / "disturbed"
    kills = {"rank": 0, "stage": 0}
    wanted = int(os.environ.get("TLQ_TEST_KILLS", "2"))
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
    assert_equal(finish(process, folder), undisturbed)
    assert sum(kills.values()) == wanted, kills
    wait_until_gone(folder)
    assert not [entry for entry in folder.iterdir() if entry.name.endswith(".work") and "out" in entry.name]


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", [0, 3], ids=["layers", "export"])
def test_kills_of_all_ranks_at_one_phase_change_no_bit(
    job: Path, undisturbed: dict[str, torch.Tensor], part: int
) -> None:
    """Two or three ranks and the process that started them lose power at once: after the first layer, or the last."""
    chance, kills = random.Random(part), 0
    folder = job / f"phase-{part}"
    while kills < 10:
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(chance.randint(1, 3)):
            process = start(job, folder.name, chance.choice([2, 3]), "tlq-c", "w3a16")
            until = time.monotonic() + 120
            while not list(folder.glob(f".out*/part-{part:05d}.json")) and process.poll() is None:
                assert time.monotonic() < until, sorted(folder.rglob("*"))
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.1))  # the export of so small a model takes little more
            for each in processes_of(folder):
                each.send_signal(signal.SIGKILL)
                kills += each.pid == process.pid
            process.communicate()
            wait_until_gone(folder)
        assert_equal(finish(start(job, folder.name, 2, "tlq-c", "w3a16"), folder), undisturbed)
        assert not [entry for entry in folder.iterdir() if entry.name.startswith(".out")]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_stage_and_its_ranks_with_one_line(job: Path, number: int, status: int) -> None:
    folder = job / f"signal-{status}"
    process = start(job, folder.name, 2, "tlq-c", "w3a16")
    while len(processes_of(folder)) < 3:  # the ranks still import
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output
    lines = [line for line in output.splitlines() if line]
    assert lines == ["ERROR tlq: interrupted; run the same command again to continue"]
    wait_until_gone(folder)


def test_ranks_whose_launcher_dies_while_they_import_end_at_once(job: Path) -> None:
    folder = job / "abandoned"
    process = start(job, "abandoned", 2, "tlq-c", "w3a16")
    while len(processes_of(folder)) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()
    killed = time.monotonic()
    wait_until_gone(folder)
    assert time.monotonic() - killed < 5


def test_an_error_that_a_retry_cannot_cure_is_reported_once(job: Path) -> None:
    process = start(job, "refused", 2, "tlq", "w9")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert output.count("unknown scheme 'w9'; choose one of") == 1
    assert "Traceback" not in output
