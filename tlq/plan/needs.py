"""Plan a job before any long work: bytes per layer, tokens, memory, disk; ``tlq.plan.duration`` adds its seconds.

Every number follows from shapes; no weight is read. An impossible job is refused in seconds, with the bytes available
and the bytes needed. The refusal uses a lower bound, which counts only tensors that the job certainly holds. If the
expected peak is too large, one warning is logged. `python -m bench.memory` compares expected with measured peaks.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from tlq.calibration.allocation import MEASURED
from tlq.calibration.job import CalibrationJob
from tlq.calibration.preflight import check_shapes
from tlq.importance.gradients import MIN_PASSES, bytes_per_token, keeps_graph
from tlq.importance.losses import AnswerLoss, Loss
from tlq.importance.token_set import TokenBudget
from tlq.models.architectures import input_widths, linear_paths
from tlq.models.linear_groups import LinearGroup
from tlq.models.sizes import ModelSizes, all_tokens, elements
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks, chunk_ranges
from tlq.quantization.errors import ROWS_TOGETHER, from_statistics
from tlq.quantization.formats import Scheme
from tlq.recipes import Recipe
from tlq.runtime.clock import in_words
from tlq.runtime.memory import GIB, device_memory, host_budget
from tlq.samples import Batch

logger = logging.getLogger(__name__)

_FLOAT = 4
#: Bytes that thread pools, matrix kernels and the allocator take in addition to tensors, measured by bench.memory.
_RUNTIME = 48 * 2**20
#: Copies of a group's weight in memory while it is rounded: original, scaled, dequantized, temporaries. W G is another.
_WEIGHTS = 4
#: Bytes that the allocator reserves for every byte of tensors, because its memory is fragmented.
_FRAGMENTS = 1.06
#: A phase with a smaller share of the seconds is not printed.
_SHOWN = 0.005


@dataclass(frozen=True)
class Plan:
    """Needs of one rank, in bytes unless stated otherwise.

    Attributes:
        work: name of the planned work.
        layers: number of decoder layers.
        layer: weights of the largest decoder layer, in the dtype of the computation.
        outside: weights outside the decoder layers.
        tokens: number of tokens of all micro-batches, with padding.
        counted: maximum number of tokens whose error counts in a linear group.
        device: expected peak on the compute device.
        least: bytes of tensors that the compute device certainly holds at once, a lower bound of the peak.
        hidden_states: hidden states; they are kept in host memory up to ``budget``, the rest on disk.
        disk: the result, and the state that is kept next to it until it is complete.
        scores: scores of all tokens in host memory, for every layer and linear group.
        seconds: by phase, on the machine that ``tlq.plan.speed`` measured; empty without a measurement.
    """

    work: str
    layers: int
    layer: int
    outside: int
    tokens: int
    counted: int
    device: int
    least: int
    hidden_states: int
    budget: int
    disk: int
    scores: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def resident(self) -> int:
        """Hidden states in host memory."""
        return min(self.hidden_states, self.budget)

    @property
    def host(self) -> int:
        """Hidden states and scores in host memory."""
        return self.resident + self.scores

    @property
    def spilled(self) -> int:
        """Hidden states on disk."""
        return self.hidden_states - self.resident

    def lines(self) -> list[str]:
        """The plan as text."""
        lines = [
            f"{self.work}: {self.layers} decoder layers of up to {gib(self.layer)}, {gib(self.outside)} outside them",
            f"{self.tokens} tokens, up to {self.counted} of them counted in a linear group",
            f"expected peak per rank: {gib(self.device)} on the device, {gib(self.resident)} of hidden states in host "
            f"memory, {gib(self.spilled)} of them on disk",
            f"disk: {gib(self.disk)} for the result and the state next to it",
        ]
        if self.seconds:
            total = sum(self.seconds.values())
            phases = (f"{name} {value / total:.0%}" for name, value in self.seconds.items() if value >= _SHOWN * total)
            lines.append(f"time: about {in_words(total)} per rank on this machine ({', '.join(phases)})")
        return lines


def gib(size: int) -> str:
    """Bytes as text, in GiB."""
    return f"{size / GIB:.2f} GiB"


def plan_calibration(model: StreamedModel, job: CalibrationJob, counted: int | None = None) -> Plan:
    """The needs of ``quantize_checkpoint``.

    Args:
        counted: maximum number of tokens with a weight in a linear group; by default from ``job.weights``, or all
            tokens if the weights are not computed yet.

    Raises:
        ValueError: a group size does not divide a layer's width, an override matches nothing, a linear is missing.
    """
    recipe, scheme, batches = job.recipe, job.scheme, job.batches
    check_shapes(model.skeleton, model.architecture, scheme)
    sizes = _JobSizes(model)
    own = _own_tokens(batches, job.ranks)
    tokens = sum(all_tokens(batch) for batch in batches)
    if counted is None and job.weights:
        counted = job.counted_tokens()
    counted = tokens if counted is None else min(counted, tokens)
    exposed = recipe.sees("exposed", scheme)
    streams = recipe.sees("full_precision", scheme) + exposed
    activations = sizes.activations(batches, graph=False)
    forward = 2 * sizes.layer + activations  # the next layer is being read
    solved = 2 * sizes.layer + sizes.codes(scheme, model.checkpoint_dtype)
    solving = 2 * sizes.layer + max(
        sizes.group(index, group, min(counted, own), recipe, scheme, streams)
        + (activations if recipe.error_measure.parent_of(group) is not None else 0)
        for index in set(sizes.alike)
        for group in model.architecture.groups[index]
    )
    return Plan(
        work="calibration",
        layers=sizes.layers,
        layer=sizes.layer,
        outside=sizes.outside,
        tokens=tokens,
        counted=counted if job.needs_data else 0,
        least=max(sizes.least_group(recipe), sizes.entrance if batches else 0),
        device=_allocated(sizes.calls(batches, own) + max(solving, solved, forward, sizes.enter(batches, own))),
        # On the exposed stream, also the output of the current layer's attention. Experts: ``inside``.
        hidden_states=own * (sizes.state * (streams + exposed + sizes.inside(streams)) + sizes.carried * streams)
        if job.needs_data
        else 0,
        budget=host_budget(),
        disk=exported_bytes(model, scheme),
    )


def plan_allocation(model: StreamedModel, job: CalibrationJob) -> Plan:
    """The needs of ``tlq.calibration.allocation.measure`` for a job whose scheme has a budget."""
    return replace(plan_calibration(model, replace(job, recipe=MEASURED)), work="allocation")


def most_counted(model: StreamedModel, recipe: Recipe, budget: TokenBudget) -> int | None:
    """Maximum number of tokens whose error counts in a linear group, before they are chosen; None means all tokens."""
    if recipe.tokens != "set":
        return None
    widest = max(input_widths(model.skeleton, model.architecture).values())
    return budget.of(widest).tokens_per_layer


def plan_importance(
    model: StreamedModel, batches: Sequence[Batch], ranks: Ranks, losses: Sequence[Loss] = (AnswerLoss(),)
) -> Plan:
    """The needs of ``score_resumably``.

    Args:
        losses: they are scored one after the other.
    """
    sizes = ModelSizes(model)
    kept = 0
    if any(loss.keeps_graph for loss in losses) and keeps_graph(model, batches):
        kept = sizes.whole + sizes.graph(batches)
        if all(loss.keeps_graph for loss in losses):
            largest_batch = max((all_tokens(batch) for batch in batches), default=0) * sizes.state
            return _plan_of_scoring(sizes, batches, kept, largest_batch, len(losses))
    own = _own_tokens(batches, ranks)
    largest = max((all_tokens(batch) for batch in batches), default=0)
    tokens = sum(all_tokens(batch) for batch in batches)
    wave = min(own, -(-tokens // MIN_PASSES))
    per_token = bytes_per_token(model)
    backward = 2 * sizes.layer + sizes.activations(batches, graph=True) + wave * (sizes.state + sizes.carried)
    device = sizes.calls(batches, wave) + max(backward, sizes.enter(batches, wave), sizes.head(batches))
    hidden_states = max(largest * per_token, min(wave * per_token, host_budget()))
    return _plan_of_scoring(sizes, batches, max(kept, device), hidden_states, len(losses))


def _plan_of_scoring(sizes: ModelSizes, batches: Sequence[Batch], device: int, hidden_states: int, losses: int) -> Plan:
    tokens = sum(all_tokens(batch) for batch in batches)
    scores = tokens * sum(map(len, sizes.architecture.groups)) * _FLOAT
    return Plan(
        work="importance",
        layers=sizes.layers,
        layer=sizes.layer,
        outside=sizes.outside,
        tokens=tokens,
        counted=tokens,
        least=max(sizes.layer, sizes.entrance, sizes.head(())),
        device=_allocated(device),
        hidden_states=hidden_states,
        budget=host_budget(),
        disk=2 * losses * scores,
        scores=scores,
    )


def _allocated(size: int) -> int:
    """Expected peak of a process whose tensors have a size."""
    return _RUNTIME + int(_FRAGMENTS * size)


class _JobSizes(ModelSizes):
    """Bytes of a model's parts, and of solving its linear groups."""

    def codes(self, scheme: Scheme, dtype: torch.dtype) -> int:
        """The codes of a solved layer, a byte each, and what is written of them.

        Args:
            dtype: of the scales.
        """
        needed = []
        for index in set(self.alike):
            shapes = [self.shape(index, group) for group in self.architecture.groups[index]]
            needed.append(sum(rows * width + scheme.bytes_of(rows, width, dtype) for rows, width in shapes))
        return max(needed)

    def least_group(self, recipe: Recipe) -> int:
        """A decoder layer, a group's weights stacked in float32, and the tensors of its rounding."""
        needed = []
        for index in set(self.alike):
            for group in self.architecture.groups[index]:
                rows, width = self.shape(index, group)
                needed.append(rows * width * _FLOAT + recipe.rounding_method.bytes_needed(rows, width))
        return self.layer + max(needed)

    def group(self, index: int, group: LinearGroup, own: int, recipe: Recipe, scheme: Scheme, streams: int) -> int:
        """Memory of solving a linear group of layer ``index``, in addition to the layers.

        Args:
            own: tokens of this rank with a weight.
            streams: 2 if inputs of both streams are kept.
        """
        rows, width = self.shape(index, group)
        rounding = recipe.rounding_method
        needs_data = recipe.needs_data(scheme)
        copies = _WEIGHTS + needs_data + rounding.needs_statistics  # the target of the rounding
        weights = copies * rows * width * _FLOAT
        if not needs_data:
            return weights
        inputs = own * (2 * streams * width * self.item + rows * _FLOAT)
        if streams == 2:  # one pass records the original inputs of all groups; those of later groups are waiting
            groups = self.architecture.groups[index]
            waiting = [each for each in groups[groups.index(group) + 1 :] if not each.experts]
            inputs += own * sum(self.shape(index, each)[1] for each in waiting) * self.item
        if recipe.error_measure.parent_of(group) is not None:
            inputs += recipe.error_measure.bytes_needed(own, self.state)
        if rounding.needs_statistics and scheme.activation_bits is not None:  # quantized inputs, and before that scaled
            inputs += 2 * own * width * _FLOAT
        measures = from_statistics(own, width, scheme, rounding.needs_statistics)
        if not measures:  # outputs of a candidate, and their error
            inputs += 2 * own * min(rows, ROWS_TOGETHER) * _FLOAT
        return weights + inputs + measures * width * width * _FLOAT + rounding.bytes_needed(rows, width)


def exported_bytes(model: StreamedModel, scheme: Scheme) -> int:
    """Size of the result's weights, also of those carried over; the state next to it consists of the same files."""
    outside, dtype = outside_bytes(model), model.checkpoint_dtype
    shapes = _linear_shapes(model)
    if scheme.budget is not None:
        weights = sum(rows * width for rows, width in shapes.values())
        return outside + scheme.budget.bytes_for(weights, outside)
    total = outside
    for path, (rows, width) in shapes.items():
        own = scheme.of(path)
        total += rows * width * dtype.itemsize if own is None else own.bytes_of(rows, width, dtype)
    return total


def outside_bytes(model: StreamedModel) -> int:
    """Size of all tensors in the result other than the decoder's linears."""
    linears = sum(rows * width for rows, width in _linear_shapes(model).values())
    others = elements(model, list(model.weight_map)) - linears
    return others * model.checkpoint_dtype.itemsize + sum(place.nbytes for place in model.unnamed.values())


def _linear_shapes(model: StreamedModel) -> dict[str, tuple[int, int]]:
    """Output and input channels of every linear of the decoder, by module path."""
    skeleton, architecture = model.skeleton, model.architecture
    shapes = {}
    for index in range(len(architecture.decoder_layers(skeleton))):
        for path in linear_paths(architecture, index):
            linear: Any = skeleton.get_submodule(path)
            shapes[path] = int(linear.out_features), int(linear.in_features)
    return shapes


def _own_tokens(batches: Sequence[Batch], ranks: Ranks) -> int:
    """Tokens of the rank with the most tokens, with padding."""
    chunks = chunk_ranges(len(batches))
    most = 0
    for rank in range(ranks.size):
        numbers = [number for chunk in Ranks(rank, ranks.size).own_chunks(len(chunks)) for number in chunks[chunk]]
        most = max(most, sum(all_tokens(batches[number]) for number in numbers))
    return most


def refuse_impossible(needed: Plan, out: Path, device: torch.device, processes: int, there: int = 0) -> None:
    """Compare a plan with this machine: refuse a job that is certainly too large, and warn if it probably is.

    Args:
        out: folder of the result.
        processes: number of ranks on this machine.
        there: bytes of the result that an interrupted run has left.

    Raises:
        MemoryError: the device or the host has too little memory.
        OSError: the disk is too small.
    """
    on_device, on_host = device_memory(device), psutil.virtual_memory().available
    if needed.least > on_device:
        raise MemoryError(
            f"{needed.work}: one rank needs at least {gib(needed.least)} on {device.type}, {gib(on_device)} are free; "
            f"{_SMALLER_LAYERS}"
        )
    on_cpu = device.type == "cpu"
    least, expected = (processes * (needed.host + on_cpu * each) for each in (needed.least, needed.device))
    if least > on_host:
        raise MemoryError(
            f"{needed.work}: {processes} rank(s) need at least {gib(least)} of this host's memory, {gib(on_host)} are "
            f"free; lower TLQ_HOST_MEMORY or the number of ranks, or {_SMALLER_LAYERS}"
        )
    if needed.device > on_device or expected > on_host:
        logger.warning(
            "%s: one rank is expected to need %s on %s (%s free), %d rank(s) %s of this host's memory (%s free); "
            "if memory runs out, lower %s",
            *(needed.work, gib(needed.device), device.type, gib(on_device)),
            *(processes, gib(expected), gib(on_host), _LEVERS),
        )
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.exists())
    disk, on_disk = needed.disk + processes * needed.spilled - there, shutil.disk_usage(folder).free
    if disk > on_disk:
        raise OSError(
            f"{needed.work}: about {gib(disk)} are needed on the disk of {folder}, {gib(on_disk)} are free; free some"
        )


_LEVERS = "batch_size, the number of samples or tokens_per_layer (per_width), or compute in bfloat16 (dtype)"
_SMALLER_LAYERS = "compute in bfloat16 (dtype), or choose a device with more memory"
