"""Tiny benchmark files, and lm-eval without its log."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.benchmark_rows import textvqa_rows, write_rows

from benchmarks.data import BenchmarkSource

logging.getLogger("lm_eval").setLevel(logging.ERROR)


@pytest.fixture
def textvqa(tmp_path: Path) -> Callable[..., BenchmarkSource]:
    """A demo_textvqa of ``count`` rows, which ``change`` may modify."""

    def make(count: int = 6, change: Callable[[list[dict[str, Any]]], None] = lambda rows: None) -> BenchmarkSource:
        rows = textvqa_rows(count)
        change(rows)
        return BenchmarkSource("demo_textvqa", data=write_rows(tmp_path / "textvqa.parquet", rows))

    return make
