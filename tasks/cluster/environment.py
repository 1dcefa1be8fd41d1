"""Environment variables that ranks and workers read."""

from __future__ import annotations

from tasks.config.environment import positive, value


def restarts_allowed() -> int:
    """``TLQ_RESTARTS``: how often ranks, or worker runs, may be lost before a stage gives up."""
    return positive("TLQ_RESTARTS", 20)


def own_address() -> str:
    """``TLQ_HOST``: the address under which other machines reach this one."""
    return value("TLQ_HOST", "127.0.0.1")
