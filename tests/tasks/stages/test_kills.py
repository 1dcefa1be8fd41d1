"""SIGKILL at any moment of a stage: the same command continues, and its result is the undisturbed one's, bit by bit."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.forked import Forked
from support.forked_stages import VARIANT, attempt, complete

from tasks.files import VariantName

VARIANT_FOLDER = f"models/{VariantName(*VARIANT)}"

#: Stage -> what it makes, and a file that appears when its last phase begins.
STAGES = {
    "importance": ("data/importance", "data/.importance.work/part-00001.json"),
    "calibrate": (VARIANT_FOLDER, f"models/.{VariantName(*VARIANT)}.work/part-00001.json"),
    "evaluate": ("evaluation/full", "evaluation/.working/full/answers.jsonl"),
}
KILLS = 20


@pytest.fixture(scope="module")
def whole(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return complete(project, tmp_path_factory.mktemp("whole") / "project")


def digests(folder: Path) -> dict[str, str]:
    files = (
        file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix in (".safetensors", ".parquet")
    )
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run_whole(stage: str, folder: Path) -> float:
    """Run a stage to its end; the seconds."""
    started = time.monotonic()
    process = Forked(attempt, stage, folder)
    process.start()
    process.join(120)
    assert process.exitcode == 0, (folder / "log.txt").read_text()[-3000:]
    return time.monotonic() - started


def by_time(chance: random.Random, seconds: float, _phase: Path) -> None:
    time.sleep(chance.uniform(0, seconds))


def by_phase(chance: random.Random, seconds: float, phase: Path) -> None:
    """A moment after the last phase has begun: while the result is put in its place."""
    until = time.monotonic() + seconds
    while not phase.exists() and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(chance.uniform(0, seconds / 4))


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("moment", [by_time, by_phase])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_again_and_again_gives_the_same_bits(
    whole: Path, tmp_path: Path, stage: str, moment: Callable[[random.Random, float, Path], None]
) -> None:
    chance = random.Random(f"{stage} {moment.__name__}")
    made, phase = STAGES[stage]
    calm = tmp_path / "calm"
    shutil.copytree(whole, calm)
    shutil.rmtree(calm / made, ignore_errors=True)
    seconds = run_whole(stage, calm)
    expected = digests(calm / made)
    assert expected
    folder = tmp_path / "killed"
    kills = 0
    while kills < KILLS:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / made, ignore_errors=True)
        for _ in range(chance.randint(1, 4)):  # several kills of one and the same job
            process = Forked(attempt, stage, folder)
            process.start()
            moment(chance, seconds, folder / phase)
            killed = process.is_alive()
            process.kill()
            process.join()
            assert killed or process.exitcode == 0, (folder / "log.txt").read_text()[-3000:]
            kills += killed
        run_whole(stage, folder)
        assert digests(folder / made) == expected
        left = [path.name for path in (folder / made).parent.iterdir() if path.name.endswith((".tmp", ".old", ".work"))]
        assert left == []
