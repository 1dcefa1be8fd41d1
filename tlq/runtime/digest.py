"""What identifies a checkpoint, and data in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing torch takes longer than all that those do who only want a checkpoint's digest
    from torch import Tensor


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files, but its model card, which tells the scores."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.name != "README.md"):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.name} {content}\n".encode())
    return total.hexdigest()


def add_tensor(total: Any, name: str, tensor: Tensor) -> None:
    """Let a running SHA-256 take in a tensor in host memory: its name, shape, dtype and contents."""
    total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
    total.update(tensor.contiguous().numpy().tobytes())
