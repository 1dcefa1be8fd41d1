"""A project folder with scored variants, for tests of registration: made-up answers, real comparison."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from benchmarks.compare import compare

BENCHMARKS = ("demo_textvqa", "demo_mmmu")
ITEMS = 50
PARAMS: dict[str, Any] = {
    "model": {"path": "unused"},
    "calibrate": {"overrides": {"*.layers.0.*": "full_precision"}},
    "variants": {"recipes": ["rtn"], "schemes": ["w3a16"]},
    "recipes": {"rtn": {}},
    "evaluate": {"benchmarks": [{"task": name, "data": f"world/{name}.parquet"} for name in BENCHMARKS]},
    "register": {"model_name": "tiny", "min_retention": 80.0, "max_flips": 20.0, "floors": {"demo_mmmu": 50.0}},
}
LOCK = """
stages:
  prepare: {outs: [{path: data/prepared, md5: aa}]}
  calibrate@rtn-w3a16: {outs: [{path: models/rtn-w3a16, md5: bb}]}
  calibrate@tlq-w3a16: {outs: [{path: models/tlq-w3a16, md5: cc}]}
"""


def write_project(folder: Path) -> None:
    """params.yaml, dvc.lock, benchmark data and the answers of full precision, all of them right."""
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    (folder / "dvc.lock").write_text(LOCK)
    (folder / "world").mkdir()
    for name in BENCHMARKS:
        pd.DataFrame({"question": [f"{name} {doc}" for doc in range(ITEMS)]}).to_parquet(
            f"{folder}/world/{name}.parquet"
        )
    write_scores(folder, "full", right=ITEMS)


def write_params(folder: Path, section: str, **changed: Any) -> None:
    """Change entries of a section of params.yaml."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params[section] |= changed
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def write_variant(folder: Path, name: str, right: int = 48, kl: float = 0.1, salt: str = "") -> None:
    """A checkpoint in name only, with two calibrated layers, and its scores; ``salt`` makes it another checkpoint."""
    recipe, scheme = name.split("-")
    report = {
        "recipe": {"name": recipe},
        "scheme": {"name": scheme, "salt": salt},
        "groups": [layer_report(index)["groups"][0] for index in range(2)],
        "layers": [{key: value for key, value in layer_report(index).items() if key != "groups"} for index in range(2)],
    }
    checkpoint = folder / "models" / name
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "calibration.json").write_text(json.dumps(report))
    write_scores(folder, name, right, kl)


def layer_report(index: int) -> dict[str, Any]:
    """What calibration tells of a finished layer."""
    group = {"layer": index, "group": "qkv", "error_before": 2.0 + index, "error_after": 1.0, "seconds": 0.5}
    return {"layer": index, "seconds": 1.5, "peak_host_bytes": 1000, "peak_device_bytes": None, "groups": [group]}


def write_scores(folder: Path, name: str, right: int, kl: float = 0.1) -> None:
    """evaluation/<name>: of every benchmark the first ``right`` items are right."""
    items = answers(right, kl)
    full = None if name == "full" else answers(ITEMS, 0.0)
    compared = compare(items, dict.fromkeys(BENCHMARKS, ITEMS), full, 200, 0)
    entries = {task: _known(asdict(each)) for task, each in compared.items()}
    mean = entries.pop("mean")
    out = folder / "evaluation" / name
    out.mkdir(parents=True, exist_ok=True)
    items.to_parquet(out / "items.parquet")
    parts = {"easy (50%)": {"value": 1.0, "n": 2}}
    benchmarks = {task: entry | {"skipped": 0, "parts": parts} for task, entry in entries.items()}
    (out / "metrics.json").write_text(json.dumps({"variant": name, "benchmarks": benchmarks, "mean": mean}))


def answers(right: int, kl: float) -> pd.DataFrame:
    rows = [
        {
            "task": task,
            "doc": str(doc),
            "target": f"word {doc}",
            "reply": f"word {doc}" if doc < right else "?",
            "score": float(doc < right),
            "n_answer_tokens": 2,
            "nll": 0.2,
            "kl": kl,
        }
        for task in BENCHMARKS
        for doc in range(ITEMS)
    ]
    return pd.DataFrame(rows)


def _known(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if value is not None}
