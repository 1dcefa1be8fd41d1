"""What identifies a checkpoint."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a checkpoint's files, but its model card, which tells the scores."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file() and path.name != "README.md"):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.name} {content}\n".encode())
    return total.hexdigest()
