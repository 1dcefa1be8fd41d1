"""What the benches of memory and ranks write about their figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.memory import Measured, report
from bench.models import SHAPES
from bench.scaling import Run, device_lines, scaling_lines
from bench.sections import write_section

GIB = 2**30


def layer(**phases: float) -> dict[str, Any]:
    return {"phases": phases, "peak_device_bytes": None, "peak_host_bytes": GIB}


def run(ranks: int, seconds: float, bits: str = "same") -> Run:
    return Run(ranks, seconds, [layer(importance=1.0, search=seconds - 2), layer(search=1.0)], bits, "cpu")


def test_ranks_are_compared_pair_by_pair() -> None:
    lines = scaling_lines([run(1, 20), run(2, 10), run(1, 30), run(2, 20)], SHAPES["tiny"], "A model.")
    assert lines[-1].startswith("2 ranks are 1.75 times faster than 1 (pairs: 1.50 to 2.00)")
    assert "| all | 25.00 | 15.00 | 1.67 |" in lines


def test_a_comparison_of_different_results_is_refused() -> None:
    with pytest.raises(ValueError, match="the same bits must come out"):
        scaling_lines([run(1, 20), run(2, 10, "other")], SHAPES["tiny"], "")


def test_what_was_left_out_is_extrapolated_and_called_so() -> None:
    shape = replace(SHAPES["tiny"], layers=20)
    assert not any("Extrapolated" in line for line in device_lines(run(1, 20), shape, 20, 24, ""))
    assert device_lines(run(1, 20), shape, 2, 24, "")[-1].startswith("Extrapolated, not measured:")


def test_memory_is_held_against_the_checkpoint(tmp_path: Path) -> None:
    found = [Measured("quantize", layers, layers * GIB, GIB // 4, GIB, GIB, 9.0) for layers in (2, 8)]
    report(found, SHAPES["tiny"], 4, "tlq", tmp_path)
    text = (tmp_path / "scale.md").read_text()
    assert "changes by +0 MiB while the checkpoint grows by 6.00 GiB" in text
    assert "8.0 times larger than the peak" in text
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_section_takes_the_place_of_its_older_self(tmp_path: Path) -> None:
    path = tmp_path / "scale.md"
    for title, lines in (("Ranks", ["old"]), ("Memory", ["kept"]), ("Ranks", ["new"])):
        write_section(path, title, lines, "Scale")
    assert path.read_text() == "# Scale\n\n## Ranks\n\nnew\n\n## Memory\n\nkept\n"
