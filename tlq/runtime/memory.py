"""How much memory this process has taken, and giving it back."""

from __future__ import annotations

import ctypes
import re
import resource
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_resident() -> int:
    """Largest resident memory of this process so far, in bytes.

    Linux tells it in /proc. The figure of getrusage, taken elsewhere, is no smaller than what the process that started
    this one had at that moment.
    """
    if _STATUS.exists():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back() -> None:
    """Return to the system what was freed.

    glibc keeps freed blocks of up to 32 MiB for later; what lies scattered among them makes a process grow by some
    MiB with every decoder layer. Nothing happens on a system that has another allocator.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
