"""bench.gpu without a GPU: it says so at once, its steps work on a small problem, and its page has all figures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bench import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "bench.gpu: this machine has no CUDA device; run it on one that has"


def test_the_steps_measure_and_the_page_shows_them() -> None:
    rounding = gpu.rounding(torch.device("cpu"), {"down": (64, 256)})
    assert rounding["linears"]["down"]["same"]
    assert rounding["copy"] > 0
    importance = {"seconds": {"kept": 1.0, "layer by layer": 1.5}, "tokens": 100, "layers": 2, "same": True}
    tests = {"status": 0, "outcome": "31 passed in 20.00s", "failed": [], "seconds": 21.0}
    results = {"card": "a card", "torch": "2.11", "tests": tests, "rounding": rounding, "importance": importance}
    page = "\n".join(gpu.report(results))
    assert "Measured on a card with torch 2.11." in page
    assert "31 passed in 20.00s" in page
    assert "| down |" in page
    assert "1.00 s with the graph kept, 1.50 s layer by layer (1.50 times); the same bits" in page
