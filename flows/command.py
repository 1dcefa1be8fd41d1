"""The command line of a flow: ``python -m flows.<name>``."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS

from flows.next_steps import champions, next_steps
from flows.parameters import ParametersError
from flows.stages import StageFailed
from services.reaper import watch_this_process
from tasks.config.params import ParamsError


def main(
    flow: Callable[..., str],
    description: str | None,
    add_options: Callable[[ArgumentParser], None] | None = None,
    parameters_of: Callable[[Namespace], dict[str, Any]] | None = None,
) -> None:
    """Run ``flow`` with the values of params.yaml; print the table that it returns, the champions and what to do next.

    Args:
        description: the flow module's docstring, for ``--help``.
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
    watch_this_process()
    wait_for_prefect()
    try:
        table = flow(**(parameters_of(options) if parameters_of is not None else {}))
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; run the same command again to continue\n")
        sys.exit(130)
    except (StageFailed, ParametersError, ParamsError, ConnectionError) as error:
        sys.exit(f"\n{error}")
    sys.stdout.write("\n".join(["", table, "", *champions(), "", *next_steps(), ""]))


def add_common_options(parser: ArgumentParser) -> None:
    """Add the options that flows `quantize` and `evaluate` have in common."""
    parser.add_argument("--limit", type=int, help="items per benchmark, 0 for all")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="any other values of params.yaml")
    parser.add_argument(
        "--promote",
        action=BooleanOptionalAction,
        help="let the versions become champion; default: only in a run without other values",
    )


def settings_of(options: Namespace) -> dict[str, Any]:
    """The values of ``--set``."""
    return dict(setting(word) for word in options.set)


def setting(word: str) -> tuple[str, Any]:
    """Name and value of ``NAME=VALUE``, whose value is YAML.

    Raises:
        ParametersError: the word has no ``=``.
    """
    name, mark, value = word.partition("=")
    if not (name and mark):
        raise ParametersError(f"--set {word}: must be NAME=VALUE, for instance calibset.seed=1")
    return name, yaml.safe_load(value)


def wait_for_prefect() -> None:
    """Start the run's own Prefect server, or find the one of PREFECT_API_URL, and say on stderr what is waited for.

    Raises:
        SystemExit: no server answers; the message says what to do.
    """
    url = PREFECT_API_URL.value()
    seconds = PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
    _say(f"waiting for Prefect at {url}" if url else f"waiting for a temporary Prefect server (up to {seconds} s)")
    start = time.monotonic()
    try:
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
            found = client.api_url
    except RuntimeError as failure:  # Prefect's error if its temporary server does not start in time
        sys.exit(
            f"{failure}\nSet PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS to more than {seconds}, or set "
            "PREFECT_API_URL to a server that runs"
        )
    if error is not None:
        sys.exit(f"Prefect at {found} does not answer ({error}); start it, or unset PREFECT_API_URL")
    _say(f"Prefect is there after {time.monotonic() - start:.0f} s: {found}")


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
