"""Quantization-exposed layer-wise calibration: the loop over decoder layers.

Inside a layer the linear groups are solved in order. Each group is solved on the inputs ``u`` that the layers and
groups quantized before it produce; the inputs ``x`` of the full-precision model give its target. A solved group is
installed in the layer at once, so that all later groups are exposed to its quantization.

Ranks share the work: each runs its own micro-batches through the layer, candidates and output rows are divided among
the ranks, and every rank installs the same result (see ``tlq.parallel``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlq.calibration.group import GroupProblem, GroupSolution, GroupSolver
from tlq.calibration.install import QuantizedLayer
from tlq.calibration.job import CalibrationJob
from tlq.calibration.preflight import check_job, check_weights
from tlq.calibration.streams import FullPrecision, Streams
from tlq.importance.token_set import effective_sample_size
from tlq.models.linear_groups import LinearGroup
from tlq.models.streaming import LayeredModel, ResidentModel
from tlq.quantization.formats import QuantizedWeight
from tlq.results import GroupReport
from tlq.runtime.memory import release_freed_memory


@dataclass
class LayerResult:
    """One decoder layer after calibration.

    Attributes:
        index: index of the layer.
        weights: quantized weights by full module path.
        others: every other tensor of the layer by full name (norms and biases with folded scales, layers kept).
        reports: one per linear group.
    """

    index: int
    weights: dict[str, QuantizedWeight]
    others: dict[str, Tensor]
    reports: list[GroupReport]


@dataclass
class Calibrated:
    """All layers of a calibrated model."""

    layers: list[LayerResult]

    @property
    def weights(self) -> dict[str, QuantizedWeight]:
        """Quantized weights by full module path."""
        return {path: weight for layer in self.layers for path, weight in layer.weights.items()}

    @property
    def reports(self) -> list[GroupReport]:
        return [report for layer in self.layers for report in layer.reports]


@torch.no_grad()
def calibrate(model: PreTrainedModel, job: CalibrationJob) -> Calibrated:
    """Quantize every decoder layer of a model in memory, in place (fake-quantized), and return the codes.

    Raises:
        ValueError, FloatingPointError: as ``calibrate_layers``.
    """
    return Calibrated(list(calibrate_layers(ResidentModel(model), job)))


def calibrate_layers(
    model: LayeredModel, job: CalibrationJob, finished: Mapping[int, Callable[[], LayerResult]] | None = None
) -> Iterator[LayerResult]:
    """Quantize one decoder layer after the other; ``job.ranks.clock`` measures the seconds of every phase.

    A layer's result is not kept here (as ``torch.no_grad`` around a generator would do).

    Args:
        finished: results of the first layers, in order, from an earlier run; these layers are not solved again.

    Raises:
        ValueError: a group size does not divide a layer's width, or data that the recipe needs is missing.
        FloatingPointError: a weight or hidden state is not finite; the message names the layer.
    """
    check_job(model, job)
    layers = len(model.architecture.decoder_layers(model.skeleton))
    finished = finished or {}
    if len(finished) == layers:
        return
    loop = LayerLoop(model, job)
    order = range(layers) if job.needs_data else range(len(finished), layers)
    coming = model.layers(order)
    for _ in order:
        with loop.clock.phase("load"):
            index, layer = next(coming)
            check_weights(layer, model.architecture, index)
        if index in finished:
            with loop.clock.phase("replay"):
                loop.replay_layer(index, layer, finished[index]())
        else:
            yield loop.solve_layer(index, layer)


class LayerLoop:
    """Calibrate one decoder layer after the other.

    Attributes:
        streams: hidden states before the current layer.
        solver: sets up and solves the problem of every linear group.
    """

    @torch.no_grad()
    def __init__(self, model: LayeredModel, job: CalibrationJob) -> None:
        self.architecture, self.job, self.clock = model.architecture, job, job.ranks.clock
        self.streams = Streams(model, job)
        self.solver = GroupSolver(model, job, self.streams)

    @torch.no_grad()
    def solve_layer(self, index: int, layer: nn.Module) -> LayerResult:
        """Solve and install every group of ``layer``; advance both streams past it."""
        with self.clock.phase("forward"):
            reference = self.streams.full_precision(index, layer)
        quantized = self._quantized(index, layer)
        reports = [self._solve_group(quantized, group, reference) for group in self.architecture.groups[index]]
        if reference is not None:
            reference.clear()
        with self.clock.phase("forward"):
            self.streams.advance_exposed(index, layer)
        return LayerResult(index, quantized.weights, quantized.others(), reports)

    @torch.no_grad()
    def replay_layer(self, index: int, layer: nn.Module, result: LayerResult) -> None:
        """Advance both streams past a layer that an earlier run solved, exactly as solving it did."""
        self.streams.advance_full_precision(index, layer)
        self._quantized(index, layer).restore(result.weights, result.others)
        self.streams.advance_exposed(index, layer)

    def _quantized(self, index: int, layer: nn.Module) -> QuantizedLayer:
        return QuantizedLayer(index, layer, self.architecture, self.job.quantizer)

    def _solve_group(
        self, quantized: QuantizedLayer, group: LinearGroup, reference: FullPrecision | None
    ) -> GroupReport:
        started = time.perf_counter()
        problem = self.solver.problem(quantized.index, quantized.layer, group, reference)
        if problem is None:
            if reference is not None:
                reference.inputs.pop(group.name, None)
            return _kept_report(quantized.index, group.name)
        solution = self.solver.solve(problem)
        quantized.install(group, solution.rounded, problem.fold, solution.candidate.s)
        release_freed_memory()
        return _group_report(quantized.index, group.name, problem, solution, time.perf_counter() - started)


def _kept_report(layer: int, group: str) -> GroupReport:
    """The report of a group that stays in full precision."""
    return GroupReport(layer, group, 0.0, False, None, None, 0, None, None, 0.0)


def _group_report(
    layer: int, group: str, problem: GroupProblem, solution: GroupSolution, seconds: float
) -> GroupReport:
    w, routed = problem.inputs.w, problem.routed
    return GroupReport(
        layer=layer,
        group=group,
        alpha=solution.candidate.alpha,
        duo=solution.candidate.duo,
        error_before=solution.error_before,
        error_after=solution.error_after,
        tokens=len(w),
        effective_tokens=round(effective_sample_size(w.cpu().numpy()), 1) if len(w) else None,
        routed_effective_tokens=None if routed is None else round(routed.effective, 1),
        further_tokens=0 if routed is None else routed.further,
        damping=solution.damping,
        seconds=round(seconds, 3),
    )
