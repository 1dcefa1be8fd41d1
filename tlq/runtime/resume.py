"""State that long work keeps on disk, so that the same command continues after any interruption.

A folder next to the result holds a fingerprint of everything the result depends on, and every finished part. A part
consists of two files: first its tensors, then a report with their SHA-256, which marks the part as complete. A part
that does not match its report is computed again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tlq.runtime.digest import file_digest
from tlq.runtime.files import write_text

logger = logging.getLogger("tlq")


class ResumeState:
    """The finished parts of one calibration, or of one scoring of tokens."""

    def __init__(self, result: Path) -> None:
        """The folder of the state is a hidden sibling of ``result``, the path that the work will write."""
        self.folder = result.with_name(f".{result.name}.work")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process from doing the same work.

        Raises:
            BlockingIOError: another process holds the lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise BlockingIOError(
                f"{self.folder}: another process works here; wait for it, or stop it and run the command again"
            ) from error
        try:
            yield
        finally:
            lock.release()

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Start, or continue work that was begun with the same fingerprint.

        Raises:
            ValueError: it was begun with another fingerprint; the message names the differences.
        """
        path = self.folder / "fingerprint.json"
        current = json.loads(json.dumps(fingerprint))
        if not path.exists():
            write_text(json.dumps(current, indent=1) + "\n", path)
            return
        differences = list(_differences(json.loads(path.read_text()), current))
        if differences:
            raise ValueError(
                f"{self.folder} was begun with {'; '.join(differences)}; set it back to continue, or remove the folder "
                "to start again"
            )

    def part(self, index: int) -> Path:
        """The file of the tensors of layer or micro-batch ``index``."""
        return self.folder / f"part-{index:05}.safetensors"

    def finish(self, index: int, report: dict[str, Any] | None = None) -> None:
        """Mark a part as complete, after its tensors are written."""
        content = {"sha256": file_digest(self.part(index)), "report": report or {}}
        write_text(json.dumps(content) + "\n", self.part(index).with_suffix(".json"))

    def report(self, index: int) -> dict[str, Any] | None:
        """The report of a finished part; None, with a warning, if the part is damaged, and None if it is not there."""
        part = self.part(index)
        if not part.exists() or not part.with_suffix(".json").exists():
            return None
        try:
            content = json.loads(part.with_suffix(".json").read_text())
            intact = content["sha256"] == file_digest(part)
        except (ValueError, KeyError, TypeError):  # the report itself is damaged
            intact = False
        if not intact:
            logger.warning("%s is damaged; it is computed again", part)
            return None
        return dict(content["report"])

    def reports(self) -> list[dict[str, Any]]:
        """Reports of the finished layers, from the first layer to the last one before a gap."""
        reports: list[dict[str, Any]] = []
        while (report := self.report(len(reports))) is not None:
            reports.append(report)
        return reports

    def size(self) -> int:
        """Bytes of the finished parts."""
        return sum(file.stat().st_size for file in self.folder.glob("part-*")) if self.folder.exists() else 0

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def package_versions() -> dict[str, str]:
    """Installed versions of the packages whose release may change the bits of a result."""
    return {name: version(name) for name in ("torch", "transformers", "tlq")}


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted({*begun, *now}):
        old, new = begun.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} {old!r}, now {new!r}"
