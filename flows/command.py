"""The command line of a flow: ``python -m flows.<name>``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable

from flows.stages import StageFailed


def main(flow: Callable[[], str], description: str | None, where: str = "") -> None:
    """Run ``flow`` with the values of params.yaml and print the table that it returns.

    Args:
        description: the flow module's docstring, for ``--help``.
        where: printed after the table, for instance the paths of the results.
    """
    parser = ArgumentParser(
        prog=f"python -m flows.{flow.__name__}",
        description=f"{(description or '').strip()}\n\nparams.yaml says what the flow does.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    try:
        table = flow()
    except StageFailed as error:
        sys.exit(f"\n{error}")
    sys.stdout.write("\n".join(["", table, "", *([where, ""] if where else [])]))
