"""Quantize a checkpoint from Python, without the pipeline.

from tlq.api import quantize
quantize("Qwen2-VL-2B-Instruct", "Qwen2-VL-2B-Instruct-w3a16", samples, recipe="tlq", scheme="w3a16")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tlq.importance.gradients import AnswerLoss, BlockLoss, score_resumably
from tlq.importance.pool import PoolWeights, TokenPool
from tlq.importance.token_set import TokenBudget
from tlq.importance.token_weights import all_tokens, token_set, uniform_tokens
from tlq.importance.weighting import Weighting, loss_of
from tlq.job import quantize_checkpoint
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks
from tlq.plan import plan_importance, refuse_impossible
from tlq.quantization.formats import Scheme, get_scheme
from tlq.recipes import Recipe, get_recipe
from tlq.runtime.resume import ResumeState
from tlq.samples import Batch, Sample


def quantize(
    model_dir: str | Path,
    out_dir: str | Path,
    calibration: Sequence[Sample],
    recipe: str | Recipe = "tlq",
    scheme: str | Scheme = "w3a16",
    *,
    weighting: Weighting | None = None,
    budget: TokenBudget | None = None,
    seed: int = 0,
    batch_size: int = 8,
    max_tokens: int = 4096,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Quantize the decoder of ``model_dir`` and write a checkpoint that transformers and vLLM load to ``out_dir``.

    Decoder layers are read from disk one at a time. After an interruption the same call continues.

    Args:
        calibration: samples, the pool that token importance is scored on; may be empty for `rtn`.
        recipe, scheme: names or rows, see ``tlq.recipes`` and ``tlq.quantization.formats``.
        weighting, budget, seed: how importance becomes weights, and how the token-level set is drawn.
        batch_size: samples per micro-batch.
        max_tokens: longest sample allowed.

    Returns:
        One report per layer, as ``quantize_checkpoint``.

    Raises:
        FileExistsError: ``out_dir`` is not empty.
        ValueError, FloatingPointError: see ``tlq.calibration.loop.calibrate`` and ``tlq.samples.encode_batches``.
    """
    out = Path(out_dir)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: not empty; remove it or choose another out_dir")
    row = get_recipe(recipe) if isinstance(recipe, str) else recipe
    number_format = get_scheme(scheme) if isinstance(scheme, str) else scheme

    model = StreamedModel(model_dir, dtype, device)
    budget = budget or TokenBudget(4096)
    scoring = ResumeState(out.with_name(f"{out.name}-importance"))

    def weigh(model: StreamedModel, batches: Sequence[Batch]) -> PoolWeights:
        return _weights(model, batches, row, number_format, weighting or Weighting(), budget, seed, scoring)

    counted = budget.tokens_per_layer if row.tokens == "set" else None
    with scoring.locked():
        reports = quantize_checkpoint(
            model, out, calibration, row, number_format, weigh, batch_size, max_tokens, counted=counted
        )
        scoring.remove()
    return reports


def _weights(
    model: StreamedModel,
    batches: Sequence[Batch],
    recipe: Recipe,
    scheme: Scheme,
    weighting: Weighting,
    budget: TokenBudget,
    seed: int,
    scoring: ResumeState,
) -> PoolWeights:
    """What the stages importance and calibset would hand to calibration."""
    pool = TokenPool.of(batches)
    if recipe.importance == "uniform" and recipe.tokens == "all":
        layers = range(len(model.architecture.decoder_layers(model.skeleton)))
        keys = [(layer, group.name) for layer in layers for group in model.architecture.groups]
        return uniform_tokens(keys, pool)
    loss = BlockLoss(scheme, model.checkpoint_dtype) if loss_of(recipe.importance) == "block" else AnswerLoss()
    alone = Ranks(device=model.device)
    refuse_impossible(plan_importance(model, batches, alone), scoring.folder, alone.device, 1, scoring.size())
    scores = score_resumably(model, batches, loss, scoring, alone)
    if recipe.tokens == "set":
        return token_set(scores, pool, recipe.importance, weighting, budget, seed)
    return all_tokens(scores, pool, recipe.importance, weighting)
