"""Atomic writes: temporary file, then rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes ``path`` when the block ends well and vanishes otherwise.

    Raises:
        OSError: the file cannot be written, by safetensors either (a full disk, for instance).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        _reach_disk(temporary)
        temporary.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error}); free some space and run the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def _reach_disk(path: Path) -> None:
    """A power failure after this must not leave a renamed, empty file."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """An empty temporary directory; it replaces ``path`` when the block ends well and vanishes otherwise.

    The directory that it replaces is renamed first and removed last: at no time does ``path`` hold a part of either.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    if replaced.exists() and not path.exists():  # killed between the two renames
        replaced.replace(path)
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.replace(replaced)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def write_text(text: str, path: Path) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text)
