"""The pipeline's stages, and what they share."""

from __future__ import annotations

import gc

# A stage's imports make millions of objects that all stay: Python's default looks for garbage among them every 700.
gc.set_threshold(10_000)
