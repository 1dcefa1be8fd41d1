"""Run the benchmarks on a loaded model through lm-eval and return per-item records.

lm-eval's ``evaluate`` is called and not ``simple_evaluate``, whose additional environment report takes longer than the
demo's benchmarks.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import lm_eval.api.task
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from benchmarks.chat_model import ChatLM
from benchmarks.data import BenchmarkError, BenchmarkSource, EncodedImage, Rows, Skip, choose_rows, find_rows, load_rows
from benchmarks.divergence import ItemKey
from benchmarks.items import AnswerOptions, Finished
from benchmarks.model import VisionLM
from benchmarks.results import Part
from benchmarks.streamed import Questions, StreamedLM
from benchmarks.vllm import VllmLM
from tlq.models.streaming import StreamedModel

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Item:
    """One answered item. ``score`` is in [0, 1], ``nll`` and ``kl`` in nats per answer token."""

    task: str
    doc: str
    prompt: str
    target: str
    reply: str
    score: float
    metrics: Mapping[str, float]
    n_answer_tokens: int = 0
    nll: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class BenchmarkResult:
    """The outcome of one benchmark; if ``len(items) < asked``, some items could not be scored."""

    task: str
    items: Sequence[Item]
    asked: int
    skipped: Sequence[Skip]
    parts: Mapping[str, Part]


@dataclass
class Benchmark:
    """A task ready to run: lm-eval's object, its rows and its YAML."""

    task: ConfigurableTask
    rows: Rows
    config: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Question:
    """The text and the images of an item; ``[picture 2]`` in the text is the place of the second of several images."""

    text: str
    images: Sequence[EncodedImage]


def load_benchmarks(sources: Sequence[BenchmarkSource], limit: int | None, seed: int) -> dict[str, Benchmark]:
    """Read the rows of all benchmarks before the first answer, so that a missing file stops the run at once."""
    names = [source.task for source in sources]
    if len(set(names)) != len(names):
        raise BenchmarkError(f"evaluate.benchmarks names a task twice: {', '.join(names)}")
    manager = _task_manager()
    return {source.task: _load(source, manager, limit, seed) for source in sources}


def read_questions(source: BenchmarkSource, ids: Collection[str]) -> dict[str, Question]:
    """Items of a benchmark by id; items that are missing or unusable are left out.

    Raises:
        BenchmarkError: the benchmark is unknown, or its data cannot be read.
    """
    config = _config(source, _task_manager())
    rows = find_rows(source, config, config["doc_to_target"], ids)
    return {name: _question(doc, config) for name, doc in zip(rows.ids, rows.docs, strict=True)}


def _question(doc: Mapping[str, Any], config: Mapping[str, Any]) -> Question:
    place = config["doc_to_image"]
    images = place(doc) if callable(place) else [doc[column] for column in place]
    text = config["doc_to_text"](doc)
    if len(images) == 1:
        return Question(text.removeprefix("<image>").replace("<image>", "[picture]"), images)
    numbers = count(1)
    return Question(re.sub("<image>", lambda _: f"[picture {next(numbers)}]", text), images)


def _task_manager() -> TaskManager:
    """The index of this package's benchmarks."""
    return TaskManager(include_path=str(FOLDER), include_defaults=False)


def _config(source: BenchmarkSource, manager: TaskManager) -> dict[str, Any]:
    """A benchmark's YAML, with the suffix of ``source``. Raises BenchmarkError for an unknown benchmark."""
    entry = manager.task_index.get(source.task)
    if entry is None or entry.yaml_path is None:
        raise BenchmarkError(f"unknown benchmark {source.task!r}; choose one of {', '.join(manager.all_tasks)}")
    config: dict[str, Any] = load_yaml(entry.yaml_path)
    if source.suffix is not None:
        config = config | {"doc_to_text": partial(config["doc_to_text"], suffix=source.suffix)}
    return config


def _load(source: BenchmarkSource, manager: TaskManager, limit: int | None, seed: int) -> Benchmark:
    config = _config(source, manager)
    rows = load_rows(source, config, config["doc_to_target"], limit, seed)
    split = config["test_split"]
    ready = config | {"custom_dataset": lambda **_: {split: rows}, "dataset_kwargs": None}
    task = ConfigurableTask(config=ready)
    task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed)
    return Benchmark(task, rows, config)


def run_benchmarks(
    benchmarks: Mapping[str, Benchmark],
    model: Any,
    processor: Any,
    options: AnswerOptions,
    measured_items: int | None = None,
    seed: int = 0,
) -> list[BenchmarkResult]:
    """Answer every item, score it, and measure the reference answers if ``options`` has a meter.

    Args:
        measured_items: number of reference answers to measure per benchmark, drawn with ``seed``; None for all.
    """
    answers = _answers(benchmarks, measured_items, seed)
    return run_on(VisionLM(model, processor, options, namer(benchmarks), answers), benchmarks)


def run_streamed(
    benchmarks: Mapping[str, Benchmark],
    model: StreamedModel,
    processor: Any,
    options: AnswerOptions,
    measured_items: int | None = None,
    seed: int = 0,
    folder: Path | None = None,
) -> list[BenchmarkResult]:
    """``run_benchmarks`` with a model that is read layer by layer; ``StreamedLM`` says what its replies are.

    Args:
        folder: for hidden states that exceed the host's budget.
    """
    options_of = {
        ItemKey(name, row): choices(doc)
        for name, benchmark in benchmarks.items()
        if (choices := benchmark.config["metadata"].get("choices")) is not None
        for row, doc in zip(benchmark.rows.ids, benchmark.rows.docs, strict=True)
    }
    questions = Questions(_answers(benchmarks, None, seed), set(_answers(benchmarks, measured_items, seed)), options_of)
    return run_on(StreamedLM(model, processor, options, questions, namer(benchmarks), folder), benchmarks)


def run_vllm(
    benchmarks: Mapping[str, Benchmark],
    inner: Any,
    processor: Any,
    options: AnswerOptions,
    measured_items: int | None = None,
    seed: int = 0,
) -> list[BenchmarkResult]:
    """``run_benchmarks`` with lm-eval's vLLM model ``inner``: NLL, and no KL. ``measured_items`` of 0 measures none."""
    answers = {} if measured_items == 0 else _answers(benchmarks, measured_items, seed)
    return run_on(VllmLM(inner, processor, options, namer(benchmarks), answers), benchmarks)


def namer(benchmarks: Mapping[str, Benchmark]) -> Callable[[str, int], str]:
    """A function from task and position to the row's name."""
    return lambda task, position: benchmarks[task].rows.ids[position]


def run_on(lm: ChatLM, benchmarks: Mapping[str, Benchmark]) -> list[BenchmarkResult]:
    """Answer and score every item with an lm-eval model that keeps its ``finished`` items."""
    with _without_bars_of_lm_eval():
        outcome = evaluate(
            lm,
            {"tasks": {name: benchmark.task for name, benchmark in benchmarks.items()}, "groups": {}},
            bootstrap_iters=0,
            apply_chat_template=True,
            log_samples=True,
        )
    if outcome is None:
        raise RuntimeError("lm-eval gave no results; run the evaluation in a single process")
    return [_result(name, benchmark, outcome["samples"][name], lm.finished) for name, benchmark in benchmarks.items()]


@contextmanager
def _without_bars_of_lm_eval() -> Iterator[None]:
    """Hide lm-eval's bar per task for writing prompts, which takes no time; the model has its own bar."""
    shown = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = shown


def _answers(benchmarks: Mapping[str, Benchmark], limit: int | None, seed: int) -> dict[ItemKey, str]:
    """Reference answers of the items to measure."""
    answers = {}
    for name, benchmark in benchmarks.items():
        rows = benchmark.rows
        for position in choose_rows(rows.ids, name, limit, seed):
            answers[ItemKey(name, rows.ids[position])] = benchmark.config["doc_to_target"](rows.docs[position])
    return answers


def _result(
    name: str,
    benchmark: Benchmark,
    samples: Sequence[Mapping[str, Any]],
    finished: Mapping[ItemKey, Finished],
) -> BenchmarkResult:
    """Per-item records and sub-scores; items without an answer count as skipped, not as wrong."""
    items, skipped = [], list(benchmark.rows.skipped)
    for sample in samples:
        done = finished[ItemKey(name, benchmark.rows.ids[sample["doc_id"]])]
        if done.failure is not None:
            skipped.append(Skip(done.key.doc, done.failure))
        else:
            items.append(_item(benchmark, sample, done))
    if not items:
        raise BenchmarkError(f"{name}: no item could be answered; first reason: {skipped[0].reason}")
    return BenchmarkResult(name, items, benchmark.rows.asked, skipped, _parts(items, benchmark.config["metadata"]))


def _item(benchmark: Benchmark, sample: Mapping[str, Any], done: Finished) -> Item:
    metrics = {metric: float(sample[metric]) for metric in sample["metrics"]}
    measured = done.divergence
    return Item(
        task=done.key.task,
        doc=done.key.doc,
        prompt=sample["arguments"][0][0],
        target=str(sample["target"]),
        reply=done.reply,
        score=metrics[benchmark.config["metadata"]["score"]],
        metrics=metrics,
        n_answer_tokens=measured.n_tokens if measured else 0,
        nll=measured.nll if measured else None,
        kl=measured.kl if measured else None,
    )


def _parts(items: Sequence[Item], metadata: Mapping[str, Any]) -> dict[str, Part]:
    """Every metric of a scorer except the main one, over the items that have it."""
    values: dict[str, list[float]] = {}
    for item in items:
        for metric, value in item.metrics.items():
            values.setdefault(metric, []).append(value)
    sums = set(metadata.get("sums", ()))
    return {
        metric: Part(sum(points) if metric in sums else sum(points) / len(points), len(points))
        for metric, points in sorted(values.items())
        if metric != metadata["score"]
    }
