"""Check that MLflow answers, before the long work of a flow and not after it.

    python -m tasks.registry.check

It imports neither torch nor transformers, which take longer than the answer.
"""

from __future__ import annotations

import logging
import sys

from tasks.errors import exit_status, one_line
from tasks.registry.connection import connect
from tlq.runtime.log import log_level

logger = logging.getLogger("tlq")


def main() -> int:
    """Connect to MLflow; returns the exit status, after an error in one line.

    ``TLQ_LOG=debug`` logs more, including the traceback of an expected error.
    """
    logging.basicConfig(level="INFO", format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        logging.getLogger().setLevel(log_level())
        connect()
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
        logger.debug("traceback", exc_info=True)
        logger.error("%s", message)
        return exit_status(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
