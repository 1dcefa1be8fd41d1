"""Stage `evaluate`: score a checkpoint on the benchmarks and compare it with full precision.

    python -m tasks.stages.evaluate --variant full
    python -m tasks.stages.evaluate --variant tlq-w3a16

Reads models/<variant>, or `model.path` for `full`, and for a variant also evaluation/full. Writes evaluation/<variant>:

- metrics.json: per benchmark and their mean: score, interval, retention, flips, KL, NLL, items asked and scored, parts;
- summary.json: the few numbers that `dvc metrics show` puts in one row;
- items.parquet: every item with prompt, target, reply, score, answer tokens, NLL and KL;
- scores.csv: for `dvc plots`; skipped.csv: items that were asked for and not scored, with reasons;
- reference/ (of `full`): log-probabilities of the reference answers.
"""

import hashlib
import json
import logging
import shutil
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.compare import FULL, Comparison, compare
from benchmarks.data import BenchmarkError
from benchmarks.divergence import AnswerMeter, ReferenceReader, ReferenceRecorder
from benchmarks.harness import Benchmark, BenchmarkResult, load_benchmarks, namer, run_benchmarks, run_on
from benchmarks.journal import Journal
from benchmarks.vllm import WrappedLM, load_vllm
from tasks.cluster.launch import on_ranks
from tasks.config.params import EvaluateParams, ModelParams, section
from tasks.registry.tracking import recorded_failure
from tasks.stages.command import command_line, device
from tasks.stages.files import EVALUATION, MODELS
from tlq.models.checkpoint import load_model
from tlq.models.processor import load_processor

logger = logging.getLogger(__name__)

RAW_COLUMNS = ("task", "doc", "prompt", "target", "reply", "score", "n_answer_tokens", "nll", "kl")


def evaluate_variant(
    variant: str, model_path: str, params: EvaluateParams, results: Path = EVALUATION
) -> dict[str, Any]:
    """Evaluate the checkpoint at `model_path` as `variant`; returns what metrics.json holds."""
    full = None if variant == FULL else _read_full(results)
    benchmarks = load_benchmarks(params.benchmarks, params.limit, params.seed)
    working = results / ".working" / variant
    journal = Journal(working, _fingerprint(model_path, params, benchmarks))
    outcome = _answer(variant, model_path, params, benchmarks, journal, results)
    _check_skipped(outcome, params.max_skipped)
    items = _items(outcome)
    asked = {result.task: result.asked for result in outcome}
    compared = compare(items, asked, full, params.resamples, params.seed)
    metrics = _metrics(variant, outcome, compared)
    _write(working, results / variant, metrics, items, outcome)
    return metrics


def _answer(
    variant: str,
    model_path: str,
    params: EvaluateParams,
    benchmarks: Mapping[str, Benchmark],
    journal: Journal,
    results: Path,
) -> list[BenchmarkResult]:
    """Answer what the journal does not hold yet, with the backend asked for."""
    if params.backend == "vllm":
        logger.warning("Backend vllm measures no reference answers: no NLL, no KL.")
        inner = load_vllm(model_path, params.dtype, _pixel_bounds(params))
        lm = WrappedLM(
            inner,
            namer(benchmarks),
            max_new_tokens=params.max_new_tokens,
            finished=journal.read(),
            on_batch=journal.add,
        )
        return run_on(lm, benchmarks)
    return run_benchmarks(
        benchmarks,
        load_model(model_path, dtype=_dtype(params.dtype), device=device()),
        load_processor(model_path, **_pixel_bounds(params)),
        _batch_size(params),
        max_new_tokens=params.max_new_tokens,
        meter=_meter(variant, params, results, journal.folder),
        measured_items=params.divergence_limit,
        seed=params.seed,
        finished=journal.read(),
        on_batch=journal.add,
    )


def _read_full(results: Path) -> pd.DataFrame:
    path = results / FULL / "items.parquet"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `python -m tasks.stages.evaluate --variant {FULL}` first.")
    return pd.read_parquet(path)


def _meter(variant: str, params: EvaluateParams, results: Path, working: Path) -> AnswerMeter | None:
    if not params.divergence:
        return None
    if variant == FULL:
        return ReferenceRecorder(working / "reference")
    return ReferenceReader(results / FULL / "reference")


def _dtype(name: str) -> torch.dtype | str:
    return name if name == "auto" else getattr(torch, name)


def _batch_size(params: EvaluateParams) -> int:
    if params.batch_size == "auto":
        return 256 if device().type == "cuda" else 32
    return params.batch_size


def _pixel_bounds(params: EvaluateParams) -> dict[str, int]:
    bounds = {"min_pixels": params.min_pixels, "max_pixels": params.max_pixels}
    return {name: value for name, value in bounds.items() if value is not None}


def _fingerprint(model_path: str, params: EvaluateParams, benchmarks: Mapping[str, Benchmark]) -> str:
    """Changes with params, rows asked, or the model's files (by size and time: hashing 70B weights takes minutes)."""
    folder = Path(model_path)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    parts = [model_path, repr(params)]
    parts += [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    parts += [f"{name} {benchmark.rows.ids}" for name, benchmark in benchmarks.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _check_skipped(outcome: Sequence[BenchmarkResult], most: float) -> None:
    for result in outcome:
        share = len(result.skipped) / (len(result.skipped) + len(result.items))
        if share > most:
            raise BenchmarkError(
                f"{result.task}: {len(result.skipped)} items ({share:.0%}) are unusable, more than "
                f"evaluate.max_skipped = {most:.0%}. First: {result.skipped[0].doc}: {result.skipped[0].reason}."
            )


def _items(outcome: Sequence[BenchmarkResult]) -> pd.DataFrame:
    records = [{column: getattr(item, column) for column in RAW_COLUMNS} for result in outcome for item in result.items]
    frame = pd.DataFrame.from_records(records, columns=list(RAW_COLUMNS))
    return frame.astype({"score": float, "n_answer_tokens": int, "nll": float, "kl": float})


def _metrics(variant: str, outcome: Sequence[BenchmarkResult], compared: Mapping[str, Comparison]) -> dict[str, Any]:
    benchmarks = {}
    for result in outcome:
        parts = {name: {"value": round(part.value, 4), "n": part.n} for name, part in result.parts.items()}
        benchmarks[result.task] = _rounded(compared[result.task]) | {
            "skipped": len(result.skipped),
            "empty_replies": sum(not item.reply.strip() for item in result.items),
            "parts": parts,
        }
    return {"variant": variant, "benchmarks": benchmarks, "mean": _rounded(compared["mean"])}


def _rounded(comparison: Comparison) -> dict[str, Any]:
    """Fields that have a value: percentages to hundredths, nats and p-values to six places."""
    fine = ("nll", "kl", "mcnemar_p")
    return {
        name: round(value, 6 if name in fine else 2) if isinstance(value, float) else value
        for name, value in asdict(comparison).items()
        if value is not None
    }


def _summary(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """One readable row of `dvc metrics show`."""
    mean = metrics["mean"]
    scores = {name: entry["score"] for name, entry in metrics["benchmarks"].items()}
    row = {"score": mean["score"], **scores}
    row |= {name: mean[name] for name in ("retention", "kl", "nll") if name in mean}
    return row | {
        "n": mean["n"],
        "skipped": sum(entry["skipped"] for entry in metrics["benchmarks"].values()),
    }


def _write(
    working: Path,
    out: Path,
    metrics: Mapping[str, Any],
    items: pd.DataFrame,
    outcome: Sequence[BenchmarkResult],
) -> None:
    """Write everything beside the answers in progress, then put the whole folder in place at once."""
    ready = working / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    (ready / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    (ready / "summary.json").write_text(json.dumps(_summary(metrics), indent=2) + "\n")
    items.to_parquet(ready / "items.parquet", index=False)
    rows = [("mean", metrics["mean"]), *metrics["benchmarks"].items()]
    scores = [(metrics["variant"], name, entry["score"], entry["low"], entry["high"]) for name, entry in rows]
    pd.DataFrame(scores, columns=["variant", "benchmark", "score", "low", "high"]).to_csv(
        ready / "scores.csv", index=False
    )
    skipped = [(result.task, skip.doc, skip.reason) for result in outcome for skip in result.skipped]
    pd.DataFrame(skipped, columns=["task", "doc", "reason"]).to_csv(ready / "skipped.csv", index=False)
    if (working / "reference").is_dir():
        (working / "reference").rename(ready / "reference")
    shutil.rmtree(out, ignore_errors=True)
    ready.rename(out)
    shutil.rmtree(working)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--variant", required=True, help=f"{FULL}, or a folder of {MODELS}/ such as tlq-w3a16")


def main(variant: str) -> None:
    on_ranks("tasks.stages.evaluate", ["--variant", variant], lambda: evaluate(variant), most=1)


def evaluate(variant: str) -> None:
    """Score one variant."""
    params = section("evaluate", EvaluateParams)
    path = section("model", ModelParams).path if variant == FULL else str(MODELS / variant)
    with recorded_failure("evaluate", variant):
        if variant != FULL and not Path(path).is_dir():
            raise FileNotFoundError(f"{path}: not found; run the calibrate stage of {variant} first")
        metrics = evaluate_variant(variant, path, params)
    mean = metrics["mean"]
    logger.info("%s: mean score %.1f over %d items", variant, mean["score"], mean["n"])


if __name__ == "__main__":
    command_line(main, __doc__, add_options)
