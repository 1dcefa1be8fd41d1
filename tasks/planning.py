"""`--dry-run` of the stages that compute for long."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

from tlq.parallel import Ranks
from tlq.plan import Plan, refuse_impossible


def add_dry_run(parser: ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print what the job will need, and do nothing")


def show_plan(plan: Plan, out: Path, ranks: Ranks) -> None:
    """Print what a job will need, then refuse it if this machine cannot do it."""
    sys.stdout.write("\n".join([*plan.lines(), ""]))
    refuse_impossible(plan, out, ranks.device, ranks.size)
    sys.stdout.write("this machine has it\n")
