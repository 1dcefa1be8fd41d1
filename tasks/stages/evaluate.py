"""Stage `evaluate`: score a checkpoint on the benchmarks and compare it with full precision.

    python -m tasks.stages.evaluate --variant full
    python -m tasks.stages.evaluate --variant tlq-w3a16

Reads models/<variant>, or `model.path` for `full`; a variant also needs evaluation/full. Writes evaluation/<variant>:

- metrics.json: per benchmark and their mean: score, interval, retention, flips, KL, NLL, numbers of items, parts;
- summary.json: the main numbers, one row of `dvc metrics show`;
- items.parquet: every item with prompt, target, reply, score, answer tokens, NLL and KL;
- run.json: date, device, seconds and peak memory of the evaluation;
- scores.csv: for `dvc plots`; skipped.csv: chosen items that were not scored, with reasons;
- reference/ (of `full`): log-probabilities of the reference answers.
"""

import hashlib
import logging
import shutil
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch

from benchmarks.compare import FULL, compare
from benchmarks.data import BenchmarkError
from benchmarks.divergence import AnswerMeter, ReferenceReader, ReferenceRecorder
from benchmarks.harness import (
    Benchmark,
    BenchmarkResult,
    load_benchmarks,
    run_benchmarks,
    run_streamed,
    run_vllm,
)
from benchmarks.items import AnswerOptions
from benchmarks.journal import Journal
from benchmarks.results import BenchmarkMetrics, Comparison, EvaluationRun, Metrics, Part
from benchmarks.vllm import load_vllm
from tasks.cluster.launch import shared_by_ranks
from tasks.command import command_line, device
from tasks.config.params import section
from tasks.config.sections import EvaluateParams, ModelParams
from tasks.files import EVALUATION, MODELS, existing
from tasks.registry.tracking import recorded_failure
from tlq.export.loading import load_model
from tlq.export.streamed import open_model
from tlq.models.processor import load_processor
from tlq.runtime.digest import kept_digests
from tlq.runtime.files import link_or_copy, new_directory
from tlq.runtime.memory import peak_resident

logger = logging.getLogger("tlq.evaluate")

#: Files of an evaluation, in evaluation/<variant>/.
RESULTS = ("items.parquet", "metrics.json", "reference", "run.json", "scores.csv", "skipped.csv", "summary.json")
RAW_COLUMNS = ("task", "doc", "prompt", "target", "reply", "score", "n_answer_tokens", "nll", "kl")


def evaluate_variant(variant: str, model_path: str, params: EvaluateParams, results: Path = EVALUATION) -> Metrics:
    """Evaluate the checkpoint at ``model_path`` as ``variant``; returns the content of metrics.json."""
    full = None if variant == FULL else _read_full(results)
    benchmarks = load_benchmarks(params.benchmarks, params.limit, params.seed)
    working = results / ".working" / variant
    journal = Journal(working, _fingerprint(model_path, params, benchmarks))
    answered_before = sum(item.failure is None for item in journal.read().values())
    outcome, seconds = _answer(variant, model_path, params, benchmarks, journal, results)
    _check_skipped(outcome, params.max_skipped)
    items = _items(outcome)
    asked = {result.task: result.asked for result in outcome}
    compared = compare(items, asked, full, params.resamples, params.seed)
    metrics = _metrics(variant, outcome, compared)
    run = _run(params.backend, len(items) - answered_before, seconds)
    _write(working, results / variant, metrics, items, outcome, run)
    return metrics


def _answer(
    variant: str,
    model_path: str,
    params: EvaluateParams,
    benchmarks: Mapping[str, Benchmark],
    journal: Journal,
    results: Path,
) -> tuple[list[BenchmarkResult], float]:
    """Answer the items that are not in the journal yet, with the backend of ``params``; returns results and seconds."""
    processor = load_processor(model_path, **_pixel_bounds(params))
    if params.backend == "vllm":
        logger.warning("backend vllm measures NLL, but no KL")
        inner = load_vllm(model_path, params.dtype, _pixel_bounds(params))
        options = AnswerOptions(
            _batch_size(params), params.max_new_tokens, finished=journal.read(), on_batch=journal.add
        )
        measured = params.divergence_limit if params.divergence else 0
        started = time.perf_counter()
        outcome = run_vllm(benchmarks, inner, processor, options, measured, params.seed)
        return outcome, time.perf_counter() - started
    meter = _meter(variant, params, results, journal.folder)
    finished = journal.read()
    if isinstance(meter, ReferenceRecorder):
        finished = meter.recorded(finished)
    options = AnswerOptions(_batch_size(params), params.max_new_tokens, meter, finished=finished, on_batch=journal.add)
    if params.backend == "streamed":
        started = time.perf_counter()
        streamed = open_model(model_path, params.dtype, device())
        outcome = run_streamed(
            benchmarks, streamed, processor, options, params.divergence_limit, params.seed, journal.folder
        )
        return outcome, time.perf_counter() - started
    model = load_model(model_path, dtype=_dtype(params.dtype), device=device())
    started = time.perf_counter()
    outcome = run_benchmarks(benchmarks, model, processor, options, params.divergence_limit, params.seed)
    return outcome, time.perf_counter() - started


def _run(backend: str, items: int, seconds: float) -> EvaluationRun:
    """The record of a run that ends now."""
    place, peak = device(), None
    if backend != "vllm":  # which allocates its memory in another process, and before it needs it
        peak = torch.cuda.max_memory_allocated(place) if place.type == "cuda" else peak_resident()
    return EvaluationRun(
        finished=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        device=torch.cuda.get_device_name(place) if place.type == "cuda" else place.type.upper(),
        backend=backend,
        items=items,
        seconds=round(seconds, 3),
        peak_memory_bytes=peak,
    )


def _read_full(results: Path) -> pd.DataFrame:
    return pd.read_parquet(existing(results / FULL / "items.parquet", "baseline"))


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
        if params.backend == "streamed":  # a wave has many micro-batches, and a layer of a large model is large
            return 8
        return 256 if device().type == "cuda" else 32
    return params.batch_size


def _pixel_bounds(params: EvaluateParams) -> dict[str, int]:
    bounds = {"min_pixels": params.min_pixels, "max_pixels": params.max_pixels}
    return {name: value for name, value in bounds.items() if value is not None}


def _fingerprint(model_path: str, params: EvaluateParams, benchmarks: Mapping[str, Benchmark]) -> str:
    """Digest of params, of the chosen rows with their images, and of every byte of the model's files."""
    folder = Path(model_path)
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    digests = kept_digests(files, folder.with_name(f".{folder.resolve().name}.sha256.json"))
    parts = [model_path, repr(params)]
    parts += [f"{name} {digest}" for name, digest in sorted(digests.items()) if name != "README.md"]
    parts += [f"{name} {benchmark.rows.digest()}" for name, benchmark in benchmarks.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _check_skipped(outcome: Sequence[BenchmarkResult], most: float) -> None:
    for result in outcome:
        share = len(result.skipped) / (len(result.skipped) + len(result.items))
        if share > most:
            raise BenchmarkError(
                f"{result.task}: {len(result.skipped)} items ({share:.0%}) are unusable, more than "
                f"evaluate.max_skipped = {most:.0%}; first: {result.skipped[0].doc}: {result.skipped[0].reason}"
            )


def _items(outcome: Sequence[BenchmarkResult]) -> pd.DataFrame:
    records = [{column: getattr(item, column) for column in RAW_COLUMNS} for result in outcome for item in result.items]
    frame = pd.DataFrame.from_records(records, columns=list(RAW_COLUMNS))
    return frame.astype({"score": float, "n_answer_tokens": int, "nll": float, "kl": float})


def _metrics(variant: str, outcome: Sequence[BenchmarkResult], compared: Mapping[str, Comparison]) -> Metrics:
    benchmarks = {
        result.task: BenchmarkMetrics(
            **asdict(compared[result.task].rounded()),
            skipped=len(result.skipped),
            empty_replies=sum(not item.reply.strip() for item in result.items),
            parts={name: Part(round(part.value, 4), part.n) for name, part in result.parts.items()},
        )
        for result in outcome
    }
    return Metrics(variant, benchmarks, compared["mean"].rounded())


def _write(
    working: Path,
    out: Path,
    metrics: Metrics,
    items: pd.DataFrame,
    outcome: Sequence[BenchmarkResult],
    run: EvaluationRun,
) -> None:
    """Replace ``out`` by a complete folder of results, then remove the answers in progress."""
    with new_directory(out) as folder:
        metrics.save(folder / "metrics.json")
        metrics.summary().save(folder / "summary.json")
        run.save(folder / "run.json")
        items.to_parquet(folder / "items.parquet", index=False)
        scores = [(metrics.variant, name, entry.score, entry.low, entry.high) for name, entry in metrics.entries]
        columns = ["variant", "benchmark", "score", "low", "high"]
        pd.DataFrame(scores, columns=columns).to_csv(folder / "scores.csv", index=False)
        skipped = [(result.task, skip.doc, skip.reason) for result in outcome for skip in result.skipped]
        pd.DataFrame(skipped, columns=["task", "doc", "reason"]).to_csv(folder / "skipped.csv", index=False)
        if (working / "reference").is_dir():  # it stays in the journal until the results are in place
            (folder / "reference").mkdir()
            for part in sorted((working / "reference").glob("*.safetensors")):
                link_or_copy(part, folder / "reference" / part.name)
        _keep_own_files(out, folder)
    shutil.rmtree(working)


def _keep_own_files(old: Path, new: Path) -> None:
    """Carry over what no evaluation wrote: only the files of ``RESULTS`` are DVC's, the folder is the user's too."""
    for each in sorted(old.iterdir()) if old.is_dir() else ():
        if each.name in RESULTS:
            continue
        if each.is_dir() and not each.is_symlink():
            shutil.copytree(each, new / each.name, symlinks=True)
        else:
            shutil.copy2(each, new / each.name, follow_symlinks=False)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--variant", required=True, help=f"{FULL}, or a folder of {MODELS}/ such as tlq-w3a16")


@shared_by_ranks("tasks.stages.evaluate", most=1)
def main(variant: str) -> None:
    """Score one variant."""
    params = section("evaluate", EvaluateParams)
    path = section("model", ModelParams).path if variant == FULL else str(MODELS / variant)
    with recorded_failure("evaluate", variant):
        if variant != FULL:
            existing(Path(path), f"calibrate@{variant}")
        metrics = evaluate_variant(variant, path, params)
    logger.info("%s: mean score %.1f over %d items", variant, metrics.mean.score, metrics.mean.n)


if __name__ == "__main__":
    command_line(main, __doc__, add_options)
