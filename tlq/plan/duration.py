"""Seconds of a job before it begins, from the shapes of its model and the speed of this machine.

Every operation of importance and calibration whose time grows with tokens or weights is counted, and divided by a rate
of ``tlq.plan.speed``. Phases have the names that ``calibration.json`` gives their measured seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tlq.calibration.job import CalibrationJob
from tlq.importance.gradients import keeps_graph
from tlq.importance.losses import AnswerLoss, Loss
from tlq.models.architectures import get_linear
from tlq.models.linear_groups import LinearGroup
from tlq.models.sizes import ModelSizes, all_tokens
from tlq.models.streaming import StreamedModel
from tlq.plan.needs import Plan
from tlq.plan.speed import Speed
from tlq.quantization.errors import FEW_PARTS, from_statistics, row_parts
from tlq.quantization.objective import computed_elements
from tlq.quantization.search import halving_rounds
from tlq.recipes import Recipe
from tlq.samples import Batch

#: Operations of a multiplication and its addition.
_PAIR = 2
#: Share of all candidates' parts that the exhaustive search measures before the worse candidates drop out.
_EXHAUSTIVE_SHARE = 0.8


def time_calibration(plan: Plan, model: StreamedModel, job: CalibrationJob, speed: Speed) -> Plan:
    """The plan of a calibration with its seconds by phase."""
    work = _Work(model, job, speed)
    tokens = sum(all_tokens(batch) for batch in job.batches) / job.ranks.size
    seconds = {"enter": tokens * speed.enter, "load": work.load, "forward": 0.0, "search": 0.0, "round": 0.0}
    for groups in work.architecture.groups:
        index = work.architecture.kinds[groups]
        forward = work.forward(index, tokens, plan.counted / job.ranks.size)
        search = sum(work.search(index, group, tokens, plan.counted) for group in groups) if job.batches else 0.0
        rounding = sum(work.round(index, group, plan.counted) for group in groups)
        seconds["forward"] += forward
        seconds["search"] += search / job.ranks.size
        seconds["round"] += rounding / job.ranks.size
        # A thread reads the next layer meanwhile.
        seconds["load"] += max(0.0, work.load - forward - (search + rounding) / job.ranks.size)
    return replace(plan, seconds=seconds)


def time_importance(
    plan: Plan,
    model: StreamedModel,
    batches: Sequence[Batch],
    speed: Speed,
    ranks: int = 1,
    losses: Sequence[Loss] = (AnswerLoss(),),
) -> Plan:
    """The plan of importance with its seconds by phase."""
    sizes = ModelSizes(model)
    tokens = sum(all_tokens(batch) for batch in batches) / ranks
    answers = sum(int(batch.is_answer.sum()) for batch in batches) / ranks
    head = 3 * _PAIR * answers * int(sizes.text.vocab_size) * int(sizes.text.hidden_size) / speed.products
    stored = sizes.whole // sizes.item * model.checkpoint_dtype.itemsize
    kept = keeps_graph(model, batches)
    seconds = {"enter": 0.0, "load": 0.0, "gradients": 0.0}
    for loss in losses:
        once = kept and loss.keeps_graph
        layers = (speed.layers[sizes.architecture.kinds[groups]] for groups in sizes.architecture.groups)
        per_token = sum((1 if once else 2) * layer.forward + layer.backward for layer in layers)
        seconds["enter"] += tokens * speed.enter
        seconds["load"] += stored / speed.read
        seconds["gradients"] += tokens * per_token + head
    return replace(plan, seconds=seconds)


class _Work(ModelSizes):
    """Seconds of the parts of a calibration.

    Attributes:
        load: to read a decoder layer.
    """

    def __init__(self, model: StreamedModel, job: CalibrationJob, speed: Speed) -> None:
        super().__init__(model)
        self.job, self.recipe, self.scheme, self.speed = job, job.recipe, job.scheme, speed
        self.load = self.layer // self.item * model.checkpoint_dtype.itemsize / speed.read

    def forward(self, index: int, tokens: float, counted: float) -> float:
        """All passes of layer ``index`` on the streams that the recipe sees.

        For the input of a group on the exposed stream, the groups before it in the same block (attention or MLP) run,
        at all tokens or at those that count; then the block runs once more for its output.
        """
        passes = float(self.recipe.sees("full_precision", self.scheme)) * tokens
        if self.recipe.sees("exposed", self.scheme):
            groups = self.architecture.groups[index]
            passed = 0.0
            for block in dict.fromkeys(group.block for group in groups):
                before = 0.0
                for group in (group for group in groups if group.block == block):
                    passed += before * (min(counted, tokens) if group.tokenwise else tokens)
                    before += self._passed(index, group)
                passed += before * tokens
            passes += passed / sum(self._passed(index, group) for group in groups)
        return passes * self.speed.layers[index].forward if passes else 0.0

    def search(self, index: int, group: LinearGroup, tokens: float, counted: float) -> float:
        """The statistics of a group and the search for its scales."""
        rows, width = self._shape(index, group)
        own = counted * self._share(index, group)
        measures = from_statistics(int(own), width, self.scheme, self.recipe.rounding_method.needs_statistics)
        measures &= self.recipe.equalization.norm == "l2"
        outputs = _PAIR * own * rows * width
        products = _PAIR * rows * computed_elements(width) if measures else outputs
        measured = products / self.speed.products + self._nearest(rows, width)
        begin = self._statistics(own, rows, width) if measures else outputs / self.speed.products
        seconds = begin + 2 * measured  # before and after
        tried = _candidates(self.recipe, group)
        if tried == 1:
            return seconds
        if self.recipe.error_measure.parent_of(group) is not None:
            call = self._share_of_block(index, group) * tokens * self.speed.layers[index].forward
            times = _EXHAUSTIVE_SHARE * tried
            return seconds + (1 + times) * call + times * FEW_PARTS * self._nearest(rows, width)
        parts = row_parts(rows) if self.scheme.activation_bits is None else min(FEW_PARTS, row_parts(rows))
        if self.recipe.equalization.search == "halving":
            times = sum(count * len(each) for count, each in halving_rounds(tried, parts)) / parts
        else:
            times = _EXHAUSTIVE_SHARE * tried
        return seconds + times * measured

    def round(self, index: int, group: LinearGroup, counted: float) -> float:
        """The codes of a group."""
        rows, width = self._shape(index, group)
        seconds, ranges = self._nearest(rows, width), self.recipe.ranges
        if ranges.searched(self.scheme):
            seconds += rows * width * ranges.points * ranges.zero_points / self.speed.ranges
        if not self.recipe.rounding_method.needs_statistics:
            return seconds
        own = counted * self._share(index, group)
        if not from_statistics(int(own), width, self.scheme, needs_statistics=True):
            seconds += self._statistics(own, rows, width)
        products = rows * width**2 * (1 + _PAIR * self._streams_differ)  # error feedback, and the shifted target
        factor = width**3 / 3 / self.speed.factor
        return seconds + factor + products / self.speed.products + rows * width / self.speed.columns

    def _shape(self, index: int, group: LinearGroup) -> tuple[int, int]:
        """Rows of all linears of a group, and its input channels."""
        linears = [get_linear(self.module(index), path) for path in group.linears]
        return sum(linear.out_features for linear in linears), linears[0].in_features

    def _passed(self, index: int, group: LinearGroup) -> float:
        """Weights of a group that a token passes, on average."""
        return self._share(index, group) * math.prod(self._shape(index, group))

    def _share_of_block(self, index: int, group: LinearGroup) -> float:
        """The share of a layer's work that the module around a group does."""
        groups = self.architecture.groups[index]
        inside = sum(self._passed(index, each) for each in groups if each.block == group.block)
        return inside / sum(self._passed(index, each) for each in groups)

    def _nearest(self, rows: int, width: int) -> float:
        return rows * width / self.speed.nearest

    def _statistics(self, tokens: float, rows: int, width: int) -> float:
        """Second moments of a group's inputs; W G too, where full-precision and exposed inputs are two."""
        cross = 2 * _PAIR * tokens * rows * width * self._streams_differ
        return (_PAIR * tokens * computed_elements(width) + cross) / self.speed.products

    @property
    def _streams_differ(self) -> bool:
        return self.recipe.target == "full_precision" and self.recipe.inputs_for(self.scheme) == "exposed"


def _candidates(recipe: Recipe, group: LinearGroup) -> int:
    """Candidates that the search for scales measures; 1 means no search."""
    method = recipe.equalization
    return method.points * (1 + method.duo) if method.method == "grid" and group.fold is not None else 1
