"""The sections that bench.memory, bench.scaling and bench.demo_time write."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import demo_time
from bench.memory import Measured, report
from bench.models import SHAPES
from bench.scaling import Run, device_lines, scaling_lines
from bench.sections import write_section

GIB = 2**30


def layer(**phases: float) -> dict[str, Any]:
    return {"phases": phases, "peak_device_bytes": None, "peak_host_bytes": GIB}


def run(ranks: int, seconds: float, bits: str = "same") -> Run:
    return Run(ranks, seconds, [layer(importance=1.0, search=seconds - 2), layer(search=1.0)], bits, "cpu")


def test_rank_ratios_are_medians_over_pairs() -> None:
    lines = scaling_lines([run(1, 20), run(2, 10), run(1, 30), run(2, 20)], SHAPES["tiny"], "A model.")
    assert lines[-1].startswith("2 ranks are 1.75 times faster than 1 (pairs: 1.50 to 2.00)")
    assert "| all | 25.00 | 15.00 | 1.67 |" in lines


def test_runs_with_different_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="must have the same bits"):
        scaling_lines([run(1, 20), run(2, 10, "other")], SHAPES["tiny"], "")


def test_time_of_left_out_layers_is_labelled_as_extrapolated() -> None:
    shape = replace(SHAPES["tiny"], layers=20)
    assert not any("Extrapolated" in line for line in device_lines(run(1, 20), shape, 20, 24, ""))
    assert device_lines(run(1, 20), shape, 2, 24, "")[-1].startswith("Extrapolated, not measured:")


def test_memory_report_compares_peak_with_checkpoint(tmp_path: Path) -> None:
    measurements = [Measured("quantize", layers, layers * GIB, GIB // 4, GIB, GIB, 9.0) for layers in (2, 8)]
    report(measurements, SHAPES["tiny"], 4, "tlq", tmp_path)
    text = (tmp_path / "scale.md").read_text()
    assert "changes by +0 MiB while the checkpoint grows by 6.00 GiB" in text
    assert "8.0 times larger than the peak" in text
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_section_replaces_its_older_version(tmp_path: Path) -> None:
    path = tmp_path / "scale.md"
    for title, lines in (("Ranks", ["old"]), ("Memory", ["kept"]), ("Ranks", ["new"])):
        write_section(path, title, lines, "Scale")
    assert path.read_text() == "# Scale\n\n[All pages](README.md)\n\n## Ranks\n\nnew\n\n## Memory\n\nkept\n"


def test_processes_of_the_demo_are_told_apart_by_their_command_lines() -> None:
    assert demo_time.kind_of("/venv/bin/python -m tasks.stages.evaluate --variant full") == (
        "`evaluate`",
        "tasks.stages.evaluate",
    )
    assert demo_time.kind_of("/venv/bin/python -m tasks.cluster.rank tasks.stages.calibrate --recipe tlq")[0] == (
        "`calibrate`"
    )
    assert demo_time.kind_of("/venv/bin/python -m tasks.stages.report")[0] == "`report`"
    assert demo_time.kind_of("/venv/bin/python /venv/bin/dvc repro --single-item prepare")[0] == "DVC"
    assert demo_time.kind_of("/venv/bin/python -m uvicorn --app-dir x prefect.server.api.server:create_app")[0] == (
        "Prefect's server and the flow"
    )
    assert demo_time.kind_of("cat")[0] == "others"


def test_cpu_seconds_of_processes_below_one_are_counted() -> None:
    busy = "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    starts = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"
    parent = subprocess.Popen([sys.executable, "-c", starts])
    watched = demo_time.Watched()
    while parent.poll() is None:
        watched.sample(psutil.Process(parent.pid))
        time.sleep(0.02)
    groups = watched.groups()
    assert groups["others"].processes == 2
    assert 0.3 < groups["others"].seconds < 5
    groups = {"`evaluate`": demo_time.Group(30.0, 2), "DVC": demo_time.Group(10.0, 4)}
    lines = demo_time.lines_of(60.0, 10.0, groups, {"DVC": 8.0})
    assert "40 CPU seconds, of which 25% are bookkeeping" in lines[0]
    assert "the installation took 60 seconds" in lines[0]
    assert lines[-1] == "| bookkeeping: DVC, 4 | 10 | 8 |"
