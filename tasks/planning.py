"""Option `--dry-run` of the stages with long computations."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

import torch

from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks
from tlq.plan.needs import Plan, refuse_impossible
from tlq.plan.speed import Probe, Speed, speed_for


def add_dry_run(parser: ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only print the memory, disk and time of the job")


def speed_of(plans: Sequence[Plan], model: StreamedModel, probe: Probe, ranks: Ranks) -> Speed | None:
    """As ``speed_for``, for one of ``ranks``, which share the threads of a CPU."""
    threads = torch.get_num_threads()
    if model.device.type == "cpu":
        torch.set_num_threads(max(1, threads // ranks.size))
    try:
        return speed_for(plans, model, probe)
    finally:
        torch.set_num_threads(threads)


def show_plan(plan: Plan, out: Path, ranks: Ranks) -> None:
    """Print a job's plan, then raise an error if this machine is too small for it."""
    sys.stdout.write("\n".join([*plan.lines(), ""]))
    refuse_impossible(plan, out, ranks.device, ranks.size)
    sys.stdout.write("this machine has it\n")
