"""Memory of this host and process: budgets, the peak so far, and the release of freed blocks."""

from __future__ import annotations

import ctypes
import os
import re
import resource
from pathlib import Path

import psutil
import torch

GIB = 2**30

_STATUS = Path("/proc/self/status")


def host_budget() -> int:
    """Bytes of host memory for the hidden states of this process.

    ``TLQ_HOST_MEMORY`` (GiB per process) if set, else half of the memory that is free now, divided among the processes
    of this host.
    """
    return gib_of("TLQ_HOST_MEMORY", psutil.virtual_memory().available // 2 // processes_here())


def device_memory(device: torch.device) -> int:
    """Free bytes of the compute device; ``TLQ_DEVICE_MEMORY`` (GiB) if less, to plan for a smaller one.

    Raises:
        ValueError: ``TLQ_DEVICE_MEMORY`` is not a number.
    """
    on_gpu = device.type == "cuda"
    free = int(torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available)
    return min(free, gib_of("TLQ_DEVICE_MEMORY", free))


def gib_of(variable: str, default: int) -> int:
    """The value of an environment variable in GiB, converted to bytes; ``default`` (bytes) if it is not set.

    Raises:
        ValueError: the value is no number, or below 0.
    """
    stated = os.environ.get(variable)
    try:
        wanted = default if stated is None else int(float(stated) * GIB)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{variable} is {stated!r}, must be a number of GiB") from error
    if wanted < 0:
        raise ValueError(f"{variable} is {stated}, must be at least 0 GiB")
    return wanted


def processes_here() -> int:
    """Number of ranks that share this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_resident() -> int:
    """Largest resident memory of this process so far, in bytes.

    Linux reports it in /proc. Elsewhere getrusage reports it, but never less than the parent process had when it
    started this process.
    """
    if _STATUS.exists():
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        if peak is not None:
            return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_freed_memory() -> None:
    """Return freed heap memory to the operating system.

    glibc keeps freed blocks of up to 32 MiB for reuse; fragmentation then makes a process grow by some MiB with every
    decoder layer. Does nothing on a system with another allocator.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
