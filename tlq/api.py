"""Quantize a checkpoint from Python, without the pipeline.

from tlq.api import quantize
quantize("Qwen2-VL-2B-Instruct", "Qwen2-VL-2B-Instruct-w3a16", samples, recipe="tlq", scheme="w3a16")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tlq.architectures import architecture_of
from tlq.calibrate import Calibrated, calibrate
from tlq.checkpoint import export_checkpoint, load_model, read_config, storage_dtype
from tlq.importance import Weighting
from tlq.processor import load_processor
from tlq.quantizer import Scheme, get_scheme
from tlq.recipes import Recipe, get_recipe
from tlq.samples import Batch, Sample, encode_batches, image_token_id, token_rows
from tlq.scoring import score_tokens
from tlq.streaming import ResidentModel
from tlq.tokens import TokenBudget
from tlq.weights import SampleWeights, TokenWeights, all_tokens, lay_out, token_set, uniform_tokens


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
) -> Calibrated:
    """Quantize the decoder of ``model_dir`` and write a checkpoint that transformers and vLLM load to ``out_dir``.

    Args:
        calibration: samples, the pool that token importance is scored on; may be empty for `rtn`.
        recipe, scheme: names or rows, see ``tlq.recipes`` and ``tlq.quantizer``.
        weighting, budget, seed: how importance becomes weights, and how the token-level set is drawn.
        batch_size: samples per micro-batch.
        max_tokens: longest sample allowed.

    Raises:
        FileExistsError: ``out_dir`` is not empty.
        ValueError, FloatingPointError: see ``tlq.calibrate.calibrate`` and ``tlq.samples.encode_batches``.
    """
    out = Path(out_dir)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: not empty; remove it or choose another out_dir")
    row = get_recipe(recipe) if isinstance(recipe, str) else recipe
    number_format = get_scheme(scheme) if isinstance(scheme, str) else scheme

    def weigh(model: PreTrainedModel, batches: Sequence[Batch]) -> SampleWeights:
        return _weights(model, batches, row, weighting or Weighting(), budget or TokenBudget(4096), seed)

    return quantize_checkpoint(
        model_dir, out, calibration, row, number_format, weigh, batch_size, max_tokens, dtype, device
    )


def quantize_checkpoint(
    source: str | Path,
    out: Path,
    samples: Sequence[Sample],
    recipe: Recipe,
    scheme: Scheme,
    weigh: Callable[[PreTrainedModel, Sequence[Batch]], SampleWeights],
    batch_size: int,
    max_tokens: int,
    dtype: torch.dtype | str,
    device: torch.device | str,
) -> Calibrated:
    """Load, calibrate, export to ``out``, and write calibration.json there.

    Args:
        weigh: gives the weights of every token that counts, from the full-precision model and the encoded samples;
            not called for a recipe that needs no data.
    """
    model = load_model(source, dtype, device)
    batches: list[Batch] = []
    weights: TokenWeights = {}
    if recipe.needs_data:
        processor = load_processor(source)
        batches = encode_batches(samples, processor, image_token_id(model.config), batch_size, max_tokens)
        weights = lay_out(weigh(model, batches), batches)
    storage = storage_dtype(read_config(source))
    calibrated = calibrate(model, batches, weights, recipe, scheme, storage)
    out.mkdir(parents=True, exist_ok=True)
    export_checkpoint(source, model, calibrated.weights, scheme, out)
    report = {"recipe": asdict(recipe), "scheme": asdict(scheme), "groups": calibrated.report_rows()}
    (out / "calibration.json").write_text(json.dumps(report, indent=1) + "\n")
    return calibrated


def _weights(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    recipe: Recipe,
    weighting: Weighting,
    budget: TokenBudget,
    seed: int,
) -> SampleWeights:
    """What the stages importance and calibset would hand to calibration."""
    architecture = architecture_of(model.config)
    marks = {sample: batch.is_image[row, batch.valid[row]].numpy() for sample, row, batch in token_rows(batches)}
    is_image = [marks[sample] for sample in sorted(marks)]
    if recipe.importance == "uniform" and recipe.tokens == "all":
        layers = range(len(architecture.decoder_layers(model)))
        return uniform_tokens([(layer, group.name) for layer in layers for group in architecture.groups], is_image)
    scores = score_tokens(ResidentModel(model), batches, len(is_image))
    if recipe.tokens == "set":
        return token_set(scores, is_image, recipe.importance, weighting, budget, seed)
    return all_tokens(scores, is_image, recipe.importance, weighting)
