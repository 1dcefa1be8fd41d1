"""A project folder with scored variants, for tests of registration: made-up answers, real comparison."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from benchmarks.compare import compare
from benchmarks.results import BenchmarkMetrics, Metrics, Part
from tasks.files import VariantName
from tlq.quantization.formats import get_scheme
from tlq.recipes import get_recipe
from tlq.results import CalibrationReport, GroupReport, LayerReport

BENCHMARKS = ("demo_textvqa", "demo_mmmu")
ITEMS = 50
PARAMS: dict[str, Any] = {
    "model": {"path": "unused"},
    "calibrate": {"overrides": {"*.layers.0.*": "full_precision"}},
    "variants": {"recipes": ["rtn"], "schemes": ["w3a16"]},
    "recipes": {"rtn": {}},
    "evaluate": {"benchmarks": [{"task": name, "data": f"world/{name}.parquet"} for name in BENCHMARKS]},
    "register": {
        "model_name": "tiny",
        "min_retention": 80.0,
        "max_flips": 20.0,
        "floors": {"demo_mmmu": 50.0},
        "min_items": ITEMS,
    },
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
    recipe, scheme = VariantName.parse(name)
    layers = [LayerReport.from_dict(layer_report(index)) for index in range(2)]
    report = CalibrationReport(get_recipe(recipe), get_scheme(scheme), layers)
    checkpoint = folder / "models" / name
    checkpoint.mkdir(parents=True, exist_ok=True)
    report.save(checkpoint / "calibration.json")
    (checkpoint / "model.safetensors").write_text(salt)
    write_scores(folder, name, right, kl)


def layer_report(index: int) -> dict[str, Any]:
    """The report of a finished layer."""
    group = GroupReport(index, "qkv", 0.5, False, 2.0 + index, 1.0, 40, 20.0, None, 0.5)
    layer = {"layer": index, "seconds": 1.5, "peak_host_bytes": 1000, "peak_device_bytes": None}
    return {**layer, "groups": [asdict(group)]}


def write_scores(folder: Path, name: str, right: int, kl: float = 0.1) -> None:
    """evaluation/<name>: of every benchmark the first ``right`` items are right."""
    items = answers(right, kl)
    full = None if name == "full" else answers(ITEMS, 0.0)
    compared = compare(items, dict.fromkeys(BENCHMARKS, ITEMS), full, 200, 0)
    mean = compared.pop("mean")
    out = folder / "evaluation" / name
    out.mkdir(parents=True, exist_ok=True)
    items.to_parquet(out / "items.parquet")
    parts = {"easy (50%)": Part(1.0, 2)}
    benchmarks = {task: BenchmarkMetrics(**asdict(entry), parts=parts) for task, entry in compared.items()}
    Metrics(name, benchmarks, mean).save(out / "metrics.json")


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
