"""Option `--dry-run` of the stages with long computations."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from tlq.parallel import Ranks
from tlq.plan import Plan, refuse_impossible


def add_dry_run(parser: ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only print the memory and disk that the job needs")


def show_plan(plan: Plan, out: Path, ranks: Ranks) -> None:
    """Print a job's plan, then raise an error if this machine is too small for it."""
    sys.stdout.write("\n".join([*plan.lines(), ""]))
    refuse_impossible(plan, out, ranks.device, ranks.size)
    sys.stdout.write("this machine has it\n")
