"""What comes of a bad input, in a word; as a command, of all of them.

    python -m support.outcomes FILE.csv

writes a row for each input: door, input, outcome, seconds and last line. The code that meets the inputs is the one that
Python finds first, so that an earlier commit can be tried with today's inputs.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import torch

from support.bad_inputs import MARK, Case, cases
from support.forked import Forked
from support.forked_stages import attempt, tiny_project

#: Seconds in which a stage must end; an idle machine takes less than half of it.
SECONDS = 20.0

#: Every outcome, the right ones first: an error in one line that names the input, an input that is taken with a warning
#: that names it, or one that is rightly taken. A poor line is an error in other words or in several lines.
OUTCOMES = ("clear error", "listed", "accepted", "poor line", "silent", "traceback", "hang", "ran code")
RIGHT = OUTCOMES[:3]

#: Bytes of memory that a stage may ask for in addition to what its imports took.
MEMORY = 8 << 30


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
        word: one of ``OUTCOMES``.
        line: the last line of the log, with paths from the folder.
        seconds: time that the stage took.
    """

    word: str
    line: str
    seconds: float


def outcome(case: Case, folder: Path) -> Outcome:
    """Change the project in ``folder`` as ``case`` says, and run its stage there in a process of its own."""
    with _environment():
        case.change(folder)
        process = Forked(_bounded, case.stage, folder)
        started = time.monotonic()
        process.start()
    process.join(2 * SECONDS)
    seconds = time.monotonic() - started
    hangs = process.is_alive()
    if hangs:
        _end(process.pid)
        process.join()
    log = folder / "log.txt"
    lines = [line for line in (log.read_text(errors="replace") if log.exists() else "").splitlines() if line.strip()]
    last = lines[-1].replace(str(folder), ".").replace(str(folder.parent), "..") if lines else ""
    if (folder / MARK).exists():
        word = "ran code"
    elif hangs:
        word = "hang"
    else:
        word = _word(case, process.exitcode, lines, seconds)
    return Outcome(word, last, seconds)


@contextmanager
def _environment() -> Iterator[None]:
    """Undo what a block changes in the environment, after a process that inherits it has started."""
    earlier = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(earlier)


def _bounded(stage: str, folder: Path) -> None:
    import resource

    most = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    attempt(stage, folder)


def _end(pid: int | None) -> None:
    process = psutil.Process(pid)
    for each in (*process.children(recursive=True), process):
        each.kill()


def _word(case: Case, status: int | None, lines: list[str], seconds: float) -> str:
    """The outcome of a stage that ended by itself and ran no stranger's code."""
    if any("Traceback" in line for line in lines) or status not in (0, 1, 2, 75):
        return "traceback"
    warned = [line for line in lines if line.startswith("WARNING tlq")]
    if status == 0:
        if any((case.mentions or "") in line for line in warned):
            return "listed"
        return "accepted" if case.mentions is None else "silent"
    errors = [line for line in lines if line.startswith(("ERROR", "tlq: error", "tlq quantize: error", "error"))]
    names = case.mentions is None or case.mentions in lines[-1]
    return "clear error" if errors == lines[-1:] and names and seconds <= SECONDS else "poor line"


def try_all(folder: Path) -> pd.DataFrame:
    """Try every case in copies of the project ``whole`` of ``folder``."""
    rows = []
    for number, case in enumerate(tried := cases(), start=1):
        copy = folder / "copy"
        shutil.copytree(folder / "whole", copy)
        found = outcome(case, copy)
        shutil.rmtree(copy, ignore_errors=True)
        rows.append((case.door, case.name, found.word, round(found.seconds, 1), found.line[:300]))
        sys.stderr.write(f"{number}/{len(tried)} {case.title}: {found.word}\n")
    return pd.DataFrame(rows, columns=["door", "input", "outcome", "seconds", "last line"])


def main(file: str) -> None:
    torch.set_num_threads(1)
    with tiny_project() as folder:
        try_all(folder).to_csv(file, index=False)


if __name__ == "__main__":
    main(sys.argv[1])
