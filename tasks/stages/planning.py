"""`--dry-run` of the stages that compute for long."""

from __future__ import annotations

import sys
from pathlib import Path

from tlq.parallel import Ranks
from tlq.plan import Plan, refuse_impossible


def show_plan(plan: Plan, out: Path, ranks: Ranks) -> None:
    """Print what a job will need, then refuse it if this machine cannot do it."""
    sys.stdout.write("\n".join([*plan.lines(), ""]))
    refuse_impossible(plan, out, ranks.device, ranks.size)
    sys.stdout.write("this machine has it\n")
