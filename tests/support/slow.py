"""Tests that take long or start processes: `make check` leaves them out."""

from __future__ import annotations

#: Files and folders that `make check` leaves out: they start servers or ranks, build environments, or export dozens of
#: checkpoints. `make test` runs them.
SLOW = (
    "bench",
    "demo/test_demo_training.py",
    "services",
    "tasks/cluster",
    "tasks/registry/test_registry_browser.py",
    "tasks/registry/test_serving.py",
    "tasks/report/test_report_browser.py",
    "tasks/stages/test_register.py",
    "tasks/stages/test_resume.py",
    "test_docs.py",
    "test_dvc.py",
    "test_package.py",
    "test_pipeline.py",
    "tlq/models/test_families.py",
    "tlq/test_parallel.py",
)
