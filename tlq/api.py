"""Quantize a checkpoint from Python, without the pipeline.

from tlq.api import quantize
quantize("Qwen2-VL-2B-Instruct", "Qwen2-VL-2B-Instruct-w3a16", samples, recipe="tlq", scheme="w3a16")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tlq.activations import host_memory, processes_here
from tlq.calibrate import LayerResult, calibrate_layers
from tlq.export import finish_checkpoint, read_layer, write_layer
from tlq.files import new_directory, write_text
from tlq.importance import Weighting, loss_of
from tlq.memory import peak_resident
from tlq.plan import plan_calibration, plan_importance, refuse_impossible
from tlq.processor import load_processor
from tlq.quantizer import Scheme, get_scheme
from tlq.ranks import Ranks
from tlq.recipes import Recipe, get_recipe
from tlq.samples import Batch, Sample, encode_batches, image_token_id, sequences_of
from tlq.scoring import AnswerLoss, BlockLoss, score_resumably
from tlq.state import WorkFolder, data_digest, model_digest, versions
from tlq.streaming import StreamedModel
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
) -> list[dict[str, Any]]:
    """Quantize the decoder of ``model_dir`` and write a checkpoint that transformers and vLLM load to ``out_dir``.

    Decoder layers are read from disk one at a time. After an interruption the same call continues.

    Args:
        calibration: samples, the pool that token importance is scored on; may be empty for `rtn`.
        recipe, scheme: names or rows, see ``tlq.recipes`` and ``tlq.quantizer``.
        weighting, budget, seed: how importance becomes weights, and how the token-level set is drawn.
        batch_size: samples per micro-batch.
        max_tokens: longest sample allowed.

    Returns:
        One report per layer, as ``quantize_checkpoint``.

    Raises:
        FileExistsError: ``out_dir`` is not empty.
        ValueError, FloatingPointError: see ``tlq.calibrate.calibrate`` and ``tlq.samples.encode_batches``.
    """
    out = Path(out_dir)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out}: not empty; remove it or choose another out_dir")
    row = get_recipe(recipe) if isinstance(recipe, str) else recipe
    number_format = get_scheme(scheme) if isinstance(scheme, str) else scheme

    model = StreamedModel(model_dir, dtype, device)
    budget = budget or TokenBudget(4096)
    scoring = WorkFolder(out.with_name(f"{out.name}-importance"))

    def weigh(model: StreamedModel, batches: Sequence[Batch]) -> SampleWeights:
        return _weights(model, batches, row, number_format, weighting or Weighting(), budget, seed, scoring)

    counted = budget.tokens_per_layer if row.tokens == "set" else None
    with scoring.locked():
        reports = quantize_checkpoint(
            model, out, calibration, row, number_format, weigh, batch_size, max_tokens, counted=counted
        )
        scoring.remove()
    return reports


def quantize_checkpoint(
    model: StreamedModel,
    out: Path,
    samples: Sequence[Sample],
    recipe: Recipe,
    scheme: Scheme,
    weigh: Callable[[StreamedModel, Sequence[Batch]], SampleWeights],
    batch_size: int,
    max_tokens: int,
    ranks: Ranks | None = None,
    on_layer: Callable[[dict[str, Any]], None] | None = None,
    counted: int | None = None,
) -> list[dict[str, Any]]:
    """Calibrate layer by layer, export to ``out``, and write calibration.json there.

    What is finished is kept in a folder beside ``out`` until all is: after an interruption the same call continues.

    Args:
        weigh: gives the weights of every token that counts, from the full-precision model and the encoded samples;
            not called for a recipe that needs no data.
        ranks: this process's place in a group that shares the work and a file system; alone without it.
        on_layer: called by the leading rank with the report of each layer as it is finished.
        counted: most tokens whose error counts in a linear group, where that is known before ``weigh`` is called; the
            job is planned with it.

    Returns:
        One report per layer: its groups' reports, seconds by phase, peak memory.

    Raises:
        BlockingIOError, ValueError: the folder beside ``out`` is in use, or was begun with other choices.
        MemoryError, OSError: this machine cannot do it (see ``tlq.plan``).
    """
    ranks = ranks or Ranks(device=model.device)
    storage = model.storage
    work = WorkFolder(out)
    batches = calibration_batches(model, samples, recipe, batch_size, max_tokens)
    needed = plan_calibration(model, batches, recipe, scheme, ranks, counted)
    refuse_impossible(needed, out, ranks.device, processes_here(), work.size())
    weights: TokenWeights = lay_out(weigh(model, batches), batches) if recipe.needs_data else {}
    with work.locked() if ranks.leads else nullcontext():
        if ranks.leads:
            work.begin(_fingerprint(model, recipe, scheme, storage, batches, weights))
        reports = _calibrate_into(work, model, batches, weights, recipe, scheme, storage, ranks, on_layer)
        if ranks.leads:
            with new_directory(out) as folder:
                shards = [work.part(index) for index in range(len(reports))]
                finish_checkpoint(folder, shards, model, scheme)
                report = {
                    "recipe": asdict(recipe),
                    "scheme": asdict(scheme),
                    "groups": [group for layer in reports for group in layer["groups"]],
                    "layers": [{name: layer[name] for name in layer if name != "groups"} for layer in reports],
                }
                write_text(json.dumps(report, indent=1) + "\n", folder / "calibration.json")
            work.remove()
    ranks.wait()
    return reports


def calibration_batches(
    model: StreamedModel, samples: Sequence[Sample], recipe: Recipe, batch_size: int, max_tokens: int
) -> list[Batch]:
    """The samples as the recipe sees them: encoded, or none of them for one that needs no data."""
    if not recipe.needs_data:
        return []
    processor = load_processor(model.folder)
    return encode_batches(samples, processor, image_token_id(model.config), batch_size, max_tokens)


def _calibrate_into(
    work: WorkFolder,
    model: StreamedModel,
    batches: Sequence[Batch],
    weights: TokenWeights,
    recipe: Recipe,
    scheme: Scheme,
    storage: torch.dtype,
    ranks: Ranks,
    on_layer: Callable[[dict[str, Any]], None] | None,
) -> list[dict[str, Any]]:
    """Finish the layers that ``work`` does not have yet; returns the reports of all."""
    reports = work.reports() if ranks.leads else []
    done = int(ranks.share(torch.tensor(len(reports), device=ranks.device), 0))

    def stored(index: int) -> LayerResult:
        return LayerResult(index, *read_layer(work.part(index), model, index, scheme), [])

    finished = {index: partial(stored, index) for index in range(done)}
    layers = len(model.architecture.decoder_layers(model.skeleton))
    name = f"{recipe.name} {scheme.name}"
    memory = host_memory(work.folder)
    results = calibrate_layers(model, batches, weights, recipe, scheme, storage, ranks, finished, memory)
    with tqdm(total=layers, initial=done, desc=name, unit="layer", disable=not ranks.leads) as bar:
        for result in results:
            if ranks.leads:
                with ranks.clock.phase("write"):
                    write_layer(work.part(result.index), model, result.weights, result.others, scheme)
                reports.append(_layer_report(result, ranks))
                work.finish_layer(result.index, reports[-1])
                if on_layer is not None:
                    on_layer(reports[-1])
            error = result.reports[-1].error_after
            bar.set_postfix({} if error is None else {"error": f"{error:.3g}"}, refresh=False)
            bar.update()
    return reports


def _layer_report(result: LayerResult, ranks: Ranks) -> dict[str, Any]:
    """What is kept of a finished layer beside its weights; times and peaks of memory are the leading rank's."""
    phases = ranks.clock.take()
    host = peak_resident()
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
    return {
        "layer": result.index,
        "seconds": round(sum(phases.values()), 3),
        "phases": phases,
        "ranks": ranks.size,
        "peak_host_bytes": host,
        "peak_device_bytes": device,
        "groups": [{**asdict(report), "peak_memory_bytes": device or host} for report in result.reports],
    }


def _fingerprint(
    model: StreamedModel,
    recipe: Recipe,
    scheme: Scheme,
    storage: torch.dtype,
    batches: Sequence[Batch],
    weights: TokenWeights,
) -> dict[str, Any]:
    """Everything that the quantized weights depend on."""
    return {
        "recipe": asdict(recipe),
        "scheme": asdict(scheme),
        "model": model_digest(model.folder),
        "dtype": str(model.dtype),
        "storage": str(storage),
        "data": data_digest(batches, weights),
        "versions": versions(),
    }


def _weights(
    model: StreamedModel,
    batches: Sequence[Batch],
    recipe: Recipe,
    scheme: Scheme,
    weighting: Weighting,
    budget: TokenBudget,
    seed: int,
    scoring: WorkFolder,
) -> SampleWeights:
    """What the stages importance and calibset would hand to calibration."""
    sequences = sequences_of(batches)
    is_image, is_answer = sequences.is_image, sequences.is_answer
    if recipe.importance == "uniform" and recipe.tokens == "all":
        layers = range(len(model.architecture.decoder_layers(model.skeleton)))
        keys = [(layer, group.name) for layer in layers for group in model.architecture.groups]
        return uniform_tokens(keys, is_image)
    loss = BlockLoss(scheme, model.storage) if loss_of(recipe.importance) == "block" else AnswerLoss()
    alone = Ranks(device=model.device)
    refuse_impossible(plan_importance(model, batches, alone), scoring.folder, alone.device, 1, scoring.size())
    scores = score_resumably(model, batches, len(is_image), loss, scoring, alone)
    if recipe.tokens == "set":
        return token_set(scores, is_image, recipe.importance, weighting, budget, seed, is_answer)
    return all_tokens(scores, is_image, recipe.importance, weighting, is_answer)
