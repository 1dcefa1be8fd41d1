"""A disk without space."""

from __future__ import annotations

import errno


def full_disk(*_: object, **__: object) -> None:
    """What any function that writes does on a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")
