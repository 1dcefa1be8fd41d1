"""Peak memory of importance, calibration and export against the number of layers: it must not grow.

    python -m bench.memory

Checkpoints of Qwen2-VL's architecture with random weights are written layer by layer, then worked on in a process of
its own each, with little host memory allowed for hidden states (what exceeds it lies on disk). The deepest checkpoint
is to be at least five times larger than the peak of the process that quantizes it. Writes a section of docs/scale.md,
and docs/memory.png.
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

from bench.models import SHAPES, Shape, demo_samples, write_random_model
from bench.sections import table, write_section

logger = logging.getLogger("bench.memory")

HOST_MEMORY = "0.05"
_MIB, _GIB = 2**20, 2**30


@dataclass(frozen=True)
class Measured:
    """One job on one checkpoint; bytes, and seconds.

    Attributes:
        layers, checkpoint: decoder layers, and size of the weights on disk.
        start: peak before the work began: Python, torch, transformers, the model without weights.
        peak: at its end.
        planned: what the plan expects on top of ``start``.
    """

    job: str
    layers: int
    checkpoint: int
    start: int
    peak: int
    planned: int
    seconds: float


def measure(shape: Shape, jobs: Sequence[str], samples: int, recipe: str, folder: Path) -> list[Measured]:
    """Write a checkpoint, do each job on it, remove it."""
    model = folder / "model"
    logger.info("%d layers", shape.layers)
    write_random_model(model, shape)
    checkpoint = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    (folder / "samples").write_bytes(pickle.dumps(demo_samples(samples)))
    found = []
    for job in jobs:
        command = [sys.executable, "-m", "bench.memory_job", job, "--model", str(model)]
        command += ["--samples", str(folder / "samples"), "--out", str(folder / "out")]
        command += ["--measured", str(folder / "measured"), "--recipe", recipe]
        done = subprocess.run(
            command, env={**os.environ, "TLQ_HOST_MEMORY": HOST_MEMORY}, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{job} of {shape.layers} layers failed: {done.stderr[-1500:]}")
        figures = json.loads((folder / "measured").read_text())
        found.append(Measured(job, shape.layers, checkpoint, **figures))
        logger.info("%s: %s", job, {name: str(value) for name, value in asdict(found[-1]).items()})
        shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.rmtree(model)
    return found


def report(found: Sequence[Measured], shape: Shape, samples: int, recipe: str, docs: Path) -> None:
    """Write the section and the picture."""
    whole = [each for each in found if each.job == "quantize"]
    deepest, shallowest = max(whole, key=lambda each: each.layers), min(whole, key=lambda each: each.layers)
    lines = [
        f"Qwen2-VL's architecture with random weights, hidden size {shape.hidden}, intermediate size "
        f"{shape.intermediate}, bfloat16 on disk and float32 in computation; {samples} samples, recipe {recipe}, "
        f"scheme W3A16, {HOST_MEMORY} GiB of host memory for hidden states, the rest of them on disk. Peak resident "
        f"memory of the process, of which {deepest.start / _MIB:.0f} MiB are there before the work begins (Python, "
        "torch, transformers, the model without weights); expected is what the plan says on top of them. Made by "
        "`python -m bench.memory`.",
        "",
        *table([_row(each) for each in found]),
        "",
        f"From {shallowest.layers} to {deepest.layers} layers the peak of the whole job (importance, calibration, "
        f"export) changes by {(deepest.peak - shallowest.peak) / _MIB:+.0f} MiB while the checkpoint grows by "
        f"{(deepest.checkpoint - shallowest.checkpoint) / _GIB:.2f} GiB. The deepest checkpoint is "
        f"{deepest.checkpoint / deepest.peak:.1f} times larger than the peak of the process that quantized it.",
        "",
        "![Peak memory by number of layers](memory.png)",
    ]
    write_section(docs / "scale.md", "Memory", lines, "Scale")
    _draw(found).savefig(docs / "memory.png", dpi=100, metadata={"Software": None})


def _row(each: Measured) -> dict[str, str]:
    return {
        "layers": str(each.layers),
        "checkpoint, GiB": f"{each.checkpoint / _GIB:.2f}",
        "job": {"importance": "importance alone", "quantize": "importance, calibration, export"}[each.job],
        "peak, MiB": f"{each.peak / _MIB:.0f}",
        "expected / measured": f"{each.planned / (each.peak - each.start):.2f}",
        "seconds": f"{each.seconds:.0f}",
    }


def _draw(found: Sequence[Measured]) -> Figure:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for job, label in (("quantize", "importance, calibration, export"), ("importance", "importance alone")):
        part = [each for each in found if each.job == job]
        axes.plot([each.layers for each in part], [each.peak / _GIB for each in part], "o-", markersize=4, label=label)
    sizes = sorted({(each.layers, each.checkpoint / _GIB) for each in found})
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
    parser.add_argument("--deepest", type=int, default=192, help="layers of the checkpoint that dwarfs the memory")
    parser.add_argument("--shape", choices=SHAPES, default="middle")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--recipe", default="tlq-c")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written for a while (tens of GiB)")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    shape = SHAPES[arguments.shape]
    found = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for layers in arguments.layers:
            jobs = ["importance", "quantize"]
            found += measure(replace(shape, layers=layers), jobs, arguments.samples, arguments.recipe, Path(folder))
        if arguments.deepest:
            deepest = replace(shape, layers=arguments.deepest)
            found += measure(deepest, ["quantize"], arguments.samples, arguments.recipe, Path(folder))
    report(found, shape, arguments.samples, arguments.recipe, arguments.docs)


if __name__ == "__main__":
    main()
