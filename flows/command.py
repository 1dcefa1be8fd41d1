"""The command line of a flow: ``python -m flows.<name>``."""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS

from flows.next_steps import champions, next_steps
from flows.stages import StageFailed


def main(flow: Callable[[], str], description: str | None) -> None:
    """Run ``flow`` with the values of params.yaml; print the table that it returns, the champions and what to do next.

    Args:
        description: the flow module's docstring, for ``--help``.
    """
    parser = ArgumentParser(
        prog=f"python -m flows.{flow.__name__}",
        description=f"{(description or '').strip()}\n\nparams.yaml says what the flow does.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    wait_for_prefect()
    try:
        table = flow()
    except StageFailed as error:
        sys.exit(f"\n{error}")
    sys.stdout.write("\n".join(["", table, "", *champions(), "", *next_steps(), ""]))


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
