"""SIGKILL at any moment of a stage, again and again: the same command continues to the bits of the undisturbed stage.

    python -m support.kill_series FILE.csv

writes a row for each stage, number of ranks and placement of the kills. Every job starts from a project in which the
earlier stages have run, is killed one to three times, and then run to its end.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import psutil
import torch

from support.forked import Forked
from support.forked_stages import VARIANT, attempt, tiny_project
from tasks.files import VariantName
from tlq import job

NAME = str(VariantName(*VARIANT))
Placement = Literal["time", "phase"]

#: Seconds after which a process whose launcher was killed counts as an orphan.
ORPHAN_SECONDS = 15
_RUN_SECONDS = 180


@dataclass(frozen=True)
class Work:
    """Something to kill.

    Attributes:
        name: stage, or the export, which is the end of `calibrate` after all layers are finished.
        stage: the stage that does it.
        made: its result.
        journal: pattern of its finished parts.
        phases: files that appear when a phase begins.
    """

    name: str
    stage: str
    made: str
    journal: str
    phases: tuple[str, ...]


_SCORES, _LAYERS, _CHECKPOINT = "data/.importance-answer.work", f"models/.{NAME}.work", f"models/.{NAME}.tmp"
EXPORT = Work(
    "export",
    "calibrate",
    f"models/{NAME}",
    f"{_LAYERS}/part-*.json",
    (f"{_CHECKPOINT}/layer-00000.safetensors", f"{_CHECKPOINT}/config.json", f"models/{NAME}"),
)
WORKS = (
    Work(
        "importance",
        "importance",
        "data/importance",
        f"{_SCORES}/part-*.json",
        (f"{_SCORES}/part-00000.json", f"{_SCORES}/part-00001.json"),
    ),
    Work(
        "calibrate",
        "calibrate",
        f"models/{NAME}",
        f"{_LAYERS}/part-*.json",
        (f"{_LAYERS}/part-00000.json", f"{_LAYERS}/part-00001.json"),
    ),
    Work(
        "evaluate",
        "evaluate",
        "evaluation/full",
        "evaluation/.working/full/answers.jsonl",
        ("evaluation/.working/full/answers.jsonl", "evaluation/.full.tmp", "evaluation/full"),
    ),
    EXPORT,
)


@dataclass
class Series:
    """What came of the kills of one work.

    Attributes:
        launcher, one_rank, all_processes: kills by what they hit; a stage without ranks is one process.
        jobs: jobs that were killed and then ran to their end.
        same_bits: jobs whose result has the digests of the undisturbed one.
        lost: kills after which a finished part, or the result, was gone.
        leftovers: temporary files that a finished job left.
        orphans: processes that lived ``ORPHAN_SECONDS`` after their launcher.
        longest: most seconds that a process lived after its launcher.
    """

    work: str
    ranks: int
    placement: str
    launcher: int = 0
    one_rank: int = 0
    all_processes: int = 0
    jobs: int = 0
    same_bits: int = 0
    lost: int = 0
    leftovers: int = 0
    orphans: int = 0
    longest: float = 0.0

    @property
    def kills(self) -> int:
        return self.launcher + self.one_rank + self.all_processes

    @property
    def faultless(self) -> bool:
        """Whether every job had the same bits, and nothing was lost or left."""
        return self.same_bits == self.jobs and not (self.lost or self.leftovers or self.orphans)


class Victims:
    """Jobs of one work on 1 or more ranks, all with one expected result, that are killed."""

    def __init__(self, work: Work, ranks: int, whole: Path, folder: Path) -> None:
        """Run the work undisturbed, on one rank.

        Args:
            whole: a project in which the earlier stages have run; it is copied.
            folder: an empty folder to work in.
        """
        self.work, self.ranks, self.folder = work, ranks, folder / "killed"
        self._start = folder / "start"
        shutil.copytree(whole, self._start)
        shutil.rmtree(self._start / work.made, ignore_errors=True)
        if work.name == "export":
            _run(Forked(_layers_only, self._start), self._start)
            shutil.rmtree(self._start / _CHECKPOINT)
        self._renew()
        _run(self._process(1), self.folder)
        self._expected = digests(self.folder / work.made)
        if ranks > 1:
            self._renew()
        self._seconds = _run(self._process(ranks), self.folder)

    def series(self, placement: Placement, kills: int) -> Series:
        """Kill jobs until ``kills`` have hit a process."""
        chance = random.Random(f"{self.work.name} {self.ranks} {placement}")
        found = Series(self.work.name, self.ranks, placement)
        while found.kills < kills:
            self._renew()
            earlier = found.kills
            for _ in range(min(chance.randint(1, 3), kills - earlier)):
                self._disturb(found, chance)
            if found.kills == earlier:
                continue  # every kill came too late
            _run(self._process(self.ranks), self.folder)
            found.jobs += 1
            found.same_bits += digests(self.folder / self.work.made) == self._expected
            made = self.folder / self.work.made
            found.leftovers += sum(each.name.endswith((".tmp", ".old", ".work")) for each in made.parent.iterdir())
        return found

    def _renew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._start, self.folder)

    def _process(self, ranks: int) -> Forked:
        return Forked(_on_ranks, ranks, self.work.stage, self.folder)

    def _disturb(self, found: Series, chance: random.Random) -> None:
        """Start the job and kill it once; a job that was faster than the kill has ended well."""
        before = self._finished()
        process = self._process(self.ranks)
        process.start()
        self._wait(process, found.placement, chance)
        ranks = _children(process.pid)
        victim = chance.choice(("launcher", "rank", "all")) if ranks else "all"
        if process.is_alive():
            if victim == "rank":
                chance.choice(ranks).kill()
                found.one_rank += 1
                process.join(_RUN_SECONDS)
            else:
                process.kill()
                for each in ranks if victim == "all" else ():
                    each.kill()
                found.launcher += victim == "launcher"
                found.all_processes += victim == "all"
        process.join(_RUN_SECONDS)
        killed = time.monotonic()
        while (alive := [each for each in (*ranks, *_working_in(self.folder)) if _lives(each)]) and (
            time.monotonic() - killed < ORPHAN_SECONDS
        ):
            time.sleep(0.05)
        found.longest = max(found.longest, time.monotonic() - killed if ranks else 0.0)
        found.orphans += len(set(alive))
        for each in alive:
            each.kill()
        found.lost += self._finished() < before

    def _wait(self, process: Forked, placement: str, chance: random.Random) -> None:
        """Wait for a random moment of the job, or until a random one of its next phases has just begun."""
        pending = [phase for phase in self.work.phases if not (self.folder / phase).exists()]
        if placement == "time" or not pending:
            process.join(chance.uniform(0, self._seconds))
            return
        phase = self.folder / chance.choice(pending)
        while not phase.exists() and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))

    def _finished(self) -> float:
        """Number of finished parts, or lines of the journal; without end if the result is in its place."""
        if (self.folder / self.work.made).exists():
            return float("inf")
        parts = list(self.folder.glob(self.work.journal))
        return sum(part.read_bytes().count(b"\n") if part.suffix == ".jsonl" else 1 for part in parts)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file with tensors or tables in ``folder``; the others hold times."""
    files = (
        file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix in (".safetensors", ".parquet")
    )
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _run(process: Forked, folder: Path) -> float:
    """Run a stage to its end; the seconds.

    Raises:
        RuntimeError: it did not end with status 0.
    """
    started = time.monotonic()
    process.start()
    process.join(_RUN_SECONDS)
    if process.exitcode != 0:
        raise RuntimeError(f"exit status {process.exitcode}: {(folder / 'log.txt').read_text()[-3000:]}")
    return time.monotonic() - started


def _on_ranks(ranks: int, stage: str, folder: Path) -> None:
    os.environ["TLQ_RANKS"] = str(ranks)
    attempt(stage, folder)


def _layers_only(folder: Path) -> None:
    """Calibrate all layers, and end where the export begins."""
    job.finish_checkpoint = lambda *_: os._exit(0)
    attempt("calibrate", folder)


def _children(pid: int | None) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _working_in(folder: Path) -> Iterator[psutil.Process]:
    """Processes whose working directory is ``folder``."""
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder):
                yield process
        except psutil.Error:
            continue


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


#: Kills of each placement, by ranks: two ranks take seconds to import.
KILLS = {1: 10, 2: 4}


def plan() -> list[tuple[Work, int]]:
    """Every work with the numbers of ranks that it is killed on; `evaluate` has no ranks."""
    return [(work, ranks) for work in WORKS for ranks in KILLS if ranks == 1 or work.stage != "evaluate"]


def main(file: str) -> None:
    torch.set_num_threads(1)
    rows = []
    with tiny_project() as folder:
        for work, ranks in plan():
            place = folder / f"{work.name}-{ranks}"
            place.mkdir()
            victims = Victims(work, ranks, folder / "whole", place)
            for placement in ("time", "phase"):
                started = time.monotonic()
                series = victims.series(placement, KILLS[ranks])
                rows.append(asdict(series) | {"kills": series.kills, "seconds": round(time.monotonic() - started)})
                sys.stderr.write(f"{rows[-1]}\n")
            shutil.rmtree(place)
    pd.DataFrame(rows).to_csv(file, index=False)


if __name__ == "__main__":
    main(sys.argv[1])
