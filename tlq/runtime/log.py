"""The level of the log."""

from __future__ import annotations

import os

VARIABLE = "TLQ_LOG"
_LEVELS = ("debug", "info", "warning", "error", "critical")


def log_level() -> str:
    """The level that ``TLQ_LOG`` names, in logging's spelling; by default INFO.

    Raises:
        ValueError: it names no level.
    """
    stated = os.environ.get(VARIABLE) or "info"
    if stated.lower() not in _LEVELS:
        raise ValueError(f"{VARIABLE} is {stated!r}, must be one of {', '.join(_LEVELS)}")
    return stated.upper()
