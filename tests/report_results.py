"""Results of a tiny pipeline for tests of the report: made-up scores, real tokens and a real checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tlq.api import quantize
from tlq.samples import Sample

BENCHMARKS = ("demo_textvqa", "demo_mmmu")
VARIANTS = ("rtn-w4a8", "tlq-w4a8")


def comparison(score: float, **more: Any) -> dict[str, Any]:
    """An entry of metrics.json."""
    return {"score": score, "low": score - 4, "high": min(score + 4, 100), "n": 50, "asked": 50, **more}


def metrics(variant: str, score: float, benchmarks: tuple[str, ...] = BENCHMARKS) -> dict[str, Any]:
    """metrics.json of a variant that scores the same on every benchmark."""
    more: dict[str, Any] = {"kl": 0.0, "nll": 0.01}
    if variant != "full":
        kept = {"retention": score / 0.98, "retention_low": score - 5, "retention_high": score + 3}
        more = {"kl": 0.1, "nll": 0.2, "pairs": 50, "lost": 9, "gained": 1, "mcnemar_p": 0.0215, **kept}
    entries = {name: comparison(score, **more) | {"skipped": 0, "parts": {}} for name in benchmarks}
    return {"variant": variant, "benchmarks": entries, "mean": comparison(score, **more)}


def write_metrics(folder: Path, benchmarks: tuple[str, ...] = BENCHMARKS) -> None:
    """evaluation/<variant>/metrics.json and scores.csv of full precision and VARIANTS."""
    for name, score in (("full", 98.0), ("rtn-w4a8", 80.0), ("tlq-w4a8", 93.5)):
        entry, out = metrics(name, score, benchmarks), folder / "evaluation" / name
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(entry))
        rows = [("mean", entry["mean"]), *entry["benchmarks"].items()]
        frame = [(name, benchmark, row["score"], row["low"], row["high"]) for benchmark, row in rows]
        columns = ["variant", "benchmark", "score", "low", "high"]
        pd.DataFrame(frame, columns=columns).to_csv(out / "scores.csv", index=False)


def write_results(folder: Path, checkpoint: Path, samples: list[Sample]) -> None:
    """Quantize ``checkpoint`` into ``folder``/models, with scores beside it and params.yaml completed."""
    for name in VARIANTS:
        recipe, scheme = name.split("-")
        quantize(checkpoint, folder / "models" / name, samples, recipe, scheme, max_tokens=512)
    write_metrics(folder)
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["variants"] = {"recipes": ["rtn", "tlq"], "schemes": ["w4a8"]}
    params["report"] = {"token_samples": 2}
    path.write_text(yaml.safe_dump(params))
