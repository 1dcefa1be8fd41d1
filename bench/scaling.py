"""Measure how calibration with importance scales over ranks, and to real sizes on one GPU.

    python -m bench.scaling                                              # 2 ranks against 1, one thread each
    python -m bench.scaling --shape qwen2-vl-7b --device-memory 24       # on a GPU of which 24 GiB may be used
    python -m bench.scaling --shape qwen2-vl-72b --layers 2 --device-memory 24

Models have random weights. Runs with different numbers of ranks take turns, and their results must have the same bits.
With ``--device-memory`` there is one rank; the time of left-out layers is extrapolated, and labelled as such. Each
command writes a section of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.models import SHAPES, FamilyShape, Shape, demo_samples, large_samples, write_random_model
from bench.sections import table, write_section
from tasks.command import quiet_libraries
from tlq.runtime.digest import checkpoint_digest

logger = logging.getLogger("bench.scaling")

#: Phases in the order of the work; ``importance`` and ``enter`` occur once, before the layers.
PHASES = ("importance", "enter", "load", "forward", "reduce", "search", "round", "write")
_ONCE = ("importance", "enter")
_GIB = 2**30


@dataclass(frozen=True)
class Run:
    """Measurements of one run.

    Attributes:
        seconds: wall seconds of the work, without the start of Python.
        layers: reports of ``quantize_checkpoint``, with seconds by phase of the leading rank.
        bits: digest of the exported checkpoint.
        device: name of the device.
    """

    ranks: int
    seconds: float
    layers: list[dict[str, Any]]
    bits: str
    device: str

    def phase(self, name: str) -> float:
        return sum(layer["phases"].get(name, 0.0) for layer in self.layers)

    @property
    def per_layer(self) -> float:
        """Median seconds of a layer; the median excludes work that only the first layer does."""
        return median(
            sum(seconds for name, seconds in layer["phases"].items() if name not in _ONCE) for layer in self.layers
        )

    @property
    def peak(self) -> int:
        """Peak memory of the leading rank in bytes: of the device, or of the host without a device."""
        return max(layer["peak_device_bytes"] or layer["peak_host_bytes"] for layer in self.layers)


def run_job(arguments: argparse.Namespace, ranks: int, folder: Path) -> Run:
    """Calibrate in separate processes and return the measurements."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "bench.scaling_job", "--model", str(folder / "model"), "--out", str(out)]
    command += ["--samples", str(folder / "samples"), "--measured", str(folder / "measured")]
    command += ["--recipe", arguments.recipe, "--tokens", str(arguments.tokens)]
    command += ["--batch-size", str(arguments.batch_size)]
    environment = {**os.environ, "TLQ_RANKS": str(ranks)}
    if arguments.device_memory:
        command += ["--device-memory", str(arguments.device_memory)]
        environment["TLQ_DEVICE_MEMORY"] = str(arguments.device_memory)
    else:
        environment |= {"TLQ_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{ranks} rank(s) failed: {done.stderr[-1500:]}")
    measured = json.loads((folder / "measured").read_text())
    (out / "calibration.json").unlink()  # contains times, which differ between runs
    run = Run(ranks, measured["seconds"], measured["layers"], checkpoint_digest(out), measured["device"])
    logger.info("%d rank(s): %.1f s", ranks, run.seconds)
    return run


def scaling_lines(runs: Sequence[Run], shape: Shape | FamilyShape, conditions: str) -> list[str]:
    """Lines of the section on ranks.

    Raises:
        ValueError: the runs' checkpoints differ.
    """
    if len({run.bits for run in runs}) > 1:
        raise ValueError("the checkpoints of these runs differ; they must have the same bits for any number of ranks")
    few, many = min(run.ranks for run in runs), max(run.ranks for run in runs)
    slow, fast = ([run for run in runs if run.ranks == ranks] for ranks in (few, many))
    ratios = [one.seconds / other.seconds for one, other in zip(slow, fast, strict=True)]
    rows = [_phase_row(name, [run.phase(name) for run in slow], [run.phase(name) for run in fast]) for name in PHASES]
    rows.append(_phase_row("all", [run.seconds for run in slow], [run.seconds for run in fast]))
    renamed = [dict(zip(("phase", f"{few} rank(s), s", f"{many} ranks, s", "ratio"), row, strict=True)) for row in rows]
    return [
        f"{conditions} {len(slow)} pairs of runs took turns; every rank had one thread on a separate core. The table "
        "has median seconds by phase of the leading rank (`reduce` is the exchange between ranks, including the wait "
        "for the other ranks). All results had the same bits. `python -m bench.scaling` wrote this section.",
        "",
        *table(renamed),
        "",
        f"{many} ranks are {median(ratios):.2f} times faster than {few} (pairs: {min(ratios):.2f} to "
        f"{max(ratios):.2f}); a layer takes {median(run.per_layer for run in slow):.1f} s on {few}.",
    ]


def _phase_row(name: str, slow: Iterable[float], fast: Iterable[float]) -> tuple[str, str, str, str]:
    one, other = median(slow), median(fast)
    return name, f"{one:.2f}", f"{other:.2f}", f"{one / other:.2f}" if other > 0.005 and one > 0.005 else ""


def device_lines(run: Run, shape: Shape | FamilyShape, layers: int, memory: float, conditions: str) -> list[str]:
    """Lines of the section on one device with limited memory."""
    rows = [{"phase": name, "seconds": f"{run.phase(name):.1f}"} for name in PHASES]
    lines = [
        f"{conditions} One rank ran on {run.device} with a limit of {memory:g} GiB. `python -m bench.scaling` wrote "
        "this section.",
        "",
        *table(rows),
        "",
        f"{layers} layers: {run.seconds:.0f} s in all, {run.per_layer:.1f} s a layer; peak memory "
        f"{run.peak / _GIB:.2f} GiB.",
    ]
    if layers < shape.layers:
        importance = run.phase("importance") / layers * shape.layers
        whole = importance + run.phase("enter") + run.per_layer * shape.layers
        lines.append(f"Extrapolated, not measured: all {shape.layers} layers would take {whole / 60:.0f} minutes.")
    return lines


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="middle")
    parser.add_argument("--layers", type=int, help="decoder layers (default: 3, or all with --device-memory)")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per layer of the token set")
    parser.add_argument("--recipe", default="tlq-c")
    parser.add_argument("--ranks", type=int, nargs=2, default=[1, 2], help="numbers of ranks to compare")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--device-memory", type=float, help="GiB; use one rank and samples of real size")
    parser.add_argument("--folder", type=Path, help="folder for temporary checkpoints")
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args(words)
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    shape, alone = SHAPES[arguments.shape], bool(arguments.device_memory)
    layers = arguments.layers or (shape.layers if alone else 3)
    samples = list(large_samples(arguments.samples)) if alone else demo_samples(arguments.samples)
    conditions = (
        f"{arguments.shape}: {shape}, {layers} layers with "
        f"random weights; recipe {arguments.recipe}, W3A16, {arguments.samples} samples, {arguments.tokens} tokens per "
        "layer."
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_random_model(folder / "model", replace(shape, layers=layers))
        (folder / "samples").write_bytes(pickle.dumps(samples))
        if alone:
            run = run_job(arguments, 1, folder)
            lines = device_lines(run, shape, layers, arguments.device_memory, conditions)
            write_section(arguments.docs / "scale.md", f"One device, {arguments.shape}", lines, "Scale")
            return
        runs = [run_job(arguments, ranks, folder) for _ in range(arguments.pairs) for ranks in arguments.ranks]
    write_section(arguments.docs / "scale.md", "Ranks", scaling_lines(runs, shape, conditions), "Scale")


if __name__ == "__main__":
    main()
