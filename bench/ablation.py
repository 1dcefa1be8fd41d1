"""Ablation: change one choice of TLQ at a time and measure it on held-out items of the demo, over calibration seeds.

    python -m bench.ablation --seeds 0 1 2
    python -m bench.ablation --summarise

Every run calibrates the model on samples drawn with its seed and measures, on the same held-out items, the KL
divergence from full precision, the NLL of the reference answers, and the score. Each result is appended to
bench/results/ablation.csv when its run ends; a run with a result is not repeated, so an interrupted study continues.
``--summarise`` writes docs/ablation.md and docs/ablation.png from the results.
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

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bench.laboratory import MODEL, WORLD, Laboratory
from tasks.command import quiet_libraries
from tasks.config.params import Columns, PrepareParams
from tasks.stages.prepare import draw, read_table
from tlq.calibration.allocation import distributed, measure
from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import calibrate
from tlq.importance.gradients import BlockLoss, score_tokens
from tlq.importance.pool import Importance, PoolWeights, TokenPool
from tlq.importance.token_set import TokenBudget
from tlq.importance.token_weights import all_tokens, to_batches, token_set
from tlq.importance.weighting import Weighting, loss_of
from tlq.models.architectures import input_widths
from tlq.models.checkpoint import checkpoint_dtype_of, read_config
from tlq.models.streaming import ResidentModel
from tlq.quantization.allocation import Unit
from tlq.quantization.formats import Scheme, WeightQuantizer, get_scheme
from tlq.quantization.ranges import MINMAX, Ranges
from tlq.recipes import Recipe, get_recipe
from tlq.samples import Batch, encode_batches, image_token_id

logger = logging.getLogger("bench.ablation")

RESULTS = Path("bench/results/ablation.csv")
DOCS = Path("docs")

#: Columns that identify a run.
_KEY = ("recipe", "factor", "level", "scheme", "seed")

#: Schemes at which choices are varied; the recipes' defaults are compared at every scheme.
_STUDIED = ("w3a16", "w2a16")


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
    if choice.recipe.needs_data:
        weights = to_batches(pool.weights(choice, seed), pool.batches)
    started = time.perf_counter()
    quantizer = WeightQuantizer(pool.scheme(scheme), checkpoint_dtype_of(read_config(MODEL), MODEL))
    calibrate(model, CalibrationJob(choice.recipe, quantizer, pool.batches, weights))
    seconds = time.perf_counter() - started
    return laboratory.measure(model, laboratory.reader) | {"seconds": round(seconds, 2)}


class Pool:
    """Calibration samples drawn with one seed, and their importance."""

    def __init__(self, laboratory: Laboratory, size: int, seed: int) -> None:
        params = PrepareParams(
            kind="parquet",
            path=str(WORLD / "calibration.parquet"),
            samples=size,
            seed=seed,
            columns=Columns(id="id", source="source"),
        )
        samples, _ = draw(*read_table(params), params)
        model = laboratory.model
        self.batches: list[Batch] = encode_batches(
            samples, laboratory.processor, image_token_id(model.config), 32, 2048
        )
        self.scores: Importance = score_tokens(ResidentModel(model), self.batches)
        self.tokens = TokenPool.of(self.batches)
        self.widths = input_widths(model, ResidentModel(model).architecture)
        self._model = model
        self._units: list[Unit] = []

    @cached_property
    def block_scores(self) -> Importance:
        """Importance by the loss of each block, which one choice uses."""
        block = BlockLoss(get_scheme("w3a16"), checkpoint_dtype_of(read_config(MODEL), MODEL))
        return score_tokens(ResidentModel(self._model), self.batches, block)

    def scheme(self, name: str) -> Scheme:
        """The scheme of this name; the budget of a mix is distributed by the importance of this pool."""
        scheme = get_scheme(name)
        if scheme.budget is None:
            return scheme
        if not self._units:
            quantizer = WeightQuantizer(scheme, checkpoint_dtype_of(read_config(MODEL), MODEL))
            job = CalibrationJob(get_recipe("rtn"), quantizer, self.batches)
            self._units = measure(ResidentModel(self._model), job, self.scores)
        return distributed(scheme, self._units, 0)

    def weights(self, choice: Choice, seed: int) -> PoolWeights:
        source = choice.recipe.importance
        scores = self.scores if loss_of(source) == "answer" else self.block_scores
        if choice.recipe.tokens == "all":
            return all_tokens(scores, self.tokens, source, choice.weighting)
        return token_set(scores, self.tokens, source, choice.weighting, choice.budget, seed, self.widths)


def run_study(seeds: Sequence[int], schemes: Sequence[str], items: int, only: Sequence[str]) -> None:
    """Run every choice that has no result yet, and append its result."""
    done = finished_runs()
    with tempfile.TemporaryDirectory() as folder:
        laboratory = Laboratory(items, Path(folder))
        append_result({"recipe": "full", "factor": "", "level": "", "scheme": "", "seed": 0, **laboratory.full}, done)
        for seed, size, runs in remaining_runs(seeds, schemes, done, only):
            pool = Pool(laboratory, size, seed)
            for choice, scheme in runs:
                logger.info("%s, %s, seed %d", choice.name, scheme, seed)
                measured = run_choice(laboratory, choice, scheme, pool, seed)
                append_result({**_key(choice, scheme, seed), **measured}, done)


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
                and (choice.factor in ("default", "shipped") or scheme in _STUDIED)
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


def finished_runs() -> set[tuple[Any, ...]]:
    """Keys of the runs that have a result."""
    if not RESULTS.exists():
        return set()
    frame = pd.read_csv(RESULTS, keep_default_na=False)
    return set(frame[list(_KEY)].itertuples(index=False, name=None))


def append_result(row: dict[str, Any], done: set[tuple[Any, ...]]) -> None:
    """Append the result of a run to the file and its key to ``done``; skip a run that has a result."""
    key = tuple(row[name] for name in _KEY)
    if key in done:
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    columns = [*_KEY, "score", "nll", "kl", "items", "seconds"]
    frame = pd.DataFrame([row]).reindex(columns=columns)
    frame.to_csv(RESULTS, mode="a", header=not RESULTS.exists(), index=False, float_format="%.6g")
    done.add(key)


def summarise() -> None:
    """Write docs/ablation.md and docs/ablation.png: means over seeds with 95 % intervals (Student's t)."""
    frame = pd.read_csv(RESULTS, keep_default_na=False).drop_duplicates(list(_KEY), keep="last")
    full, runs = frame[frame["recipe"] == "full"].iloc[0], frame[frame["recipe"] != "full"]
    runs = runs.astype({"kl": float, "nll": float, "score": float})
    table = (
        runs.assign(log_ratio=_log_ratios(runs))
        .groupby(["scheme", "recipe", "factor", "level"], sort=False)
        .agg(
            kl=("kl", "mean"),
            spread=("kl", "std"),
            ratio=("log_ratio", "mean"),
            ratio_spread=("log_ratio", "std"),
            nll=("nll", "mean"),
            score=("score", "mean"),
            seeds=("seed", "size"),
        )
        .reset_index()
    )
    order = {(choice.recipe.name, choice.factor, choice.level): place for place, choice in enumerate(study())}
    keys = zip(table["recipe"], table["factor"], table["level"], strict=True)
    table = table.assign(place=[order[key] for key in keys]).sort_values("place", kind="stable")
    spreads, seeds = table["spread"].to_numpy(float), table["seeds"].to_numpy(int)
    table["half"] = [half_width(float(spread), int(n)) for spread, n in zip(spreads, seeds, strict=True)]
    lines = [
        "# Which choices matter",
        "",
        "[All pages](README.md)",
        "",
        "The study changes one choice at a time on the demo model. KL is the divergence from full precision and NLL",
        "the negative log-likelihood of the reference answers, both in nats per answer token on "
        f"{int(full['items'])} held-out items. The",
        "score is in percent, the mean of the four demo benchmarks. All figures are means over calibration seeds;",
        "KL has its 95 % interval (Student's t). The last column compares with the recipe's default on the same seeds:",
        "it is the geometric mean of the ratios of KL with its 95 % interval, and is below 1 where the choice is",
        "better than the default. Choices of `tlq-c` are varied around whole ranges; at two bits its own default is",
        "`ranges search, moments`. `python -m bench.ablation` wrote this page. Full precision has score "
        f"{float(full['score']):.1f} and NLL {float(full['nll']):.4f}.",
    ]
    for scheme in _schemes(table):
        lines += ["", f"## {scheme.upper()}", "", "| recipe | choice | KL | NLL | score | seeds | x default |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for row in table[table["scheme"] == scheme].itertuples():
            choice = f"{row.factor} {row.level}".strip()
            lines.append(
                f"| {row.recipe} | {choice} | {row.kl:.4f}{_interval(row.half)} | {row.nll:.4f} | {row.score:.1f} "
                f"| {row.seeds} | {_ratio(row)} |"
            )
    DOCS.mkdir(exist_ok=True)
    (DOCS / "ablation.md").write_text("\n".join([*lines, "", "![KL by choice](ablation.png)", ""]))
    _draw(table).savefig(DOCS / "ablation.png", dpi=100, metadata={"Software": None})


def _schemes(table: pd.DataFrame) -> list[str]:
    """The schemes of a table; those with varied choices come first."""
    schemes = set(table["scheme"])
    return [*(name for name in _STUDIED if name in schemes), *sorted(schemes - set(_STUDIED))]


def _log_ratios(runs: pd.DataFrame) -> pd.Series:
    """log(KL of a run / KL of its recipe's default with the same scheme and seed)."""
    by = ["recipe", "scheme", "seed"]
    defaults = runs[runs["factor"] == "default"].set_index(by)["kl"].rename("default")
    return (runs["kl"] / runs.join(defaults, on=by)["default"]).map(np.log)


def _ratio(row: Any) -> str:
    if row.factor == "default":
        return ""
    half = half_width(row.ratio_spread, row.seeds)
    interval = "" if np.isnan(half) else f" ({np.exp(row.ratio - half):.2f} to {np.exp(row.ratio + half):.2f})"
    return f"{np.exp(row.ratio):.2f}{interval}"


def _interval(half: Any) -> str:
    """Half width of an interval as text; empty for a single seed."""
    return "" if np.isnan(half) else f" ± {half:.4f}"


def half_width(spread: float, seeds: int) -> float:
    """Half of the 95 % interval (Student's t) of a mean over ``seeds``; NaN for one seed."""
    from scipy.stats import t

    return float(t.ppf(0.975, seeds - 1) * spread / seeds**0.5) if seeds > 1 else float("nan")


def _draw(table: pd.DataFrame) -> Figure:
    schemes = _schemes(table)
    names = list(dict.fromkeys(_label(row) for row in table.itertuples()))
    figure = Figure(figsize=(4.2 * len(schemes) + 2, 0.24 * len(names) + 1), layout="constrained")
    panels = figure.subplots(1, len(schemes), sharey=True, squeeze=False)[0]
    for axes, scheme in zip(panels, schemes, strict=True):
        part = table[table["scheme"] == scheme]
        places = [names.index(_label(row)) for row in part.itertuples()]
        axes.errorbar(part["kl"], places, xerr=part["half"].fillna(0), fmt="o", markersize=4, capsize=2)
        axes.set_xscale("log")
        axes.set_title(str(scheme).upper())
        axes.set_xlabel("KL to full precision, nats per token")
        axes.grid(alpha=0.3)
    panels[0].set_yticks(np.arange(len(names)), names, fontsize=7)
    panels[0].invert_yaxis()
    return figure


def _label(row: Any) -> str:
    return f"{row.recipe} {row.factor} {row.level}".replace("default ", "").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--schemes", nargs="+", default=["w3a16", "w2a16", "w4a8"])
    parser.add_argument("--items", type=int, default=100, help="held-out items per benchmark")
    parser.add_argument(
        "--only", nargs="+", default=[], help="run only these recipes, or choices whose names contain these texts"
    )
    parser.add_argument("--summarise", action="store_true", help="write the table and the picture without new runs")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    if not arguments.summarise:
        run_study(arguments.seeds, arguments.schemes, arguments.items, arguments.only)
    summarise()


if __name__ == "__main__":
    main()
