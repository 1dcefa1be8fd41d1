"""Solve one linear group: gather its inputs, search for equalization scales, round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tlq.calibration.job import CalibrationJob
from tlq.calibration.preflight import group_quantizer
from tlq.calibration.routing import ExpertTokens
from tlq.calibration.streams import FullPrecision, Streams
from tlq.models.architectures import get_linear, head_dim_of
from tlq.models.linear_groups import LinearGroup
from tlq.models.streaming import LayeredModel
from tlq.quantization.equalization import Candidate, Fold, candidates
from tlq.quantization.errors import (
    Arguments,
    CandidateErrors,
    GroupInputs,
    LinearsError,
    ParentCalls,
    ParentChunk,
)
from tlq.quantization.formats import QuantizedWeight, WeightQuantizer
from tlq.quantization.objective import ChunkInputs
from tlq.quantization.search import SEARCHES


@dataclass(frozen=True)
class GroupProblem:
    """One linear group to quantize.

    Attributes:
        quantizer: quantizer of this group, with overrides applied.
        error: the group's weights stacked [out, in], its inputs, and E(V).
        fold: the module that takes 1/s; None if the group has no scales.
        parent: calls of the module around the group; None unless the recipe's error measure needs them.
        routed: for a group of an expert, the tokens that it is calibrated on.
    """

    quantizer: WeightQuantizer
    error: LinearsError
    fold: Fold | None
    parent: ParentCalls | None = None
    routed: ExpertTokens | None = None

    @property
    def weight(self) -> Tensor:
        return self.error.weight

    @property
    def inputs(self) -> GroupInputs:
        return self.error.inputs


@dataclass(frozen=True)
class GroupSolution:
    """Scales and codes of one group; errors are E(V) / sum_t w_t, or None if the recipe uses no data.

    Attributes:
        error_before: error with s = 1 and nearest rounding.
        damping: fraction of the Hessian's mean diagonal that compensated rounding added.
    """

    candidate: Candidate
    rounded: QuantizedWeight
    error_before: float | None = None
    error_after: float | None = None
    damping: float | None = None


class GroupSolver:
    """Solve linear groups with one recipe, on the inputs from the activation streams."""

    def __init__(self, model: LayeredModel, job: CalibrationJob, streams: Streams) -> None:
        self.architecture, self.job, self.streams = model.architecture, job, streams
        self.clock = job.ranks.clock
        self.config = model.skeleton.config

    def problem(
        self, index: int, layer: nn.Module, group: LinearGroup, reference: FullPrecision | None
    ) -> GroupProblem | None:
        """The problem of ``group`` of decoder layer ``index``; None if the group stays in full precision.

        Args:
            reference: the layer on the full-precision stream; this removes its inputs of the group.
        """
        quantizer = group_quantizer(self.architecture, index, group, self.job.quantizer)
        if quantizer is None:
            return None
        weight = torch.cat([get_linear(layer, path).weight.float() for path in group.linears])
        routed = None
        if group.experts is not None and self.job.needs_data:
            with self.clock.phase("forward"):
                routed = self.streams.prepare_expert(index, layer, group, reference)
        with self.clock.phase("search"):
            if self.job.needs_data:
                inputs, parent = self._gather(index, layer, group, reference, weight.shape[1])
            else:
                no_tokens = torch.empty(0, device=weight.device)
                inputs, parent = GroupInputs([], 0, no_tokens, weight.shape[1], True, self.job.ranks), None
        error = LinearsError(weight, inputs, quantizer, self.job.recipe.rounding_method.needs_statistics)
        return GroupProblem(quantizer, error, self.fold(index, layer, group), parent, routed)

    def fold(self, index: int, layer: nn.Module, group: LinearGroup) -> Fold | None:
        """The module of ``layer``, decoder layer ``index``, that takes 1/s of ``group``; None if there is none."""
        if group.fold is None:
            return None
        return Fold.into(
            layer.get_submodule(group.fold),
            get_linear(layer, group.linears[0]).in_features,
            head_dim_of(self.config, index),
            self.job.quantizer.scale_dtype,
            self.architecture.norm_offset if group.gain is None else group.gain,
            group.fold_last,
        )

    def _gather(
        self, index: int, layer: nn.Module, group: LinearGroup, reference: FullPrecision | None, in_features: int
    ) -> tuple[GroupInputs, ParentCalls | None]:
        recipe, parent_path = self.job.recipe, self.job.recipe.error_measure.parent_of(group)
        u_calls: list[Arguments] = []
        x_calls: list[Arguments] = []
        if reference is not None:
            x = self.streams.full_precision_inputs(index, layer, group, reference)
            x_calls = reference.parents.get(parent_path or "", [])
        if self.streams.sees_exposed:
            with self.clock.phase("forward"):
                u, u_calls = self.streams.exposed_inputs(index, layer, group)
        else:
            u, u_calls = x, x_calls
        if recipe.target == "exposed":
            x, x_calls = u, u_calls
        weights = [self.streams.weights_of(index, group, number) for number in range(len(self.streams.calls))]
        same = x is u
        own = []
        for x_parts, u_parts, w_parts in zip(*map(self.job.by_chunk, (x, u, weights)), strict=True):
            exposed = torch.cat(u_parts)
            w = torch.cat([part[part > 0] for part in w_parts])
            own.append(ChunkInputs(exposed if same else torch.cat(x_parts), exposed, w))
        all_weights = torch.cat(self.streams.counted_weights(index, group))
        inputs = GroupInputs(own, len(self.job.chunks), all_weights, in_features, same, self.job.ranks)
        if parent_path is None:
            return inputs, None
        calls = (self.job.by_chunk(x_calls), self.job.by_chunk(u_calls), self.job.by_chunk(weights))
        chunks = [ParentChunk(*parts) for parts in zip(*calls, strict=True)]
        linears = [get_linear(layer, path) for path in group.linears]
        return inputs, ParentCalls(layer.get_submodule(parent_path), linears, chunks)

    def errors(self, problem: GroupProblem) -> CandidateErrors:
        """The errors that the search for scales minimises."""
        recipe = self.job.recipe
        return recipe.error_measure.errors(problem.error, problem.parent, recipe.equalization.norm)

    def candidates(self, problem: GroupProblem) -> list[Candidate]:
        """Scales that the recipe tries, the neutral ones (s = 1) first."""
        method = self.job.recipe.equalization
        if method.method == "none" or problem.fold is None:
            return [_neutral(problem.weight)]
        magnitude = problem.inputs.magnitude(method.magnitude)
        return list(candidates(method, magnitude, problem.weight, problem.quantizer.scheme.group_size, problem.fold))

    def solve(self, problem: GroupProblem) -> GroupSolution:
        """Choose scales by the error under nearest rounding, then round with the recipe's rounding."""
        recipe, error = self.job.recipe, problem.error
        with self.clock.phase("search"):
            candidate = self._search(problem)
        with self.clock.phase("round"):
            rounded = recipe.rounding_method.solve(error, candidate.s, recipe.ranges, recipe.damping)
        if not self.job.needs_data:
            return GroupSolution(candidate, rounded.weight)
        with self.clock.phase("search"):
            total = float(problem.inputs.w.sum())
            linears = error.cheapest
            neutral = _neutral(problem.weight)
            before = sum(linears.measure([(neutral, part) for part in range(linears.parts)]))
            after = linears.total(rounded.weight.dequantize(), candidate.s)
        return GroupSolution(candidate, rounded.weight, before / total, after / total, rounded.damping)

    def _search(self, problem: GroupProblem) -> Candidate:
        method = self.job.recipe.equalization
        tried = self.candidates(problem)
        if len(tried) == 1 or method.method == "fixed":
            return tried[-1]
        return SEARCHES[method.search](self.errors(problem), tried)


def _neutral(weight: Tensor) -> Candidate:
    return Candidate(torch.ones(weight.shape[1], device=weight.device), 0.0)
