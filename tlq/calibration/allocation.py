"""Distribute a size budget over the linear groups: measure what every number of bits costs each, and choose.

The loss of a candidate is sum_t g_t^2 ||V x_t - W x_t||^2, with the token importance g_t, the full-precision inputs x_t
and the weight V rounded to nearest: the expected square of the change of the answer's loss (see
``tlq.importance.token_weights.squared_scores``). Losses of different groups and layers add up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from tlq.calibration.group import GroupProblem, GroupSolver
from tlq.calibration.job import CalibrationJob
from tlq.calibration.preflight import check_job, check_weights
from tlq.calibration.streams import Streams
from tlq.importance.pool import Importance, TokenPool
from tlq.importance.token_weights import squared_scores, to_batches
from tlq.models.architectures import get_linear
from tlq.models.linear_groups import EXPERTS, LinearGroup
from tlq.models.streaming import LayeredModel
from tlq.quantization.allocation import Unit, allocate
from tlq.quantization.formats import FULL_PRECISION, MIXED, Scheme, WeightQuantizer, get_scheme
from tlq.recipes import Recipe

#: A recipe that sees full-precision inputs only, and for whose rounding second moments are summed. It rounds nothing.
MEASURED = Recipe("allocation", importance="token", inputs="full_precision", rounding="compensated")


def distributed(scheme: Scheme, units: Sequence[Unit], outside: int) -> Scheme:
    """A scheme with its budget distributed: one override for every linear, or for a layer's experts.

    Args:
        units: what ``measure`` returns for this scheme, or another one with the same overrides.
        outside: bytes of the checkpoint's other tensors.

    Raises:
        ValueError: the budget is too small; the message says the least possible one.
    """
    budget = scheme.budget
    assert budget is not None
    count = sum(unit.weights for unit in units)
    least, available = sum(min(unit.sizes.values()) for unit in units), budget.bytes_for(count, outside)
    if least > available:
        needed = budget.enlarged(least, count, outside)
        raise ValueError(
            f"scheme {scheme.name}: the budget of {budget} is too small, {needed} are needed; choose {needed.name}"
        )
    chosen = allocate(units, available)
    overrides = [(pattern, name) for unit, name in zip(units, chosen, strict=True) for pattern in unit.patterns]
    return replace(scheme, budget=None, overrides=(*scheme.overrides, *overrides))


@torch.no_grad()
def measure(model: LayeredModel, job: CalibrationJob, scores: Importance, able: Sequence[str] = MIXED) -> list[Unit]:
    """The sizes and losses of all candidates, for every linear group and for the experts of every layer.

    Args:
        job: its scheme has a budget; its recipe and token weights are not read.
        scores: raw importance by the answer's loss.
        able: candidates, for example those that an engine runs.

    Raises:
        ValueError, FloatingPointError: as ``tlq.calibration.loop.calibrate_layers``.
    """
    weights = to_batches(squared_scores(scores, TokenPool.of(job.batches)), job.batches)
    job = replace(job, recipe=MEASURED, weights=weights)
    check_job(model, job)
    streams = Streams(model, job)
    solver = GroupSolver(model, job, streams)
    units: list[Unit] = []
    for index, layer in model.layers(range(len(model.architecture.decoder_layers(model.skeleton)))):
        check_weights(layer, model.architecture, index)
        reference = streams.full_precision(index, layer)
        assert reference is not None
        of_experts: list[Unit] = []
        for group in model.architecture.groups[index]:
            problem = solver.problem(index, layer, group, reference)
            unit = _kept(index, layer, group, job) if problem is None else _unit(index, group, problem, model, able)
            (units if group.experts is None else of_experts).append(unit)
        reference.clear()
        streams.advance_exposed(index, layer)
        units += _together(of_experts)
    return units


def _kept(index: int, layer: nn.Module, group: LinearGroup, job: CalibrationJob) -> Unit:
    """A group that an override of the user keeps in full precision."""
    weights = sum(get_linear(layer, path).weight.numel() for path in group.linears)
    size = weights * job.quantizer.scale_dtype.itemsize
    return Unit(index, group.name, (), weights, {FULL_PRECISION: size}, {FULL_PRECISION: 0.0})


def _unit(index: int, group: LinearGroup, problem: GroupProblem, model: LayeredModel, able: Sequence[str]) -> Unit:
    """A group with its candidates: those whose groups divide the inputs, or the scheme of the user's override."""
    weight, own, dtype = problem.weight, problem.quantizer.scheme, problem.quantizer.scale_dtype
    ones = torch.ones(weight.shape[1], device=weight.device)
    sizes, losses = {}, {}
    for name in able if own.budget is not None else (own.name,):
        if name == FULL_PRECISION:
            sizes[name], losses[name] = weight.numel() * dtype.itemsize, 0.0
            continue
        quantizer = WeightQuantizer(get_scheme(name), dtype)
        if quantizer.scheme.group_size is None or weight.shape[1] % quantizer.scheme.group_size == 0:
            rounded = quantizer.round_nearest(weight).dequantize(quantizer.compute_dtype)
            sizes[name] = quantizer.scheme.bytes_of(weight.shape[0], weight.shape[1], dtype)
            losses[name] = problem.error.cheapest.total(rounded, ones)
    prefix = f"{model.architecture.layers}.{index}."
    paths = group.linears if group.experts is None else (f"{group.experts}.*",)
    patterns = tuple(f"{prefix}{path}" for path in paths) if own.budget is not None else ()
    return Unit(index, group.name, patterns, weight.numel(), sizes, losses)


def _together(units: Sequence[Unit]) -> Iterator[Unit]:
    """One unit for all groups of the experts of a layer: engines compute them together."""
    if not units:
        return
    sizes: defaultdict[str, int] = defaultdict(int)
    losses: defaultdict[str, float] = defaultdict(float)
    common = set.intersection(*(set(unit.sizes) for unit in units))
    for unit in units:
        for name in (name for name in unit.sizes if name in common):
            sizes[name] += unit.sizes[name]
            losses[name] += unit.losses[name]
    yield Unit(units[0].layer, EXPERTS, units[0].patterns, sum(unit.weights for unit in units), sizes, losses)
