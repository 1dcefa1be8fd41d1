"""What ranks and workers read from the environment."""

from __future__ import annotations

import os


def positive(variable: str, default: int) -> int:
    """The number that an environment variable holds.

    Raises:
        ValueError: it is no positive number.
    """
    stated = os.environ.get(variable, str(default))
    if not stated.isdigit() or int(stated) < 1:
        raise ValueError(f"{variable} is {stated!r}, must be a positive number")
    return int(stated)


def restarts_allowed() -> int:
    """``TLQ_RESTARTS``: how often ranks, or worker runs, may be lost before a stage gives up."""
    return positive("TLQ_RESTARTS", 20)


def own_address() -> str:
    """``TLQ_HOST``: the address under which other machines reach this one."""
    return os.environ.get("TLQ_HOST", "127.0.0.1")
