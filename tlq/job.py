"""Quantize one checkpoint: calibrate layer by layer, keep finished layers, export."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import LayerResult, calibrate_layers
from tlq.export.compressed_tensors import finish_checkpoint, read_layer, write_layer
from tlq.importance.token_weights import TokenWeights
from tlq.models.reading import check_finite
from tlq.models.stored import source_digest
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks
from tlq.plan.needs import plan_calibration, refuse_impossible
from tlq.results import CalibrationReport, LayerReport
from tlq.runtime.activations import host_memory
from tlq.runtime.digest import calibration_data_digest
from tlq.runtime.files import new_directory
from tlq.runtime.memory import peak_resident, processes_here
from tlq.runtime.resume import ResumeState, package_versions

logger = logging.getLogger("tlq.job")


def quantize_checkpoint(
    model: StreamedModel,
    out: Path,
    job: CalibrationJob,
    weigh: Callable[[], TokenWeights] | None = None,
    counted: int | None = None,
    on_layer: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Calibrate layer by layer, export to ``out``, and write calibration.json there.

    Finished layers are kept in a folder next to ``out`` until the checkpoint is complete: after an interruption the
    same call continues. Ranks share this folder through their file system.

    Args:
        job: its scales must have the checkpoint's dtype; hidden states that exceed the host's budget go to the folder.
        weigh: computes ``job.weights`` after the job is planned, if that takes long; not called for a recipe that
            needs no data.
        counted: maximum number of tokens with a weight in a linear group, for the plan; by default from
            ``job.weights``, or all tokens if the weights are not computed yet.
        on_layer: called by the leading rank with the report of each finished layer.

    Returns:
        One report per layer: its groups' reports, seconds by phase, peak memory.

    Raises:
        BlockingIOError, ValueError: the folder next to ``out`` is in use, or belongs to a job with other parameters.
        MemoryError, OSError: this machine is too small for the job (see ``tlq.plan``).
    """
    ranks, work = job.ranks, ResumeState(out)
    needed = plan_calibration(model, job, counted)
    refuse_impossible(needed, out, ranks.device, processes_here(), work.size())
    if weigh is not None and job.needs_data:
        job = replace(job, weights=weigh())
    job = replace(job, memory=host_memory(work.folder))
    with work.locked() if ranks.leads else nullcontext():
        if ranks.leads:
            work.begin(_fingerprint(model, job))
        reports = _calibrate_into(work, model, job, on_layer)
        if ranks.leads:
            with new_directory(out) as folder:
                shards = [work.part(index) for index in range(len(reports))]
                finish_checkpoint(folder, shards, model, job.scheme)
                layers = [LayerReport.from_dict(layer) for layer in reports]
                report = CalibrationReport(job.recipe, job.scheme, layers, tuple(sorted(model.unnamed)))
                report.save(folder / "calibration.json")
            work.remove()
            if model.unnamed:
                logger.info(
                    "%d tensors that the model of transformers does not name are carried over, %s first",
                    len(model.unnamed),
                    min(model.unnamed),
                )
    ranks.barrier()
    return reports


def _calibrate_into(
    work: ResumeState, model: StreamedModel, job: CalibrationJob, on_layer: Callable[[dict[str, Any]], None] | None
) -> list[dict[str, Any]]:
    """Finish the layers that ``work`` does not have yet; returns the reports of all layers."""
    ranks, scheme = job.ranks, job.scheme
    reports = work.reports() if ranks.leads else []
    done = int(ranks.broadcast(torch.tensor(len(reports), device=ranks.device), 0))

    def stored(index: int) -> LayerResult:
        return LayerResult(index, *read_layer(work.part(index), model, index, scheme), [])

    finished = {index: partial(stored, index) for index in range(done)}
    layers = len(model.architecture.decoder_layers(model.skeleton))
    name = f"{job.recipe.name} {scheme.name}"
    results = calibrate_layers(model, job, finished)
    with tqdm(total=layers, initial=done, desc=name, unit="layer", disable=not ranks.leads) as bar:
        for result in results:
            if ranks.leads:
                with ranks.clock.phase("write"):
                    write_layer(work.part(result.index), model, result.weights, result.others, scheme)
                reports.append(_layer_report(result, ranks))
                work.finish(result.index, reports[-1])
                if on_layer is not None:
                    on_layer(reports[-1])
            error = result.reports[-1].error_after
            bar.set_postfix({} if error is None else {"error": f"{error:.3g}"}, refresh=False)
            bar.update()
            del result  # its codes would stay in memory while the next layer is solved
    return reports


def _layer_report(result: LayerResult, ranks: Ranks) -> dict[str, Any]:
    """The report of a finished layer; seconds and peaks of memory are those of the leading rank."""
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


def _fingerprint(model: StreamedModel, job: CalibrationJob) -> dict[str, Any]:
    """Everything that the quantized weights depend on."""
    return {
        "recipe": asdict(job.recipe),
        "scheme": asdict(job.scheme),
        "model": source_digest(model.folder, check_finite),
        "dtype": str(model.dtype),
        "checkpoint_dtype": str(job.quantizer.scale_dtype),
        "data": calibration_data_digest([batch.digest for batch in job.batches], job.weights),
        "versions": package_versions(),
    }
