"""Servers that tests start as separate processes, and requests to them."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from pathlib import Path

from prefect.client.base import PrefectHttpxSyncClient

#: Longer than the 60 s for which Prefect's server waits for a lock of SQLite before it answers 503.
_ANSWER_SECONDS = 90.0


def client(address: str) -> PrefectHttpxSyncClient:
    """A client that behaves as Prefect's own: it repeats a request on which a busy server is silent or answers 503.

    Every other failure, of the connection or by status, is an error.
    """
    return PrefectHttpxSyncClient(base_url=address, timeout=_ANSWER_SECONDS, trust_env=False)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 300) -> None:
    """Wait until ``url`` answers; fails the test with the end of the log if the server ends or takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"no server within {seconds} s:\n{log.read_text()[-3000:]}")
