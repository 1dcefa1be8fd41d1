"""Ablation: change one choice of TLQ at a time and measure it on held-out items of the demo, over calibration seeds.

    python -m bench.ablation --seeds 0 1 2
    python -m bench.ablation_page

Every run calibrates the model on samples drawn with its seed and measures, on the same held-out items, the KL
divergence from full precision, the NLL of the reference answers, and the score. Each result is appended to
a file of bench/results when its run ends; a run with a result is not repeated, so an interrupted study continues.
``bench.ablation_page`` writes docs/ablation.md from the results. ``--subject llava_onevision`` studies the second
model, ``--subject other_kind`` the first one on questions of other kinds than those of its calibration samples.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from bench.laboratory import BENCHMARKS, MODEL, SOURCES, Laboratory, calibration_samples
from tasks.command import quiet_libraries
from tlq.calibration.allocation import distributed, measure
from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import calibrate
from tlq.importance.gradients import score_tokens
from tlq.importance.losses import BlockLoss
from tlq.importance.pool import Importance, PoolWeights, TokenPool
from tlq.importance.token_set import TokenBudget
from tlq.importance.token_weights import all_tokens, to_batches, token_set
from tlq.importance.weighting import Weighting, loss_of
from tlq.models.architectures import input_widths
from tlq.models.streaming import ResidentModel
from tlq.quantization.allocation import Unit
from tlq.quantization.formats import Scheme, WeightQuantizer, get_scheme
from tlq.quantization.ranges import MINMAX, Ranges
from tlq.recipes import Recipe, get_recipe
from tlq.samples import Batch, Sample, encode_batches, image_token_id

logger = logging.getLogger("bench.ablation")


@dataclass(frozen=True)
class Subject:
    """A model that the study is made on.

    Attributes:
        model: its folder.
        results: file of the results.
        title: heading of its page.
        sources: kinds of the calibration samples.
        benchmarks: kinds of the held-out items.
    """

    name: str
    model: Path
    results: Path
    title: str
    sources: Sequence[str] = SOURCES
    benchmarks: Sequence[str] = BENCHMARKS


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject("qwen2_vl", MODEL, Path("bench/results/ablation.csv"), "Which choices matter"),
        Subject(
            "llava_onevision",
            Path("data/demo/llava_onevision"),
            Path("bench/results/ablation-llava_onevision.csv"),
            "Which choices matter: the second family",
        ),
        Subject(
            "other_kind",
            MODEL,
            Path("bench/results/ablation-other_kind.csv"),
            "Which choices matter: calibrated on signs and charts, tested on strings and shapes",
            ("demo-signs", "demo-chart"),
            ("ocrbench", "mmmu"),
        ),
    )
}

#: Columns that identify a run.
KEY = ("recipe", "factor", "level", "scheme", "seed")

#: Schemes at which choices are varied; the recipes' defaults are compared at every scheme.
STUDIED = ("w3a16", "w2a16")


#: Token budgets as multiples of the input width of every group.
_WIDTHS = (0.25, 0.5, 1, 2, 4, 8)


@dataclass(frozen=True)
class Choice:
    """One row of the study: a recipe and how its tokens are weighted and chosen.

    Attributes:
        factor, level: the choice that differs from the recipe's default, and its value.
        samples: size of the pool of calibration samples.
    """

    factor: str
    level: str
    recipe: Recipe
    weighting: Weighting = field(default_factory=Weighting)
    budget: TokenBudget = field(default_factory=lambda: TokenBudget(4096))
    samples: int = 256

    @property
    def name(self) -> str:
        return f"{self.recipe.name}: {self.factor} {self.level}"


def choices(base: Recipe) -> list[Choice]:
    """The default of ``base``, and every studied deviation from it."""
    scaling, uniform = base.equalization, replace(base, importance="uniform")
    budgets = [("1024", 1024), ("2048", 2048), ("8192", 8192), ("16384", 16384)]
    return [
        Choice("default", "", base),
        Choice("importance", "uniform, all tokens", replace(base, importance="uniform", tokens="all")),
        Choice("importance", "modality, all tokens", replace(base, importance="modality", tokens="all")),
        Choice("importance", "token, all tokens", replace(base, tokens="all")),
        Choice("importance", "uniform, set", uniform),
        Choice("importance", "modality, set", replace(base, importance="modality")),
        Choice("importance", "block, set", replace(base, importance="block")),
        Choice("power", "0.5", base, Weighting(power=0.5)),
        Choice("clip quantile", "1 (none)", base, Weighting(clip_quantile=1.0)),
        Choice("clip quantile", "0.9", base, Weighting(clip_quantile=0.9)),
        Choice("modality mix", "0.5", base, Weighting(modality_mix=0.5)),
        Choice("least effective", "1536", base, Weighting(least_effective=1536)),
        *(Choice("tokens per layer", level, base, budget=TokenBudget(size)) for level, size in budgets),
        *(Choice("tokens by width", f"{size}", base, budget=TokenBudget(4096, per_width=size)) for size in _WIDTHS),
        *(
            Choice("tokens by width", f"{size}, uniform", uniform, budget=TokenBudget(4096, per_width=size))
            for size in _WIDTHS
        ),
        Choice("selection", "top", base, budget=TokenBudget(4096, "top")),
        Choice("sample cap", "0.01", base, budget=TokenBudget(4096, sample_cap=0.01)),
        Choice("pool", "64 samples", base, samples=64),
        *([] if base.rounding == "nearest" else [Choice("rounding", "nearest", replace(base, rounding="nearest"))]),
        Choice("equalization", "exhaustive search", replace(base, equalization=replace(scaling, search="exhaustive"))),
        Choice("equalization", "no duo", replace(base, equalization=replace(scaling, duo=False))),
        Choice("equalization", "none", replace(base, equalization=replace(scaling, method="none"))),
        *([] if base.rounding == "nearest" else [_ranges(base, by) for by in ("ones", "moments", "pivots")]),
        Choice("inputs", "full precision", replace(base, inputs="full_precision")),
        Choice("target", "exposed inputs", replace(base, target="exposed")),
    ]


def _ranges(base: Recipe, channels: Literal["ones", "moments", "pivots"]) -> Choice:
    return Choice("ranges", f"search, {channels}", replace(base, ranges=Ranges("search", channels)))


def study() -> list[Choice]:
    """Baselines with their defaults, ``tlq`` by source of importance, ``tlq-c`` with one choice changed at a time.

    The choices of ``tlq-c`` are varied around whole ranges at every number of bits.
    """
    baselines = [Choice("default", "", get_recipe(name)) for name in ("rtn", "smoothquant", "awq", "gptq", "mbq")]
    baselines.append(Choice("text", "answers only", get_recipe("mbq"), Weighting(text="answer")))
    plain = [choice for choice in choices(get_recipe("tlq")) if choice.factor in ("default", "importance")]
    shipped = Choice("shipped", "ranges searched at 2 bits", get_recipe("tlq-c"))
    return [*baselines, *plain, *choices(replace(get_recipe("tlq-c"), ranges=MINMAX)), shipped]


def run_choice(laboratory: Laboratory, choice: Choice, scheme: str, pool: Pool, seed: int) -> dict[str, float]:
    """Calibrate a copy of the model with ``choice``, and return its score, KL, NLL and seconds."""
    model = copy.deepcopy(laboratory.model)
    weights: Mapping[Any, Any] = {}
    if choice.recipe.needs_data(pool.scheme(scheme)):
        weights = to_batches(pool.weights(choice, seed), pool.batches)
    started = time.perf_counter()
    quantizer = WeightQuantizer(pool.scheme(scheme), laboratory.checkpoint_dtype)
    calibrate(model, CalibrationJob(choice.recipe, quantizer, pool.batches, weights))
    seconds = time.perf_counter() - started
    return laboratory.measure(model, laboratory.reader) | {"seconds": round(seconds, 2)}


class Pool:
    """Calibration samples drawn with one seed, and their importance."""

    def __init__(self, laboratory: Laboratory, samples: Sequence[Sample]) -> None:
        model = laboratory.model
        self.batches: list[Batch] = encode_batches(
            samples, laboratory.processor, image_token_id(model.config), 32, 2048
        )
        self.scores: Importance = score_tokens(ResidentModel(model), self.batches)
        self.tokens = TokenPool.of(self.batches)
        self.widths = input_widths(model, ResidentModel(model).architecture)
        self._model, self._dtype = model, laboratory.checkpoint_dtype
        self._units: list[Unit] = []

    @cached_property
    def block_scores(self) -> Importance:
        """Importance by the loss of each block, which one choice uses."""
        block = BlockLoss(get_scheme("w3a16"), self._dtype)
        return score_tokens(ResidentModel(self._model), self.batches, block)

    def scheme(self, name: str) -> Scheme:
        """The scheme of this name; the budget of a mix is distributed by the importance of this pool."""
        scheme = get_scheme(name)
        if scheme.budget is None:
            return scheme
        if not self._units:
            quantizer = WeightQuantizer(scheme, self._dtype)
            job = CalibrationJob(get_recipe("rtn"), quantizer, self.batches)
            self._units = measure(ResidentModel(self._model), job, self.scores)
        return distributed(scheme, self._units, 0)

    def weights(self, choice: Choice, seed: int) -> PoolWeights:
        source = choice.recipe.importance
        scores = self.scores if loss_of(source) == "answer" else self.block_scores
        if choice.recipe.tokens == "all":
            return all_tokens(scores, self.tokens, source, choice.weighting)
        return token_set(scores, self.tokens, source, choice.weighting, choice.budget, seed, self.widths)


def run_study(subject: Subject, seeds: Sequence[int], schemes: Sequence[str], items: int, only: Sequence[str]) -> None:
    """Run every choice that has no result yet, and append its result."""
    done = finished_runs(subject)
    full = {"recipe": "full", "factor": "", "level": "", "scheme": "", "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(items, Path(folder), subject.model, subject.benchmarks)
        append_result(subject, {**full, **laboratory.full}, done)
        for seed, size, runs in remaining_runs(seeds, schemes, done, only):
            pool = Pool(laboratory, calibration_samples(size, seed, subject.sources))
            for choice, scheme in runs:
                logger.info("%s, %s, seed %d", choice.name, scheme, seed)
                measured = run_choice(laboratory, choice, scheme, pool, seed)
                append_result(subject, {**_key(choice, scheme, seed), **measured}, done)


def remaining_runs(
    seeds: Sequence[int], schemes: Sequence[str], done: set[tuple[Any, ...]], only: Sequence[str]
) -> Iterator[tuple[int, int, list[tuple[Choice, str]]]]:
    """Yield (seed, pool size, runs without a result), so that importance is scored once per pool."""
    rows = [choice for choice in study() if not only or any(_matches(choice, text) for text in only)]
    for seed in seeds:
        for size in sorted({choice.samples for choice in rows}, reverse=True):
            runs = [
                (choice, scheme)
                for choice in rows
                for scheme in schemes
                if choice.samples == size
                and (choice.factor in ("default", "shipped") or scheme in STUDIED)
                and tuple(_key(choice, scheme, seed).values()) not in done
            ]
            if runs:
                yield seed, size, runs


def _matches(choice: Choice, text: str) -> bool:
    return text == choice.recipe.name or text in choice.name


def _key(choice: Choice, scheme: str, seed: int) -> dict[str, Any]:
    return {
        "recipe": choice.recipe.name,
        "factor": choice.factor,
        "level": choice.level,
        "scheme": scheme,
        "seed": seed,
    }


def finished_runs(subject: Subject) -> set[tuple[Any, ...]]:
    """Keys of the runs that have a result."""
    if not subject.results.exists():
        return set()
    frame = pd.read_csv(subject.results, keep_default_na=False)
    return set(frame[list(KEY)].itertuples(index=False, name=None))


def append_result(subject: Subject, row: dict[str, Any], done: set[tuple[Any, ...]]) -> None:
    """Append the result of a run to the file and its key to ``done``; skip a run that has a result."""
    key = tuple(row[name] for name in KEY)
    if key in done:
        return
    subject.results.parent.mkdir(parents=True, exist_ok=True)
    columns = [*KEY, "score", "nll", "kl", "items", "seconds"]
    frame = pd.DataFrame([row]).reindex(columns=columns)
    header = not subject.results.exists()
    frame.to_csv(subject.results, mode="a", header=header, index=False, float_format="%.6g")
    done.add(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", choices=list(SUBJECTS), default="qwen2_vl", help="the model that is studied")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schemes", nargs="+", default=["w3a16", "w2a16", "w4a8"])
    parser.add_argument("--items", type=int, default=100, help="held-out items per benchmark")
    parser.add_argument(
        "--only", nargs="+", default=[], help="run only these recipes, or choices whose names contain these texts"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    run_study(SUBJECTS[arguments.subject], arguments.seeds, arguments.schemes, arguments.items, arguments.only)


if __name__ == "__main__":
    main()
