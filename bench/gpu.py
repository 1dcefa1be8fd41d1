"""Everything that needs a GPU, as one command of at most eight minutes that continues where it was stopped.

    make gpu                     # or: python -m bench.gpu

Steps: the tests marked `gpu`; compensated rounding eager against its kernel, with the kernel's share of the card's
bandwidth; token importance with the graph kept against layer by layer; and, where llm-compressor is installed
(`make peers-env`), bench.peers on layers of a 7B. A finished step is kept in bench/results/gpu.json and not repeated;
`--again` names steps to repeat. Writes docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from bench.models import SHAPES, large_samples, write_random_model
from bench.sections import table, write_section
from tlq.importance.gradients import score_tokens
from tlq.models.processor import load_processor
from tlq.models.streaming import StreamedModel
from tlq.quantization import kernels
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.quantization.objective import Factor
from tlq.quantization.rounding import round_compensated
from tlq.samples import encode_batches, image_token_id

logger = logging.getLogger("bench.gpu")

RESULTS = Path("bench/results/gpu.json")
PAGE = Path("docs/gpu.md")
PEERS = Path(".venv-peers/bin/python")
SHAPE = "qwen2-vl-7b"
#: Linears of the shape: output rows and input channels.
LINEARS = {"qkv": (4608, 3584), "o_proj": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)}
REPEATS = 3
_FLOAT = 4


def tests() -> dict[str, Any]:
    """Outcome of the tests marked `gpu`."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": done.returncode, "outcome": lines[-1], "failed": failed, "seconds": time.perf_counter() - started}


def rounding(device: torch.device, linears: dict[str, tuple[int, int]] = LINEARS) -> dict[str, Any]:
    """Seconds of compensated rounding at W3A16, eager and with the kernel in turn, and whether codes are the same."""
    rows = {name: _round_both_ways(device, *shape) for name, shape in linears.items()}
    return {"linears": rows, "strips": _strip_bandwidth(device), "copy": _copy_bandwidth(device)}


def _round_both_ways(device: torch.device, out: int, width: int) -> dict[str, Any]:
    quantizer = WeightQuantizer(get_scheme("w3a16"), torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(out, width, generator=generator, device=device)
    inputs = torch.randn(2 * width, width, generator=generator, device=device)
    factor = Factor.of(inputs.T @ inputs / len(inputs) + 0.01 * torch.eye(width, device=device))
    assert factor is not None
    eager, kernel = [], []
    for _ in range(REPEATS + 1):  # the first run of each compiles, and is left out
        with patch.object(kernels, "available", lambda _device: False):
            eager.append(_timed(round_compensated, [weight], factor, quantizer))
        kernel.append(_timed(round_compensated, [weight], factor, quantizer))
    return {
        "eager": float(np.median([seconds for seconds, _ in eager[1:]])),
        "kernel": float(np.median([seconds for seconds, _ in kernel[1:]])),
        "same": torch.equal(eager[-1][1][0].codes, kernel[-1][1][0].codes),
    }


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of a call, and what it returns."""
    _synchronize()
    started = time.perf_counter()
    result = work(*arguments)
    _synchronize()
    return time.perf_counter() - started, result


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _copy_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes per second of copying a large tensor: read and written bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = [_timed(target.copy_, source)[0] for _ in range(5)]
    return 2 * size / min(seconds)


def _strip_bandwidth(device: torch.device, rows: int = 2**20, columns: int = 16) -> float:
    """Bytes per second of the kernel alone on a strip; 0 without a kernel."""
    if not kernels.available(device):
        return 0.0
    block, original = (torch.randn(1, columns, rows, device=device) for _ in range(2))
    upper = torch.randn(columns, columns, device=device).triu(1)
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    arguments = (block, original, upper, codes, errors, (-4, 3))
    seconds = [_timed(kernels.round_strip, *arguments)[0] for _ in range(6)]
    return 4 * block.numel() * _FLOAT / min(seconds[1:])  # two tensors are read and two are written


def importance(device: torch.device, layers: int = 2, count: int = 64) -> dict[str, Any]:
    """Seconds of token importance on layers of the 7B, with the graph kept and layer by layer, warm."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_random_model(Path(folder) / "model", replace(SHAPES[SHAPE], layers=layers))
        model = StreamedModel(path, torch.bfloat16, device)
        batches = encode_batches(
            list(large_samples(count)), load_processor(path), image_token_id(model.config), 8, 16384
        )
        kept, layered = [], []
        for _ in range(2):  # the first run of each is left out
            kept.append(_timed(score_tokens, model, batches))
            with patch.dict(os.environ, {"TLQ_DEVICE_MEMORY": "0"}):
                layered.append(_timed(score_tokens, model, batches))
    one, other = kept[-1][1], layered[-1][1]
    return {
        "seconds": {"kept": kept[-1][0], "layer by layer": layered[-1][0]},
        "tokens": int(sum(batch.valid.sum() for batch in batches)),
        "layers": layers,
        "same": all(bool((one[key] == other[key]).all()) for key in one),
    }


def peers() -> dict[str, Any]:
    """bench.peers on layers of the 7B, which writes its own section of docs/peers.md."""
    if not PEERS.exists():
        return {"status": f"not run: {PEERS} is missing (make peers-env)"}
    command = [sys.executable, "-m", "bench.peers", "--models", SHAPE, "--repeats", "1", "--count", "64"]
    done = subprocess.run([*command, "--python", str(PEERS)], capture_output=True, text=True, check=False)
    return {"status": "run, see docs/peers.md" if not done.returncode else f"failed: {done.stderr[-500:]}"}


def report(results: dict[str, Any]) -> list[str]:
    """Markdown lines of all steps that are done."""
    lines = [
        f"Measured on {results['card']} with torch {results['torch']}. `python -m bench.gpu` wrote this page. Ways to "
        "compute the same thing ran in turn; the first run of each is left out.",
        "",
    ]
    if found := results.get("tests"):
        lines += [f"Tests marked `gpu`: {found['outcome']}.", ""]
    if found := results.get("rounding"):
        rows = [
            {
                "linears": name,
                "eager, s": f"{row['eager']:.3f}",
                "kernel, s": f"{row['kernel']:.3f}",
                "ratio": f"{row['eager'] / row['kernel']:.2f}",
                "same codes": "yes" if row["same"] else "NO",
            }
            for name, row in found["linears"].items()
        ]
        lines += [
            f"Compensated rounding at W3A16, linears of {SHAPE}:",
            "",
            *table(rows),
            "",
            f"The kernel alone moves {found['strips'] / 1e9:.0f} GB/s, {found['strips'] / found['copy']:.0%} of what a "
            f"copy reaches on this card ({found['copy'] / 1e9:.0f} GB/s).",
            "",
        ]
    if found := results.get("importance"):
        kept, other = found["seconds"]["kept"], found["seconds"]["layer by layer"]
        lines += [
            f"Token importance, {found['layers']} layers of {SHAPE}, {found['tokens']} tokens: {kept:.2f} s with the "
            f"graph kept, {other:.2f} s layer by layer ({other / kept:.2f} times); "
            f"{'the same bits' if found['same'] else 'DIFFERENT bits'}.",
            "",
        ]
    if found := results.get("peers"):
        lines += [f"Comparison with llm-compressor: {found['status']}.", ""]
    return lines[:-1]


def main() -> None:
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "tests": tests,
        "rounding": lambda: rounding(torch.device("cuda")),
        "importance": lambda: importance(torch.device("cuda")),
        "peers": peers,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", nargs="+", choices=steps, default=[], help="steps to repeat")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: this machine has no CUDA device; run it on one that has")
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    here = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    if {name: results.get(name) for name in here} != here:
        results = here  # measurements of another card do not mix with these
    for name, step in steps.items():
        if name in results and name not in arguments.again:
            continue
        logger.info("%s", name)
        results[name] = step()
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        arguments.results.write_text(json.dumps(results, indent=2) + "\n")
        write_section(arguments.page, "Measurements", report(results), "On a GPU")


if __name__ == "__main__":
    main()
