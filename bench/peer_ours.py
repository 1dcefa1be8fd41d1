"""Quantize a checkpoint with one of our recipes, on samples written by bench.peers.

Uses the same function as a user of ``tlq.api``. Writes the checkpoint and measured.json: total wall seconds, the
seconds spent on layers (sum and by phase), and peak MiB of the GPU's memory, or of resident memory without a GPU.
"""

from __future__ import annotations

import argparse
import json
import pickle
import time
from collections import Counter
from pathlib import Path

import torch

from tlq.api import quantize
from tlq.importance.token_set import TokenBudget
from tlq.runtime.memory import peak_resident


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True, help="pickled list of samples")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--scheme", required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    samples = pickle.loads(arguments.samples.read_bytes())
    started = time.perf_counter()
    result = quantize(
        arguments.model,
        arguments.out,
        samples,
        arguments.recipe,
        arguments.scheme,
        budget=TokenBudget(4096),
        batch_size=arguments.batch_size,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    seconds = time.perf_counter() - started
    phases: Counter[str] = Counter()
    for report in result.layers:
        phases.update(report["phases"])
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else peak_resident()
    measured = {"seconds": seconds, "layers": phases.total(), **phases, "peak_mib": peak / 2**20}
    (arguments.out / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
