"""What long work leaves on disk while it runs, so that the same command continues after any interruption.

A folder beside the result holds a fingerprint of everything the result depends on, and every finished part. A decoder
layer is two files: its shard, and then a report, whose presence says that the layer is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tlq.importance.token_weights import TokenWeights
from tlq.runtime.digest import add_tensor
from tlq.runtime.files import write_text
from tlq.samples import Batch

_SAMPLED = 16
_BLOCK = 1 << 16


class WorkFolder:
    """The state of one calibration, or of one scoring of tokens."""

    def __init__(self, result: Path) -> None:
        """``result`` is what the work is to make; the folder stands beside it."""
        self.folder = result.with_name(f".{result.name}.work")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second process from doing the same work.

        Raises:
            BlockingIOError: one is doing it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(
                    f"{self.folder}: another process works here; wait for it, or stop it and run the command again"
                ) from error
            yield

    def begin(self, fingerprint: dict[str, Any]) -> None:
        """Start, or continue what was begun with the same fingerprint.

        Raises:
            ValueError: it was begun with another one; the message names what differs.
        """
        path = self.folder / "fingerprint.json"
        wanted = json.loads(json.dumps(fingerprint))
        if not path.exists():
            write_text(json.dumps(wanted, indent=1) + "\n", path)
            return
        differing = list(_differences(json.loads(path.read_text()), wanted))
        if differing:
            raise ValueError(
                f"{self.folder} was begun with {'; '.join(differing)}; set it back to continue, or remove the folder "
                "to start again"
            )

    def part(self, index: int) -> Path:
        """The file of layer or micro-batch ``index``."""
        return self.folder / f"part-{index:05}.safetensors"

    def finish_layer(self, index: int, report: dict[str, Any]) -> None:
        """Mark a layer whose shard is written as complete."""
        write_text(json.dumps(report) + "\n", self.part(index).with_suffix(".json"))

    def reports(self) -> list[dict[str, Any]]:
        """Reports of the finished layers, from the first to the last before a gap."""
        found: list[dict[str, Any]] = []
        while (path := self.part(len(found)).with_suffix(".json")).exists() and self.part(len(found)).exists():
            found.append(json.loads(path.read_text()))
        return found

    def size(self) -> int:
        """Bytes of the parts that are there."""
        return sum(file.stat().st_size for file in self.folder.glob("part-*")) if self.folder.exists() else 0

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def versions() -> dict[str, str]:
    """Of the packages whose release may change a result's bits."""
    return {name: version(name) for name in ("torch", "transformers", "tlq")}


def _differences(begun: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name in sorted({*begun, *now}):
        old, new = begun.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} {old!r}, now {new!r}"


def data_digest(batches: Sequence[Batch], weights: TokenWeights) -> str:
    """SHA-256 of everything calibration reads from the samples: model inputs and token weights."""
    total = hashlib.sha256()
    for batch in batches:
        total.update(f"{batch.digest} ".encode())
    for (layer, group), parts in sorted(weights.items()):
        for tensor in parts:
            add_tensor(total, f"{layer} {group}", tensor)
    return total.hexdigest()


def model_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's config, and of size, head and evenly spaced blocks of each of its weight files.

    Reading all of a large checkpoint would take longer than replaying its layers; DVC hashes it in full.
    """
    total = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        total.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for number in range(_SAMPLED):
                stream.seek(number * max(0, size - _BLOCK) // max(1, _SAMPLED - 1))
                total.update(stream.read(_BLOCK))
    return total.hexdigest()
