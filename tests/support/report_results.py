"""Results of a tiny pipeline for tests of the report: made-up scores, real tokens and a real checkpoint."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import yaml

from benchmarks.results import BenchmarkMetrics, Comparison, Metrics
from tlq.api import quantize
from tlq.samples import Sample

BENCHMARKS = ("demo_textvqa", "demo_mmmu")
VARIANTS = ("rtn-w4a8", "tlq-w4a8")


def metrics(variant: str, score: float, benchmarks: tuple[str, ...] = BENCHMARKS) -> Metrics:
    """Metrics of a variant that scores the same on every benchmark."""
    mean = Comparison(score, score - 4, min(score + 4, 100), n=50, asked=50, kl=0.0, nll=0.01)
    if variant != "full":
        kept = {"retention": score / 0.98, "retention_low": score - 5, "retention_high": score + 3}
        mean = replace(mean, kl=0.1, nll=0.2, pairs=50, lost=9, gained=1, mcnemar_p=0.0215, **kept)
    return Metrics(variant, {name: BenchmarkMetrics(**asdict(mean)) for name in benchmarks}, mean)


def write_metrics(folder: Path, benchmarks: tuple[str, ...] = BENCHMARKS) -> None:
    """evaluation/<variant>/metrics.json and scores.csv of full precision and VARIANTS."""
    for name, score in (("full", 98.0), ("rtn-w4a8", 80.0), ("tlq-w4a8", 93.5)):
        content, out = metrics(name, score, benchmarks), folder / "evaluation" / name
        out.mkdir(parents=True, exist_ok=True)
        content.save(out / "metrics.json")
        frame = [(name, benchmark, entry.score, entry.low, entry.high) for benchmark, entry in content.entries]
        columns = ["variant", "benchmark", "score", "low", "high"]
        pd.DataFrame(frame, columns=columns).to_csv(out / "scores.csv", index=False)


def write_results(folder: Path, checkpoint: Path, samples: list[Sample]) -> None:
    """Quantize ``checkpoint`` into ``folder``/models, with its scores and params.yaml completed."""
    for name in VARIANTS:
        recipe, scheme = name.split("-")
        quantize(checkpoint, folder / "models" / name, samples, recipe, scheme, max_tokens=512)
    write_metrics(folder)
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["variants"] = {"recipes": ["rtn", "tlq"], "schemes": ["w4a8"]}
    params["report"] = {"token_samples": 2}
    path.write_text(yaml.safe_dump(params))
