"""Quantize one checkpoint: calibrate layer by layer, keep what is finished, export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tlq.calibration.loop import LayerResult, calibrate_layers
from tlq.export.compressed_tensors import finish_checkpoint, read_layer, write_layer
from tlq.importance.token_weights import SampleWeights, TokenWeights, to_batches
from tlq.models.processor import load_processor
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks
from tlq.plan import plan_calibration, refuse_impossible
from tlq.quantization.formats import Scheme
from tlq.recipes import Recipe
from tlq.results import CalibrationReport, LayerReport
from tlq.runtime.activations import host_memory, processes_here
from tlq.runtime.files import new_directory
from tlq.runtime.memory import peak_resident
from tlq.runtime.resume import WorkFolder, data_digest, model_digest, versions
from tlq.samples import Batch, Sample, encode_batches, image_token_id


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
    checkpoint_dtype = model.checkpoint_dtype
    work = WorkFolder(out)
    batches = calibration_batches(model, samples, recipe, batch_size, max_tokens)
    needed = plan_calibration(model, batches, recipe, scheme, ranks, counted)
    refuse_impossible(needed, out, ranks.device, processes_here(), work.size())
    weights: TokenWeights = to_batches(weigh(model, batches), batches) if recipe.needs_data else {}
    with work.locked() if ranks.leads else nullcontext():
        if ranks.leads:
            work.begin(_fingerprint(model, recipe, scheme, checkpoint_dtype, batches, weights))
        reports = _calibrate_into(work, model, batches, weights, recipe, scheme, checkpoint_dtype, ranks, on_layer)
        if ranks.leads:
            with new_directory(out) as folder:
                shards = [work.part(index) for index in range(len(reports))]
                finish_checkpoint(folder, shards, model, scheme)
                layers = [LayerReport.from_dict(layer) for layer in reports]
                CalibrationReport(recipe, scheme, layers).save(folder / "calibration.json")
            work.remove()
    ranks.barrier()
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
    checkpoint_dtype: torch.dtype,
    ranks: Ranks,
    on_layer: Callable[[dict[str, Any]], None] | None,
) -> list[dict[str, Any]]:
    """Finish the layers that ``work`` does not have yet; returns the reports of all."""
    reports = work.reports() if ranks.leads else []
    done = int(ranks.broadcast(torch.tensor(len(reports), device=ranks.device), 0))

    def stored(index: int) -> LayerResult:
        return LayerResult(index, *read_layer(work.part(index), model, index, scheme), [])

    finished = {index: partial(stored, index) for index in range(done)}
    layers = len(model.architecture.decoder_layers(model.skeleton))
    name = f"{recipe.name} {scheme.name}"
    memory = host_memory(work.folder)
    results = calibrate_layers(model, batches, weights, recipe, scheme, checkpoint_dtype, ranks, finished, memory)
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
    checkpoint_dtype: torch.dtype,
    batches: Sequence[Batch],
    weights: TokenWeights,
) -> dict[str, Any]:
    """Everything that the quantized weights depend on."""
    return {
        "recipe": asdict(recipe),
        "scheme": asdict(scheme),
        "model": model_digest(model.folder),
        "dtype": str(model.dtype),
        "checkpoint_dtype": str(checkpoint_dtype),
        "data": data_digest(batches, weights),
        "versions": versions(),
    }
