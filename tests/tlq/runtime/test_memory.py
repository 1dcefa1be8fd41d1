"""The peak memory that a process reports."""

from __future__ import annotations

import json
import subprocess
import sys

MIB = 2**20

#: Reports its peak before, during and after it holds 256 MiB, and the peak of a process that it starts then.
GROWN = """
import json, subprocess, sys
from tlq.runtime.memory import peak_resident

before = peak_resident()
block = bytearray(256 * 2**20)
during = peak_resident()
child = "from tlq.runtime.memory import peak_resident; print(peak_resident())"
child = int(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout)
del block
print(json.dumps({"before": before, "during": during, "child": child, "after": peak_resident()}))
"""


def test_peak_resident_counts_this_process_and_not_the_one_that_started_it() -> None:
    output = subprocess.run([sys.executable, "-c", GROWN], capture_output=True, text=True, check=True).stdout
    peaks = json.loads(output)
    assert peaks["during"] > peaks["before"] + 192 * MIB
    assert peaks["after"] > peaks["during"] - 16 * MIB  # Linux counts pages in batches
    assert MIB < peaks["child"] < peaks["during"] - 128 * MIB
