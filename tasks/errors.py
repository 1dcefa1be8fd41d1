"""Which errors of a command are one line and not a traceback, and with which exit status it ends."""

from __future__ import annotations

from pathlib import Path

from tlq.runtime.files import FREE_SOME, is_full

#: Errors of input or environment, reported in one line; any other error is a defect and keeps its traceback.
EXPECTED = (ValueError, OSError, MemoryError, FloatingPointError)

#: Exit status of a command that failed because a server did not answer (EX_TEMPFAIL of sysexits.h).
TRY_AGAIN = 75

_BUSY = (429, 500, 502, 503, 504)  # HTTP statuses of a server that may answer later


def one_line(error: Exception) -> str | None:
    """An expected error in one line; None for a defect."""
    full = is_full(error)
    if not isinstance(error, EXPECTED) and not full:
        return None
    message = " ".join(str(error).split())
    if full and FREE_SOME not in message:  # a library that writes a file of its own
        return f"a disk is full ({message}), that of {Path.cwd()} or of temporary files; {FREE_SOME}"
    return message


def exit_status(error: Exception) -> int:
    """The exit status of a command that ends with an expected error."""
    return TRY_AGAIN if is_transient(error) else 1


def is_transient(error: BaseException | None) -> bool:
    """Whether ``error`` or one of its causes is that a server (the hub, MLflow) did not answer: a retry may succeed."""
    import httpx
    import requests

    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError, httpx.TransportError)):
            return True
        if isinstance(error, (requests.ConnectionError, requests.Timeout)):
            return True
        if getattr(getattr(error, "response", None), "status_code", None) in _BUSY:
            return True
        error = error.__cause__ or error.__context__
    return False
