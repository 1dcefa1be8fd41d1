"""Atomic writes: temporary file, then rename."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

#: Linux's numbers for renameat2: paths are relative to the working directory; exchange two names.
_HERE, _EXCHANGE = -100, 2


#: What to do about a full disk; every stage continues where it was.
FREE_SOME = "free some space and run the same command again"
_FULL = ("No space left on device", "Disk quota exceeded", "disk is full")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is that a disk is full. Libraries say so in text of their own."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(text in str(error) for text in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Name ``path`` and the next step where the disk is full, or safetensors cannot write."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        if FREE_SOME not in str(error) and (isinstance(error, SafetensorError) or is_full(error)):
            raise OSError(f"{path}: cannot be written ({error}); {FREE_SOME}") from error
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes ``path`` when the block ends well and vanishes otherwise.

    Raises:
        OSError: the file cannot be written, by safetensors either (a full disk, for instance).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with _explained(path):
            yield temporary
            temporary.chmod(0o644)  # safetensors makes files that only their owner can read
            _reach_disk(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _reach_disk(path: Path) -> None:
    """A power failure after this must not leave a renamed, empty file."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def check_new_folder(folder: Path) -> None:
    """Raise FileExistsError or NotADirectoryError unless ``folder`` is empty, or can be made."""
    if any(each.exists() and not each.is_dir() for each in (folder, *folder.parents)):
        raise NotADirectoryError(f"{folder}: a file is in its place; choose another folder")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: not empty; remove it or choose another folder")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """An empty temporary directory; it replaces ``path`` when the block ends well and vanishes otherwise.

    The two directories change places in one step, where the system has such a step (Linux): whatever ends the process,
    ``path`` is the old directory or the new one, whole. Elsewhere the old one is renamed first and removed last.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    if replaced.exists() and not path.exists():  # killed between the two renames
        replaced.replace(path)
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with _explained(path):
            temporary.mkdir()
            yield temporary
        if not (path.exists() and _exchange(temporary, path)):
            if path.exists():
                path.replace(replaced)
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places in one step; False if this system or its file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))


def link_or_copy(path: Path, target: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK):
            raise
        with new_file(target) as temporary:
            shutil.copyfile(path, temporary)


def write_text(text: str, path: Path) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text)
