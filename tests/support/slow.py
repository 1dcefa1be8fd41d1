"""Tests that take long or start processes: `make check` leaves them out."""

from __future__ import annotations

#: Files and folders that `make check` leaves out: they start servers or ranks, build environments, or export dozens of
#: checkpoints. `make test` runs them, in this order: the longest first.
SLOW = (
    "test_pipeline.py",
    "tasks/cluster",
    "tlq/test_parallel.py",
    "test_package.py",
    "test_dvc.py",
    "services",
    "test_docs.py",
    "tlq/models/test_families.py",
    "tasks/registry/test_serving.py",
    "tasks/stages/test_register.py",
    "tasks/stages/test_resume.py",
    "demo/test_demo_training.py",
    "bench",
    "tasks/registry/test_registry_browser.py",
    "tasks/report/test_report_browser.py",
)
