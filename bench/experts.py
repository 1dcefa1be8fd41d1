"""Recipes on a model with experts: KL divergence from full precision on held-out items of the demo, over seeds.

    python -m bench.experts --seeds 0 1 2

The model is the demo's of the class qwen3_vl_moe, with experts in place of every MLP (``demo/qwen3_moe.py``). It is not
part of the repository. These commands make it, in about 70 minutes on one CPU core, and continue if interrupted:

    python -m demo.train --family qwen3_vl_moe --stage vision --minutes 9 --work build/moe --decoder data/demo/model
    python -m demo.train --family qwen3_vl_moe --stage decoder --minutes 60 --images 32 --work build/moe \
        --decoder data/demo/model
    python -m demo.export --family qwen3_vl_moe --checkpoint build/moe/decoder.pt --out build/moe/model --megabytes 30

Each result is appended to bench/results/experts.csv when its run ends, and a run with a result is not repeated. The
last step writes docs/experts.md.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedModel

from bench.ablation_page import half_width
from bench.laboratory import Laboratory, calibration_samples
from bench.sections import table, write_section
from demo.qwen3_moe import ACTIVE, EXPERTS
from tasks.command import quiet_libraries
from tlq.calibration import streams
from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import calibrate
from tlq.importance.gradients import score_tokens
from tlq.importance.pool import Importance, PoolWeights, TokenPool
from tlq.importance.token_set import TokenBudget
from tlq.importance.token_weights import all_tokens, to_batches, token_set, uniform_tokens
from tlq.importance.weighting import Weighting
from tlq.models.linear_groups import is_expert
from tlq.models.streaming import ResidentModel
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import Recipe, get_recipe
from tlq.samples import Batch, encode_batches, image_token_id

logger = logging.getLogger("bench.experts")

MODEL = Path("build/moe/model")
RESULTS = Path("bench/results/experts.csv")
PAGE = Path("docs/experts.md")
BUDGET = TokenBudget(1024)
FULL = "full precision"
COLUMNS = (
    *("run", "seed", "scheme", "samples", "seconds", "effective_tokens", "fewest_tokens", "given_further"),
    *("score", "nll", "kl", "items"),
)


@dataclass(frozen=True)
class Run:
    """A row of the study.

    Attributes:
        weigh: (importance, tokens of the pool, seed) -> token weights; None for a recipe that needs no data.
        least: multiple of the width below which an expert gets further tokens.
    """

    name: str
    recipe: Recipe
    weigh: Callable[[Importance, TokenPool, int], PoolWeights] | None
    least: float = streams.LEAST_TOKENS


def _own(scores: Importance, pool: TokenPool, seed: int) -> PoolWeights:
    return token_set(scores, pool, "token", Weighting(), BUDGET, seed)


def _shared(scores: Importance, pool: TokenPool, seed: int) -> PoolWeights:
    together = {key: values for key, values in scores.items() if not is_expert(key[1])}
    return token_set(together, pool, "token", Weighting(), BUDGET, seed)


def _uniform(scores: Importance, pool: TokenPool, seed: int) -> PoolWeights:
    return token_set(scores, pool, "uniform", Weighting(), BUDGET, seed)


def _every(scores: Importance, pool: TokenPool, _seed: int) -> PoolWeights:
    return uniform_tokens(scores, pool)


def _modality(scores: Importance, pool: TokenPool, _seed: int) -> PoolWeights:
    return all_tokens(scores, pool, "modality", Weighting())


RUNS = (
    Run("rtn", get_recipe("rtn"), None),
    Run("gptq", get_recipe("gptq"), _every),
    Run("mbq", get_recipe("mbq"), _modality),
    Run("tlq", get_recipe("tlq"), _own),
    Run("tlq-c", get_recipe("tlq-c"), _own),
    Run("tlq-c, no further tokens", get_recipe("tlq-c"), _own, 0.0),
    Run("tlq-c, experts share one token set", get_recipe("tlq-c"), _shared),
    Run("tlq-c, uniform token set", get_recipe("tlq-c"), _uniform),
)


def calibration_batches(laboratory: Laboratory, size: int, seed: int) -> list[Batch]:
    """Samples drawn with a seed, as micro-batches."""
    return encode_batches(
        calibration_samples(size, seed), laboratory.processor, image_token_id(laboratory.model.config), 32, 2048
    )


def run_study(folder: Path, seeds: Sequence[int], samples: int, items: int, scheme: str) -> None:
    """Run what has no result yet, and append each result."""
    done: set[tuple[str, int]] = set()
    if RESULTS.exists():
        done = set(pd.read_csv(RESULTS)[["run", "seed"]].itertuples(index=False, name=None))
    with tempfile.TemporaryDirectory() as work:
        laboratory = Laboratory(items, Path(work), folder)
        model, quantizer = laboratory.model, WeightQuantizer(get_scheme(scheme), laboratory.checkpoint_dtype)
        full = {"run": FULL, "seed": 0, "scheme": scheme, "samples": samples, **laboratory.full}
        if (FULL, 0) not in done:
            append(full)
        for seed in seeds:
            batches = calibration_batches(laboratory, samples, seed)
            scores = score_tokens(ResidentModel(model), batches)
            for run in (run for run in RUNS if (run.name, seed) not in done):
                quantized, found = calibrated(model, run, quantizer, scores, batches, seed)
                measured = laboratory.measure(quantized, laboratory.reader)
                row = {"run": run.name, "seed": seed, "scheme": scheme, "samples": samples, **found, **measured}
                append(row)


def append(row: dict[str, Any]) -> None:
    """Append the result of a run to the file of results."""
    logger.info("%s", row)
    frame = pd.DataFrame([row]).reindex(columns=COLUMNS)
    frame.to_csv(RESULTS, mode="a", header=not RESULTS.exists(), index=False, float_format="%.6g")


def calibrated(
    model: PreTrainedModel,
    run: Run,
    quantizer: WeightQuantizer,
    scores: Importance,
    batches: Sequence[Batch],
    seed: int,
) -> tuple[PreTrainedModel, dict[str, float | None]]:
    """A quantized copy of the model, seconds, and effective tokens of its experts' groups."""
    started = time.perf_counter()
    weights = {} if run.weigh is None else to_batches(run.weigh(scores, TokenPool.of(batches), seed), batches)
    quantized, usual = copy.deepcopy(model), streams.LEAST_TOKENS
    streams.LEAST_TOKENS = run.least
    try:
        reports = calibrate(quantized, CalibrationJob(run.recipe, quantizer, batches, weights)).reports
    finally:
        streams.LEAST_TOKENS = usual
    experts = [report for report in reports if is_expert(report.group)]
    tokens = [report.effective_tokens for report in experts if report.effective_tokens is not None]
    return quantized, {
        "seconds": round(time.perf_counter() - started, 1),
        "effective_tokens": float(np.median(tokens)) if tokens else None,
        "fewest_tokens": min(tokens, default=None),
        "given_further": sum(report.further_tokens > 0 for report in experts) / len(experts),
    }


def summarise() -> None:
    """Write docs/experts.md: means over seeds with 95 % intervals, and ratios to ``tlq-c`` on the same seeds."""
    frame = pd.read_csv(RESULTS)
    ours = frame[frame["run"] == "tlq-c"].set_index("seed")["kl"]
    rows = []
    for run in RUNS:
        part = frame[frame["run"] == run.name]
        ratio = np.log(part["kl"].to_numpy() / ours.loc[part["seed"]].to_numpy())
        low, high = (np.exp(ratio.mean() + side * half_width(float(ratio.std(ddof=1)), len(ratio))) for side in (-1, 1))
        rows.append(
            {
                "run": run.name,
                "KL": f"{part['kl'].mean():.4f} ± {half_width(float(part['kl'].std(ddof=1)), len(part)):.4f}",
                "ratio to tlq-c": ""
                if run.name == "tlq-c"
                else f"{np.exp(ratio.mean()):.2f} ({low:.2f} to {high:.2f})",
                "score, %": f"{part['score'].mean():.1f}",
                "effective tokens of an expert, median": _number(part["effective_tokens"].mean()),
                "fewest": _number(part["fewest_tokens"].mean()),
                "given further tokens, %": f"{100 * part['given_further'].mean():.0f}",
                "seconds": f"{part['seconds'].mean():.0f}",
            }
        )
    full = frame[frame["run"] == FULL].iloc[0]
    text = (
        f"A model of the class qwen3_vl_moe, trained on the demo world with {EXPERTS} experts in every layer, {ACTIVE} "
        "for each token. Attention and embeddings began with those of the demo model; tower, routers and experts were "
        f"trained from random weights. Full precision has score {full['score']:.1f} and NLL {full['nll']:.4f}. "
        f"{full['scheme'].upper()}, {full['samples']} calibration samples, token sets of {BUDGET.tokens_per_layer}; "
        f"means over {frame['seed'].nunique()} calibration seeds with 95 % intervals (Student's t). "
        f"KL is in nats per answer token, on {full['items']} held-out items; ratios are geometric means over the same "
        "seeds, and one whose interval contains 1 shows no difference. "
        "`python -m bench.experts` wrote this section."
    )
    write_section(PAGE, "Recipes", [text, "", *table(rows)], "Experts in figures")


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--items", type=int, default=40, help="items of each benchmark")
    parser.add_argument("--scheme", default="w3a16")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", stream=sys.stderr)
    quiet_libraries()
    run_study(arguments.model, arguments.seeds, arguments.samples, arguments.items, arguments.scheme)
    summarise()
    return 0


if __name__ == "__main__":
    sys.exit(main())
