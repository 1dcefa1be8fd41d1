"""SHA-256 digests that identify a checkpoint, and calibration data in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlq.runtime.files import write_text

if TYPE_CHECKING:  # callers that need only a checkpoint's digest must not wait for the import of torch
    from torch import Tensor


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files except its model card, which states the scores."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.name != "README.md"):
        total.update(f"{file.name} {file_digest(file)}\n".encode())
    return total.hexdigest()


def kept_digests(files: Iterable[Path], kept: Path, check: Callable[[Path], None] | None = None) -> dict[str, str]:
    """SHA-256 of files by name, read from ``kept`` where a file's size, time and inode are still the same.

    ``kept`` is written again with what was read; if it cannot be, the files are read again the next time.

    Args:
        check: called for every file that it has not been called for; ``kept`` says which passed.
    """
    known = _known_digests(kept)
    now: dict[str, dict[str, Any]] = {}
    try:
        for file in files:
            now[file.name] = _digest_of(file, known)
            if check is not None and not now[file.name].get("checked"):
                check(file)
                now[file.name] = {**now[file.name], "checked": True}
    finally:  # a file that a check refuses costs no second reading of the others
        if known | now != known:
            with suppress(OSError):
                write_text(json.dumps(known | now, indent=1) + "\n", kept)
    return {name: entry["sha256"] for name, entry in now.items()}


def _known_digests(file: Path) -> dict[str, dict[str, Any]]:
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _digest_of(file: Path, known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Size, time and inode of a file with its SHA-256, which is taken from ``known`` if they are the same."""
    status = file.stat()
    entry: dict[str, Any] = {"size": status.st_size, "time": status.st_mtime_ns, "inode": status.st_ino}
    old = known.get(file.name)
    if isinstance(old, dict) and "sha256" in old and entry.items() <= old.items():
        return old
    return {**entry, "sha256": file_digest(file)}


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def calibration_data_digest(batch_digests: Iterable[str], weights: Mapping[tuple[int, str], Sequence[Tensor]]) -> str:
    """SHA-256 of everything that calibration reads from the samples: model inputs and token weights.

    Args:
        batch_digests: ``digest`` of every micro-batch.
        weights: (layer, group name) -> one tensor per micro-batch; empty where they do not exist yet.
    """
    total = hashlib.sha256()
    for batch_digest in batch_digests:
        total.update(f"{batch_digest} ".encode())
    for (layer, group), tensors in sorted(weights.items()):
        for tensor in tensors:
            update_with_tensor(total, f"{layer} {group}", tensor)
    return total.hexdigest()


def update_with_tensor(total: Any, name: str, tensor: Tensor) -> None:
    """Update a running SHA-256 with a tensor in host memory: its name, shape, dtype and contents."""
    import torch  # slow to import, and other digests do without

    total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
    total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
