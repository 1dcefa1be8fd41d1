"""``python -m tlq``: the command ``tlq``."""

import sys

from tlq.cli import main

sys.exit(main())
