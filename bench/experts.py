"""Recipes on a model with experts: KL divergence from full precision on held-out items of the demo, over seeds.

    python -m bench.experts --seeds 0 1 2

The model is the trained demo model with every MLP replaced by experts that are copies of it, and by a router whose rows
are the centres of clusters of the MLP's inputs. The output stays that of the demo model, which is known to be good,
while every expert sees, and is calibrated on, only the tokens of its clusters. Each result is appended to
bench/results/experts.csv when its run ends, and a run with a result is not repeated. The last step writes
docs/experts.md.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bench.ablation_page import half_width
from bench.laboratory import MODEL, WORLD, Laboratory
from bench.sections import table, write_section
from tasks.command import quiet_libraries
from tasks.config.sections import Columns, PrepareParams
from tasks.stages.prepare import draw, read_table
from tlq.calibration import streams
from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import calibrate
from tlq.importance.gradients import score_tokens
from tlq.importance.pool import Importance, PoolWeights, TokenPool
from tlq.importance.token_set import TokenBudget
from tlq.importance.token_weights import all_tokens, to_batches, token_set, uniform_tokens
from tlq.importance.weighting import Weighting
from tlq.models.architectures import architecture_of
from tlq.models.checkpoint import checkpoint_dtype_of, read_config
from tlq.models.decoder import to_device
from tlq.models.experts import SeparateExperts
from tlq.models.linear_groups import is_expert
from tlq.models.streaming import ResidentModel
from tlq.models.text_decoders import DECODERS, Experts
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import Recipe, get_recipe
from tlq.samples import Batch, encode_batches, image_token_id

logger = logging.getLogger("bench.experts")

RESULTS = Path("bench/results/experts.csv")
PAGE = Path("docs/experts.md")
EXPERTS, ACTIVE = 8, 2
BUDGET = TokenBudget(1024)


class Mixture(nn.Module):
    """Experts that are copies of an MLP, and a router [experts, hidden]."""

    def __init__(self, mlp: Any, router: Tensor) -> None:
        super().__init__()
        self.gate = nn.Linear(router.shape[1], len(router), bias=False)
        self.gate.weight = nn.Parameter(router)
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        copies = {"gate_up_proj": gate_up, "down_proj": mlp.down_proj.weight}
        copies = {name: weight.repeat(len(router), 1, 1) for name, weight in copies.items()}
        self.experts = SeparateExperts(SimpleNamespace(act_fn=mlp.act_fn, **copies))

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(ACTIVE)
        output: Tensor = self.experts(flat, chosen, weights / weights.sum(-1, keepdim=True))
        return output.view(hidden_states.shape)


@contextmanager
def decoder_with_experts() -> Iterator[None]:
    """The demo's decoder has experts during the context."""
    before = DECODERS["qwen2_vl_text"]
    DECODERS["qwen2_vl_text"] = replace(
        before, experts=Experts("mlp.experts", ("mlp.gate",), None, lambda _text: EXPERTS)
    )
    try:
        yield
    finally:
        DECODERS["qwen2_vl_text"] = before


@torch.no_grad()
def with_experts(model: PreTrainedModel, batches: Sequence[Batch]) -> PreTrainedModel:
    """A copy of the model with experts; ``batches`` are the data of the clusters."""
    mixed = copy.deepcopy(model)
    layers = architecture_of(mixed.config).decoder_layers(mixed)
    inputs: list[list[Tensor]] = [[] for _ in layers]
    handles = [
        layer.get_submodule("mlp").register_forward_pre_hook(
            lambda _module, args, kept=kept: kept.append(args[0].flatten(0, 1))
        )
        for layer, kept in zip(layers, inputs, strict=True)
    ]
    for batch in batches:
        mixed(**to_device(batch.encode(), mixed.device, mixed.dtype), use_cache=False)
    for handle in handles:
        handle.remove()
    for layer, kept in zip(layers, inputs, strict=True):
        layer.mlp = Mixture(layer.get_submodule("mlp"), clusters(torch.cat(kept)))
    return mixed.requires_grad_(False)


def clusters(points: Tensor, rounds: int = 20) -> Tensor:
    """Centres [experts, hidden] of spherical k-means, scaled so that the router's softmax is soft."""
    directions = nn.functional.normalize(points, dim=-1)
    chosen = torch.randperm(len(directions), generator=torch.Generator().manual_seed(0))[:EXPERTS]
    centres = directions[chosen.to(points.device)]
    for _ in range(rounds):
        nearest = (directions @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, directions)
        centres = nn.functional.normalize(torch.where(sums.any(1, keepdim=True), sums, centres), dim=-1)
    return 8 * centres / points.norm(dim=-1).mean()


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
    columns = Columns(id="id", source="source")
    path = str(WORLD / "calibration.parquet")
    params = PrepareParams(kind="parquet", path=path, samples=size, seed=seed, columns=columns)
    samples, _ = draw(*read_table(params), params)
    return encode_batches(samples, laboratory.processor, image_token_id(laboratory.model.config), 32, 2048)


def run_study(seeds: Sequence[int], samples: int, items: int, scheme: str) -> None:
    """Run what has no result yet, and append each result."""
    done: set[tuple[str, int]] = set()
    if RESULTS.exists():
        done = set(pd.read_csv(RESULTS)[["run", "seed"]].itertuples(index=False, name=None))
    quantizer = WeightQuantizer(get_scheme(scheme), checkpoint_dtype_of(read_config(MODEL), MODEL))
    with tempfile.TemporaryDirectory() as folder, decoder_with_experts():
        laboratory = Laboratory(items, Path(folder))
        model = with_experts(laboratory.model, calibration_batches(laboratory, samples, seed=1000))
        kept = laboratory.measure(model, laboratory.reader)
        logger.info("KL of the model with experts before quantization: %.2g", kept["kl"])
        for seed in seeds:
            batches = calibration_batches(laboratory, samples, seed)
            scores = score_tokens(ResidentModel(model), batches)
            for run in (run for run in RUNS if (run.name, seed) not in done):
                quantized, found = calibrated(model, run, quantizer, scores, batches, seed)
                measured = laboratory.measure(quantized, laboratory.reader)
                row = {"run": run.name, "seed": seed, "scheme": scheme, "samples": samples, **found, **measured}
                logger.info("%s", row)
                frame = pd.DataFrame([row])
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
    seeds, items = frame["seed"].nunique(), int(frame["items"].iloc[0])
    scheme = frame["scheme"].iloc[0].upper()
    scheme, samples = frame["scheme"].iloc[0].upper(), frame["samples"].iloc[0]
    text = (
        f"The trained demo model with {EXPERTS} experts in every layer, {ACTIVE} for each token: copies of its MLP "
        "after a router of clusters, so that full precision is the demo model's own, and every expert sees only its "
        f"tokens. It is no model whose experts were trained apart. {scheme}, {samples} calibration samples, token "
        f"sets of {BUDGET.tokens_per_layer}; means over {seeds} calibration seeds with 95 % intervals (Student's t). "
        f"KL is in nats per answer token, on {items} held-out items; ratios are geometric means over the same seeds, "
        "and one whose interval contains 1 shows no difference. "
        "`python -m bench.experts` wrote this section."
    )
    write_section(PAGE, "Recipes", [text, "", *table(rows)], "Experts in figures")


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--items", type=int, default=40, help="items of each benchmark")
    parser.add_argument("--scheme", default="w3a16")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", stream=sys.stderr)
    quiet_libraries()
    run_study(arguments.seeds, arguments.samples, arguments.items, arguments.scheme)
    summarise()
    return 0


if __name__ == "__main__":
    sys.exit(main())
