"""The addresses on which processes listen."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

import psutil


def listeners(processes: Iterable[psutil.Process]) -> set[str]:
    """IP addresses on which any of the processes listens; processes that have ended are left out."""
    heard: set[str] = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            heard |= {link.laddr.ip for link in process.net_connections() if link.status == psutil.CONN_LISTEN}
    return heard
