"""Check that MLflow answers, before the long work of a flow and not after it.

    python -m tasks.registry.check

It imports neither torch nor transformers, which take longer than the answer.
"""

from __future__ import annotations

import logging
import sys

from tasks.errors import exit_status, one_line
from tasks.registry.connection import connect

logger = logging.getLogger("tlq")


def main() -> int:
    """Connect to MLflow; returns the exit status, after an error in one line."""
    logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        connect()
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
        logger.error("%s", message)
        return exit_status(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
