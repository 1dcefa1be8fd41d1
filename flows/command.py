"""The command line of a flow: ``python -m flows.<name>``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import Any

import yaml

from flows.parameters import ParametersError
from flows.stages import StageFailed
from tasks.config.params import ParamsError


def main(
    flow: Callable[..., str],
    description: str | None,
    where: str = "",
    add_options: Callable[[ArgumentParser], None] | None = None,
    parameters_of: Callable[[Namespace], dict[str, Any]] | None = None,
) -> None:
    """Run ``flow`` with the values of params.yaml and print the table that it returns.

    Args:
        description: the flow module's docstring, for ``--help``.
        where: printed after the table, for instance the paths of the results.
        add_options: adds the flow's options to the parser; None for a flow without options.
        parameters_of: the flow's parameters from the parsed options.
    """
    parser = ArgumentParser(
        prog=f"python -m flows.{flow.__name__}",
        description=f"{(description or '').strip()}\n\nparams.yaml has every value that no option replaces.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    if add_options is not None:
        add_options(parser)
    options = parser.parse_args()
    try:
        table = flow(**(parameters_of(options) if parameters_of is not None else {}))
    except (StageFailed, ParametersError, ParamsError, ConnectionError) as error:
        sys.exit(f"\n{error}")
    sys.stdout.write("\n".join(["", table, "", *([where, ""] if where else [])]))


def setting(word: str) -> tuple[str, Any]:
    """Name and value of ``NAME=VALUE``, whose value is YAML.

    Raises:
        ParametersError: the word has no ``=``.
    """
    name, mark, value = word.partition("=")
    if not (name and mark):
        raise ParametersError(f"--set {word}: must be NAME=VALUE, for instance calibset.seed=1")
    return name, yaml.safe_load(value)
