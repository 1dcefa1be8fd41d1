"""Environment variables that ranks and workers read."""

from __future__ import annotations

import psutil

from tasks.config.environment import positive, value


def restarts_allowed() -> int:
    """``TLQ_RESTARTS``: how often ranks, or worker runs, may be lost before a stage gives up."""
    return positive("TLQ_RESTARTS", 20)


def own_address() -> str:
    """``TLQ_HOST``: the address under which other machines reach this one."""
    return value("TLQ_HOST", "127.0.0.1")


def network_interface(address: str) -> str | None:
    """Name of this machine's network interface with an address; None if no interface has it."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == address for each in addresses):
            return name
    return None
