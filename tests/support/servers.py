"""Servers that tests start as separate processes."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from pathlib import Path


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
