"""Prefect flows."""

from __future__ import annotations

import tasks  # noqa: F401, its setting of garbage collection comes before the imports of the flows
