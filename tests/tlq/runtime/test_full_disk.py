"""An error of a full disk names the path and the next step, and nothing half written stays."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from safetensors import SafetensorError
from support.disks import full_disk

from tlq.runtime.files import is_full, new_directory, new_file


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("no"), False),
    ],
)
def test_a_full_disk_is_recognized_in_the_words_of_every_library(error: Exception, full: bool) -> None:
    assert is_full(error) is full
    wrapped = RuntimeError("failed")
    wrapped.__cause__ = error
    assert is_full(wrapped) is full


@pytest.mark.parametrize("new", [new_file, new_directory])
def test_a_full_disk_is_told_with_path_and_next_step_and_nothing_is_left(
    tmp_path: Path, new: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    place = tmp_path / "made"
    told = r"made: cannot be written .*; free some space and run the same command again$"
    with pytest.raises(OSError, match=told), new(place):
        full_disk()
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_as_they_were(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="^no$"), new_file(tmp_path / "made"):
        raise PermissionError("no")
