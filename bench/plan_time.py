"""Compare the seconds that `tlq plan` expects with the seconds that the same jobs take on this machine.

    python -m bench.plan_time

Checkpoints with random weights are written, planned and quantized in turn. Writes a section of docs/scale.md.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.models import SHAPES, Shape, demo_samples, write_random_model
from bench.sections import table, write_section
from tlq.api import plan, quantize
from tlq.plan.needs import Plan

logger = logging.getLogger("bench.plan_time")


@dataclass(frozen=True)
class Job:
    """A job to plan and to run."""

    shape: str
    layers: int
    samples: int
    recipe: str
    scheme: str


JOBS = (
    Job("middle", 2, 64, "tlq-c", "w3a16"),
    Job("middle", 2, 64, "tlq", "w4a8"),
    Job("middle", 2, 64, "gptq", "w4a16"),
    Job("middle", 2, 64, "awq", "w4a16"),
    Job("middle", 6, 32, "tlq-c", "w2a16"),
    Job("qwen2-vl-7b", 1, 16, "tlq-c", "w4a16"),
)


@dataclass(frozen=True)
class Compared:
    """A job's expected and measured seconds: importance, calibration, and both with everything around them."""

    job: Job
    plans: Sequence[Plan]
    calibration: float
    whole: float

    def row(self) -> dict[str, str]:
        """A row of the table."""
        expected = [sum(each.seconds.values()) for each in self.plans]
        return {
            "model": f"{self.job.shape}, {self.job.layers} layer{'s' if self.job.layers > 1 else ''}",
            "samples": str(self.job.samples),
            "recipe, scheme": f"{self.job.recipe} {self.job.scheme.upper()}",
            "calibration, measured s": f"{self.calibration:.0f}",
            "planned s": f"{expected[-1]:.0f}",
            "whole job, measured s": f"{self.whole:.0f}",
            "all planned s": f"{sum(expected):.0f}",
            "planned / measured": f"{sum(expected) / self.whole:.2f}",
        }


def compare(job: Job, folder: Path) -> Compared:
    """Write the checkpoint, plan the job, run it."""
    shape = SHAPES[job.shape]
    assert isinstance(shape, Shape)
    model = write_random_model(folder / "model", replace(shape, layers=job.layers, pixels=256 * 256))
    samples = demo_samples(job.samples)
    plans = plan(model, samples, job.recipe, job.scheme, timed=True)
    report = quantize(model, folder / "out", samples, job.recipe, job.scheme)
    calibration = sum(layer["seconds"] for layer in report.layers)
    for name in ("model", "out"):
        shutil.rmtree(folder / name)
    return Compared(job, plans, calibration, report.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of scale.md")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads of a CPU"
    )
    compared = []
    for job in JOBS:
        with tempfile.TemporaryDirectory() as folder:
            compared.append(compare(job, Path(folder)))
        logger.info("%s", compared[-1].row())
    lines = [
        "`tlq plan` and `--dry-run` measure the machine for some seconds, with a layer of the model and the first "
        f"samples, and count operations. Random weights, {device}, one run each; seconds include importance, where "
        "the recipe needs it, and export. `python -m bench.plan_time` wrote this section.",
        "",
        *table([each.row() for each in compared]),
    ]
    write_section(arguments.docs / "scale.md", "Expected and measured time", lines, "Scale")


if __name__ == "__main__":
    main()
