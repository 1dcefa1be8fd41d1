"""Quantize a checkpoint from Python, without the pipeline."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch

from tlq.calibration.allocation import distributed, measure
from tlq.calibration.job import CalibrationJob
from tlq.export.engines import check_engine, mixed_by
from tlq.export.model_card import write_card
from tlq.importance.gradients import score_resumably
from tlq.importance.losses import AnswerLoss, BlockLoss
from tlq.importance.pool import Importance, PoolWeights, TokenPool
from tlq.importance.token_set import TokenBudget
from tlq.importance.token_weights import (
    TokenWeights,
    all_tokens,
    to_batches,
    token_set,
    uniform_tokens,
)
from tlq.importance.weighting import LossName, Weighting, loss_of
from tlq.job import quantize_checkpoint
from tlq.models.architectures import input_widths
from tlq.models.batches import calibration_batches
from tlq.models.checkpoint import checkpoint_dtype_of, local_folder, read_config
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks
from tlq.plan.duration import time_allocation, time_calibration, time_importance
from tlq.plan.needs import (
    Plan,
    most_counted,
    outside_bytes,
    plan_allocation,
    plan_calibration,
    plan_importance,
    refuse_impossible,
)
from tlq.plan.speed import Probe, speed_for
from tlq.quantization.formats import Scheme, WeightQuantizer, get_scheme
from tlq.recipes import Recipe, get_recipe
from tlq.runtime.device import check_dtype, device_named
from tlq.runtime.files import check_new_folder
from tlq.runtime.resume import ResumeState
from tlq.samples import Sample

logger = logging.getLogger("tlq.api")


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of ``quantize``; every field is also a keyword of ``quantize``.

    Attributes:
        weighting: map from importance to token weights.
        budget: size and selection of the token-level calibration set.
        seed: seed of the draw of that set.
        batch_size: samples per micro-batch.
        max_tokens: longest sample allowed.
        dtype: dtype of the computation; ``auto`` is the checkpoint's dtype on a GPU and float32 on a CPU.
        device: compute device; None takes the GPU if there is one.
        engine: inference engine that will serve the result (a name of ``tlq.export.engines``); a scheme that it does
            not run is refused before any work.
    """

    weighting: Weighting = Weighting()
    budget: TokenBudget = TokenBudget(4096)
    seed: int = 0
    batch_size: int = 8
    max_tokens: int = 4096
    dtype: torch.dtype | str = "auto"
    device: torch.device | str | None = None
    engine: str | None = None

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        for name, least in {"batch_size": 1, "max_tokens": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")

    def place(self, model: str | Path) -> tuple[torch.device, torch.dtype | str]:
        """Device and dtype for a checkpoint directory or hub id.

        Raises: as ``read_config``.
        """
        device = device_named(self.device or ("cuda" if torch.cuda.is_available() else "cpu"), "device")
        if self.dtype != "auto":
            return device, self.dtype
        if device.type == "cpu":
            return device, torch.float32
        return device, checkpoint_dtype_of(read_config(model), local_folder(model))

    def open_model(self, model: str | Path) -> StreamedModel:
        """Open a checkpoint directory or hub id. Raises: as ``StreamedModel``."""
        device, dtype = self.place(model)
        return StreamedModel(model, dtype, device)


class Options(TypedDict, total=False):
    """The fields of ``CalibrationOptions`` as keywords."""

    weighting: Weighting
    budget: TokenBudget
    seed: int
    batch_size: int
    max_tokens: int
    dtype: torch.dtype | str
    device: torch.device | str | None
    engine: str | None


@dataclass(frozen=True)
class QuantizationReport:
    """The result of ``quantize``.

    Attributes:
        folder: the checkpoint, with its processor, ``calibration.json`` and a model card.
        layers: one report per decoder layer, as ``tlq.job.quantize_checkpoint`` returns them.
        seconds: wall-clock time of the call.
    """

    folder: Path
    layers: list[dict[str, Any]]
    seconds: float

    @property
    def groups(self) -> list[dict[str, Any]]:
        """One report per linear group, layer after layer: exponent, errors before and after, tokens."""
        return [group for layer in self.layers for group in layer["groups"]]

    def __str__(self) -> str:
        return f"{self.folder}: {len(self.layers)} layers quantized in {self.seconds:.0f} s"


def quantize(
    model: str | Path,
    out: str | Path,
    samples: Sequence[Sample] = (),
    recipe: str | Recipe = "tlq-c",
    scheme: str | Scheme = "w4a16",
    **options: Unpack[Options],
) -> QuantizationReport:
    """Quantize the decoder of ``model`` and write a checkpoint to ``out``; ``tlq.export.engines`` says what loads it.

    Decoder layers are read from disk one at a time. After an interruption the same call continues.

    Args:
        model: checkpoint directory or hub id.
        samples: pool that token importance is scored on and layers are calibrated on; may be empty for ``rtn``.
        recipe, scheme: names or rows, see ``tlq.recipes`` and ``tlq.quantization.formats``.
        options: see ``CalibrationOptions``.

    Raises:
        FileExistsError, NotADirectoryError: ``out`` is not empty, or cannot be a folder.
        MemoryError, OSError: this machine is too small for the job (see ``tlq.plan``).
        ValueError: ``engine`` does not run the scheme.
        ValueError, FloatingPointError: see ``calibrate_layers`` and ``tlq.samples.encode_batches``.
    """
    started = time.perf_counter()
    settings = CalibrationOptions(**options)
    folder = Path(out)
    check_new_folder(folder)
    streamed, job = _opened(model, samples, recipe, scheme, settings)
    scoring = ResumeState(folder.with_name(f"{folder.name}-importance"))
    counted = most_counted(streamed, job.recipe, settings.budget)

    def weigh() -> TokenWeights:
        return to_batches(_weights(streamed, job, settings, scoring), job.batches)

    with scoring.locked():
        if job.scheme.budget is not None:
            refuse_impossible(plan_calibration(streamed, job, counted), folder, streamed.device, 1)
            job = _distributed(streamed, job, settings, scoring)
        layers = quantize_checkpoint(streamed, folder, job, weigh, counted)
        scoring.remove()
    report = QuantizationReport(folder, layers, time.perf_counter() - started)
    write_card(folder, model, job.recipe, job.scheme, report.groups, len(samples), len(streamed.unnamed))
    logger.info("%s", report)
    return report


def plan(
    model: str | Path,
    samples: Sequence[Sample] = (),
    recipe: str | Recipe = "tlq-c",
    scheme: str | Scheme = "w4a16",
    timed: bool = False,
    **options: Unpack[Options],
) -> list[Plan]:
    """Plan ``quantize`` with the same arguments: one plan per part of the work.

    Args:
        timed: measure this machine for some seconds and add the expected time, if the device is large enough for it.
            Otherwise no weight is read.

    Raises:
        ValueError: the scheme does not fit the model, or a sample cannot be encoded.
    """
    settings = CalibrationOptions(**options)
    streamed, job = _opened(model, samples, recipe, scheme, settings)
    mixed = job.scheme.budget is not None
    calibration = plan_calibration(streamed, job, most_counted(streamed, job.recipe, settings.budget))
    scoring = mixed or _scores_gradients(job)
    importance = [plan_importance(streamed, job.batches, job.ranks)] if scoring else []
    allocation = [plan_allocation(streamed, job)] if mixed else []
    plans = [*importance, *allocation, calibration]
    if not timed:
        return plans
    probe = Probe(samples if job.batches else [], settings.batch_size, settings.max_tokens, gradients=scoring)
    speed = speed_for(plans, streamed, probe)
    if speed is None:
        return plans
    return [
        *(time_importance(each, streamed, job.batches, speed) for each in importance),
        *(time_allocation(each, streamed, job, speed) for each in allocation),
        time_calibration(calibration, streamed, job, speed),
    ]


def _opened(
    model: str | Path,
    samples: Sequence[Sample],
    recipe: str | Recipe,
    scheme: str | Scheme,
    settings: CalibrationOptions,
) -> tuple[StreamedModel, CalibrationJob]:
    """The checkpoint, and its job without token weights.

    Raises:
        ValueError: the recipe or scheme is unknown, the engine does not run the scheme, or not on this model, or a mix
            has no samples.
    """
    recipe_row = get_recipe(recipe) if isinstance(recipe, str) else recipe
    scheme_row = get_scheme(scheme) if isinstance(scheme, str) else scheme
    if settings.engine is not None:
        check_engine(settings.engine, scheme_row)
    streamed = settings.open_model(model)
    quantizer = WeightQuantizer(scheme_row, streamed.checkpoint_dtype)
    job = CalibrationJob(recipe_row, quantizer, ranks=Ranks(device=streamed.device))
    if settings.engine is not None:
        check_engine(settings.engine, job.scheme, streamed.architecture)
    mixed = job.scheme.budget is not None
    if mixed and not samples:
        raise ValueError(f"scheme {job.scheme.name} distributes its bits by token importance; give calibration samples")
    if mixed or job.needs_data:
        batches = calibration_batches(streamed, samples, settings.batch_size, settings.max_tokens)
        job = replace(job, batches=batches)
    return streamed, job


def _scores_gradients(job: CalibrationJob) -> bool:
    return job.needs_data and not (job.recipe.importance == "uniform" and job.recipe.tokens == "all")


def _distributed(
    model: StreamedModel, job: CalibrationJob, settings: CalibrationOptions, scoring: ResumeState
) -> CalibrationJob:
    """The job with the budget of its scheme distributed over the linear groups, by the gradients of the answer's loss.

    Args:
        scoring: keeps these scores, unless the recipe needs those of another loss.
    """
    if loss_of(job.recipe.importance) == "answer":
        scores = _scores(model, job, scoring, "answer")
    else:
        own = ResumeState(scoring.folder.with_name(f"{scoring.folder.name.strip('.')}-allocation"))
        with own.locked():
            scores = _scores(model, job, own, "answer")
            own.remove()
    units = measure(model, job, scores, mixed_by(settings.engine))
    scheme = distributed(job.scheme, units, outside_bytes(model))
    return replace(job, quantizer=replace(job.quantizer, scheme=scheme))


def _scores(model: StreamedModel, job: CalibrationJob, scoring: ResumeState, loss: LossName) -> Importance:
    """Raw importance of every token by the gradients of a loss; ``scoring`` keeps what is finished."""
    alone = Ranks(device=model.device)
    refuse_impossible(plan_importance(model, job.batches, alone), scoring.folder, alone.device, 1, scoring.size())
    chosen = BlockLoss(job.scheme, model.checkpoint_dtype) if loss == "block" else AnswerLoss()
    return score_resumably(model, job.batches, chosen, scoring, alone)


def _weights(
    model: StreamedModel, job: CalibrationJob, settings: CalibrationOptions, scoring: ResumeState
) -> PoolWeights:
    """Token weights for calibration, computed like those of the stages importance and calibset.

    Args:
        scoring: keeps finished scores, so that an interrupted call continues.
    """
    recipe, batches = job.recipe, job.batches
    pool = TokenPool.of(batches)
    if not _scores_gradients(job):
        layers = range(len(model.architecture.decoder_layers(model.skeleton)))
        keys = [(layer, group.name) for layer in layers for group in model.architecture.groups[layer]]
        return uniform_tokens(keys, pool)
    scores = _scores(model, job, scoring, loss_of(recipe.importance))
    weighting, budget = settings.weighting, settings.budget
    if recipe.tokens == "set":
        widths = input_widths(model.skeleton, model.architecture)
        return token_set(scores, pool, recipe.importance, weighting, budget, settings.seed, widths)
    return all_tokens(scores, pool, recipe.importance, weighting)
