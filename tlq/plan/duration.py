"""Seconds of a job before it begins, from the shapes of its model and the speed of this machine.

Every operation of importance and calibration whose time grows with tokens or weights is counted, and divided by a rate
of ``tlq.plan.speed``. Phases have the names that ``calibration.json`` gives their measured seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tlq.calibration.allocation import MEASURED
from tlq.calibration.job import CalibrationJob
from tlq.calibration.preflight import group_scheme
from tlq.importance.gradients import keeps_graph, scoring_passes
from tlq.importance.losses import AnswerLoss, Loss
from tlq.models.linear_groups import LinearGroup, ending_block
from tlq.models.sizes import ModelSizes, all_tokens
from tlq.models.streaming import StreamedModel
from tlq.plan.needs import Plan
from tlq.plan.speed import Speed
from tlq.quantization.errors import FEW_PARTS, from_statistics, row_parts
from tlq.quantization.formats import MIXED, Scheme
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
    ranks, tokens = job.ranks.size, sum(all_tokens(batch) for batch in job.batches)

    def of_layer(layer: int, index: int) -> dict[str, float]:
        groups = work.architecture.groups[layer]
        own = [(group, group_scheme(work.architecture, layer, group, work.scheme)) for group in groups]
        solved = [(group, scheme) for group, scheme in own if scheme is not None]
        search = sum(work.search(index, *each, tokens, plan.counted) for each in solved) if job.batches else 0.0
        return {
            "forward": work.forward(index, tokens / ranks, plan.counted / ranks),
            "search": search,
            "round": sum(work.round(index, *each, plan.counted) for each in solved) / ranks,
        }

    return replace(plan, seconds={"enter": tokens / ranks * speed.enter, **work.all_layers(of_layer)})


def time_allocation(plan: Plan, model: StreamedModel, job: CalibrationJob, speed: Speed) -> Plan:
    """The plan of distributing a budget with its seconds by phase: every group with each of the schemes ``MIXED``."""
    work = _Work(model, replace(job, recipe=MEASURED), speed)
    ranks, tokens = job.ranks.size, sum(all_tokens(batch) for batch in job.batches)

    def of_layer(layer: int, index: int) -> dict[str, float]:
        groups = work.architecture.groups[layer]
        return {
            "forward": work.forward(index, tokens / ranks, tokens / ranks),
            "search": sum(work.measured(index, each, work.scheme, tokens, len(MIXED) - 1) for each in groups) / ranks,
        }

    return replace(plan, seconds={"enter": tokens / ranks * speed.enter, **work.all_layers(of_layer)})


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
    read = sizes.whole // sizes.item * model.checkpoint_dtype.itemsize / speed.read
    own = range(0, len(batches), ranks)
    passes = len(list(scoring_passes(model, batches, own, plan.budget)))
    kept = keeps_graph(model, batches)
    seconds = {"enter": 0.0, "load": 0.0, "gradients": 0.0}
    for loss in losses:
        once = kept and loss.keeps_graph
        layers = [speed.layers[index] for index in sizes.alike]
        work = [(1 if once else 2) * layer.forward + layer.backward for layer in layers]
        gradients = tokens * sum(work) + head
        ending = ending_block(model.architecture.groups[-1]) if loss.of_answers else None
        if ending is not None:  # it runs on the tokens that predict an answer
            gradients -= (tokens - answers) * sizes.share_of(sizes.layers - 1, ending) * work[-1]
        seconds["enter"] += tokens * speed.enter
        seconds["gradients"] += gradients
        # Layers that are read one by one are read while the layer before them computes.
        seconds["load"] += read if once else max(read / sizes.layers, passes * loss.sweeps * read - gradients)
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

    def all_layers(self, of_layer: Callable[[int, int], dict[str, float]]) -> dict[str, float]:
        """Seconds by phase of all layers, and of reading them as far as it takes longer than the layer before.

        Args:
            of_layer: seconds by phase of a layer, from its index and the index of the first layer that is alike.
        """
        total = {"load": self.load}
        for layer, index in enumerate(self.alike):
            seconds = of_layer(layer, index)
            for phase, value in seconds.items():
                total[phase] = total.get(phase, 0.0) + value
            total["load"] += max(0.0, self.load - sum(seconds.values()))  # a thread reads the next layer meanwhile
        return total

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
                    before += self.passed(index, group)
                passed += before * tokens
            passes += passed / sum(self.passed(index, group) for group in groups)
        return passes * self.speed.layers[index].forward if passes else 0.0

    def search(self, index: int, group: LinearGroup, scheme: Scheme, tokens: float, counted: float) -> float:
        """The statistics of a group and the search for its scales, on one rank.

        Args:
            tokens, counted: of all ranks.
        """
        ranks, tried = self.job.ranks.size, _candidates(self.recipe, group)
        if tried == 1:
            return self.measured(index, group, scheme, counted, 2) / ranks
        if self.recipe.error_measure.parent_of(group) is not None:
            call = self.share_of(index, group.block) * tokens / ranks * self.speed.layers[index].forward
            times = _EXHAUSTIVE_SHARE * tried
            every_rank = times * FEW_PARTS * self._nearest(*self.shape(index, group))
            return self.measured(index, group, scheme, counted, 2) / ranks + (1 + times) * call + every_rank
        parts = row_parts(self.shape(index, group)[0])
        parts = parts if scheme.activation_bits is None else min(FEW_PARTS, parts)
        times = _EXHAUSTIVE_SHARE * tried
        if self.recipe.equalization.search == "halving":
            times = sum(count * len(each) for count, each in halving_rounds(tried, parts)) / parts
        return self.measured(index, group, scheme, counted, 2 + times) / ranks

    def measured(self, index: int, group: LinearGroup, scheme: Scheme, counted: float, times: float) -> float:
        """What the error of a group needs before it can be measured, and ``times`` measurements of it."""
        rows, width = self.shape(index, group)
        own = counted * self._share(index, group)
        moments = from_statistics(int(own), width, scheme, self.recipe.rounding_method.needs_statistics)
        moments &= self.recipe.equalization.norm == "l2"
        outputs = _PAIR * own * rows * width / self.speed.products
        # C is symmetric; without it, the outputs of all tokens.
        once = _PAIR * rows * computed_elements(width) / self.speed.products if moments else outputs
        begin = self._statistics(scheme, own, rows, width) if moments else outputs
        return begin + times * (once + self._nearest(rows, width))

    def round(self, index: int, group: LinearGroup, scheme: Scheme, counted: float) -> float:
        """The codes of a group."""
        rows, width = self.shape(index, group)
        seconds, ranges = self._nearest(rows, width), self.recipe.ranges
        if ranges.searched(scheme):
            seconds += rows * width * ranges.points * ranges.zero_points / self.speed.ranges
        if not self.recipe.rounding_method.needs_statistics:
            return seconds
        own = counted * self._share(index, group)
        if not from_statistics(int(own), width, scheme, needs_statistics=True):
            seconds += self._statistics(scheme, own, rows, width)
        # Error feedback, and the shifted target.
        products = rows * width**2 * (1 + _PAIR * self._streams_differ(scheme))
        factor = width**3 / 3 / self.speed.factor
        return seconds + factor + products / self.speed.products + rows * width / self.speed.columns

    def _nearest(self, rows: int, width: int) -> float:
        return rows * width / self.speed.nearest

    def _statistics(self, scheme: Scheme, tokens: float, rows: int, width: int) -> float:
        """Second moments of a group's inputs; W G too, where full-precision and exposed inputs are two."""
        cross = 2 * _PAIR * tokens * rows * width * self._streams_differ(scheme)
        return (_PAIR * tokens * computed_elements(width) + cross) / self.speed.products

    def _streams_differ(self, scheme: Scheme) -> bool:
        return self.recipe.target == "full_precision" and self.recipe.inputs_for(scheme) == "exposed"


def _candidates(recipe: Recipe, group: LinearGroup) -> int:
    """Candidates that the search for scales measures; 1 means no search."""
    method = recipe.equalization
    return method.points * (1 + method.duo) if method.method == "grid" and group.fold is not None else 1
