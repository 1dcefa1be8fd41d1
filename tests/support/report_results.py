"""Results of a tiny pipeline for tests of the report: made-up scores, real tokens and a real checkpoint."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import yaml

from benchmarks.results import BenchmarkMetrics, Comparison, EvaluationRun, Metrics
from support.benchmark_rows import mmmu_rows, textvqa_rows, write_rows
from tlq.api import quantize
from tlq.samples import Sample

BENCHMARKS = ("demo_textvqa", "demo_mmmu")
VARIANTS = ("rtn-w4a8", "tlq-w4a8")
#: Items of each benchmark, and by variant those that are wrong.
ITEMS = 6
WRONG = {
    "full": {"demo_textvqa": {5}, "demo_mmmu": set()},
    "rtn-w4a8": {"demo_textvqa": {0, 1, 2}, "demo_mmmu": {1, 3}},
    "tlq-w4a8": {"demo_textvqa": {1, 5}, "demo_mmmu": set()},
}
RUNS = {
    "full": EvaluationRun("2026-11-26T23:58:01Z", "NVIDIA H100", "hf", 12, 4.0, 3_000_000_000),
    "rtn-w4a8": EvaluationRun("2026-11-27T06:24:42Z", "NVIDIA H100", "hf", 12, 5.0, 2_000_000_000),
    "tlq-w4a8": EvaluationRun("2026-11-27T00:00:00Z", "CPU", "vllm", 0, 0.5, None),
}


def metrics(variant: str, score: float, benchmarks: tuple[str, ...] = BENCHMARKS) -> Metrics:
    """Metrics of a variant that scores the same on every benchmark."""
    mean = Comparison(score, score - 4, min(score + 4, 100), n=50, asked=50, kl=0.0, nll=0.01)
    if variant != "full":
        kept = {"retention": score / 0.98, "retention_low": score - 5, "retention_high": score + 3}
        mean = replace(
            mean, kl=0.1, kl_low=0.0712, kl_high=0.1345, nll=0.2, pairs=50, lost=9, gained=1, mcnemar_p=0.0215, **kept
        )
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


def write_items(folder: Path) -> None:
    """evaluation/<variant>/items.parquet and run.json, and the benchmarks' data in world/."""
    rows = {"demo_textvqa": textvqa_rows(ITEMS), "demo_mmmu": mmmu_rows(ITEMS)}
    ids = {"demo_textvqa": "question_id", "demo_mmmu": "id"}
    (folder / "world").mkdir(exist_ok=True)
    for task, docs in rows.items():
        write_rows(folder / "world" / f"{task}.parquet", docs)
    for variant, run in RUNS.items():
        items = [
            {
                "task": task,
                "doc": str(doc[ids[task]]),
                "prompt": f"<|im_start|>user\n{doc['question']}<|im_end|>",
                "target": f"word {index}",
                "reply": f"{variant} says <{index}>" if index in WRONG[variant][task] else f"word {index}",
                "score": float(index not in WRONG[variant][task]),
            }
            for task, docs in rows.items()
            for index, doc in enumerate(docs)
        ]
        pd.DataFrame(items).to_parquet(folder / "evaluation" / variant / "items.parquet")
        run.save(folder / "evaluation" / variant / "run.json")


def write_results(folder: Path, checkpoint: Path, samples: list[Sample]) -> None:
    """Quantize ``checkpoint`` into ``folder``/models, with its scores and params.yaml completed."""
    for name in VARIANTS:
        recipe, scheme = name.split("-")
        quantize(checkpoint, folder / "models" / name, samples, recipe, scheme, max_tokens=512)
    write_metrics(folder)
    write_items(folder)
    path = folder / "params.yaml"
    params = yaml.safe_load(path.read_text())
    params["variants"] = {"recipes": ["rtn", "tlq"], "schemes": ["w4a8"]}
    params["report"] = {"token_samples": 2, "changed_answers": 2}
    params["evaluate"] = {"benchmarks": [{"task": name, "data": f"world/{name}.parquet"} for name in BENCHMARKS]}
    params["register"] = {"model_name": "tiny", "min_retention": 90, "min_items": None, "floors": {"demo_mmmu": 85}}
    path.write_text(yaml.safe_dump(params))
