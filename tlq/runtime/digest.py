"""SHA-256 digests that identify a checkpoint, and calibration data in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # callers that need only a checkpoint's digest must not wait for the import of torch
    from torch import Tensor

_SAMPLED_BLOCKS = 16
_BLOCK_BYTES = 1 << 16


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files except its model card, which states the scores."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.name != "README.md"):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.name} {content}\n".encode())
    return total.hexdigest()


def sampled_checkpoint_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's config, and of the size and evenly spaced blocks of each of its weight files.

    Reading all of a large checkpoint would take longer than running its layers; DVC hashes it in full.
    """
    total = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        total.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for block in range(_SAMPLED_BLOCKS):
                stream.seek(block * max(0, size - _BLOCK_BYTES) // max(1, _SAMPLED_BLOCKS - 1))
                total.update(stream.read(_BLOCK_BYTES))
    return total.hexdigest()


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
    total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
    total.update(tensor.contiguous().numpy().tobytes())
