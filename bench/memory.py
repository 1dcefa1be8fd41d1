"""Measure peak memory of importance, calibration and export by number of layers; it must not grow.

    python -m bench.memory

Checkpoints of Qwen2-VL's architecture with random weights are written layer by layer. Each job then runs in a separate
process with little host memory for hidden states (the rest of them is on disk). The deepest checkpoint should be at
least five times larger than the peak of the process that quantizes it. Writes a section of docs/scale.md, and
docs/memory.png.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from matplotlib.figure import Figure

from bench.models import SHAPES, FamilyShape, Shape, demo_samples, write_random_model
from bench.sections import table, write_section

logger = logging.getLogger("bench.memory")

HOST_MEMORY = "0.05"
#: GiB for which jobs are planned: too few for the middle shape to score importance with all layers in memory.
DEVICE_MEMORY = 0.3
#: What is measured, the largest last.
JOBS = {
    "importance": "importance alone",
    "score": "scores by the backend `streamed`",
    "quantize": "importance, calibration, export",
}
_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Measured:
    """Measurements of one job on one checkpoint, in bytes and seconds.

    Attributes:
        layers, checkpoint: number of decoder layers, and size of the weights on disk.
        start: peak memory before the work: Python, torch, transformers, the model without weights.
        peak: peak memory after the work.
        planned: memory that the plan expects on top of ``start``; None for a job without a plan.
    """

    job: str
    layers: int
    checkpoint: int
    start: int
    peak: int
    planned: int | None
    seconds: float


def measure(
    shape: Shape | FamilyShape, jobs: Sequence[str], samples: int, recipe: str, device_memory: float, folder: Path
) -> list[Measured]:
    """Write a checkpoint, run each job on it as on a device of so many GiB, remove it."""
    model = folder / "model"
    logger.info("%d layers", shape.layers)
    write_random_model(model, shape)
    checkpoint = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    (folder / "samples").write_bytes(pickle.dumps(demo_samples(samples)))
    measurements = []
    for job in jobs:
        command = [sys.executable, "-m", "bench.memory_job", job, "--model", str(model)]
        command += ["--samples", str(folder / "samples"), "--out", str(folder / "out")]
        command += ["--measured", str(folder / "measured"), "--recipe", recipe]
        limits = {"TLQ_HOST_MEMORY": HOST_MEMORY, "TLQ_DEVICE_MEMORY": str(device_memory)}
        done = subprocess.run(command, env={**os.environ, **limits}, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{job} of {shape.layers} layers failed: {done.stderr[-1500:]}")
        figures = json.loads((folder / "measured").read_text())
        measurements.append(Measured(job, shape.layers, checkpoint, **figures))
        logger.info("%s: %s", job, {name: str(value) for name, value in asdict(measurements[-1]).items()})
        shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(model)
    return measurements


def report(measurements: Sequence[Measured], shape: Shape | FamilyShape, samples: int, recipe: str, docs: Path) -> None:
    """Write the section and the picture."""
    whole = [each for each in measurements if each.job == "quantize"]
    deepest, shallowest = max(whole, key=lambda each: each.layers), min(whole, key=lambda each: each.layers)
    lines = [
        f"The models have {shape}, with random weights, in bfloat16 on disk and float32 in computation. The jobs used "
        f"{samples} samples, "
        f"recipe {recipe}, scheme W3A16 and {HOST_MEMORY} GiB of host memory for hidden states; the rest of them was "
        f"on disk. Peak is the resident memory of the process, which has {deepest.start / _MIB:.0f} MiB before the "
        "work begins (Python, torch, transformers, the model without weights); expected is the estimate of the plan on "
        "top of this. `python -m bench.memory` wrote this section.",
        "",
        *table([_row(each) for each in measurements]),
        "",
        f"From {shallowest.layers} to {deepest.layers} layers the peak of the whole job (importance, calibration, "
        f"export) changes by {(deepest.peak - shallowest.peak) / _MIB:+.0f} MiB while the checkpoint grows by "
        f"{(deepest.checkpoint - shallowest.checkpoint) / _GIB:.2f} GiB. The deepest checkpoint is "
        f"{deepest.checkpoint / deepest.peak:.1f} times larger than the peak of the process that quantized it.",
        "",
        "![Peak memory by number of layers](memory.png)",
    ]
    write_section(docs / "scale.md", "Memory", lines, "Scale")
    _draw(measurements).savefig(docs / "memory.png", dpi=100, metadata={"Software": None})


def _row(each: Measured) -> dict[str, str]:
    return {
        "layers": str(each.layers),
        "checkpoint, GiB": f"{each.checkpoint / _GIB:.2f}",
        "job": JOBS[each.job],
        "peak, MiB": f"{each.peak / _MIB:.0f}",
        "expected / measured": "–" if each.planned is None else f"{each.planned / (each.peak - each.start):.2f}",
        "seconds": f"{each.seconds:.0f}",
    }


def _draw(measurements: Sequence[Measured]) -> Figure:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for job, label in JOBS.items():
        part = [each for each in measurements if each.job == job]
        axes.plot([each.layers for each in part], [each.peak / _GIB for each in part], "o-", markersize=4, label=label)
    sizes = sorted({(each.layers, each.checkpoint / _GIB) for each in measurements})
    axes.plot(*zip(*sizes, strict=True), "--", color="grey", label="checkpoint on disk")
    axes.set_xlabel("decoder layers")
    axes.set_ylabel("GiB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--deepest", type=int, default=192, help="layers of the largest checkpoint; 0: none")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="`quantize` is always measured")
    parser.add_argument("--shape", choices=SHAPES, default="middle")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--recipe", default="tlq-c")
    parser.add_argument("--device-memory", type=float, default=DEVICE_MEMORY, help="GiB to plan for")
    parser.add_argument("--folder", type=Path, help="folder for temporary checkpoints (tens of GiB)")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    shape = SHAPES[arguments.shape]
    measurements = []
    runs = [(layers, [job for job in JOBS if job in (*arguments.jobs, "quantize")]) for layers in arguments.layers]
    runs += [(arguments.deepest, ["score", "quantize"])] if arguments.deepest else []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for layers, jobs in runs:
            settings = (arguments.samples, arguments.recipe, arguments.device_memory)
            measurements += measure(replace(shape, layers=layers), jobs, *settings, Path(folder))
    report(measurements, shape, arguments.samples, arguments.recipe, arguments.docs)


if __name__ == "__main__":
    main()
