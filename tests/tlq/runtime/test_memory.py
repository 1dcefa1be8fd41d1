"""The peak of a process is its own."""

from __future__ import annotations

import subprocess
import sys

from tlq.runtime.memory import peak_resident


def test_the_peak_of_a_small_process_is_small_whoever_starts_it() -> None:
    before = peak_resident()
    held = bytearray(before)  # twice what there was
    assert peak_resident() >= len(held)
    code = "from tlq.runtime.memory import peak_resident; print(peak_resident())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 2**20 < int(told) < len(held) / 4
