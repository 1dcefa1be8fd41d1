"""What a calibration will need, worked out before any long work: bytes per layer, tokens, memory, disk.

Everything follows from shapes: the model is never loaded. An impossible job is refused in seconds, with the number
found and the number needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from tlq.architectures import LinearGroup, get_linear
from tlq.calibrate import check_shapes
from tlq.quantizer import Scheme
from tlq.ranks import Ranks, shard_ranges
from tlq.recipes import Recipe
from tlq.samples import Batch
from tlq.streaming import StreamedModel
from tlq.weights import TokenWeights

_FLOAT = 4
_DOUBLE = 8
#: Candidates and activations of one micro-batch at work beside what is counted below, measured on small models.
_SLACK = 1.25


@dataclass(frozen=True)
class Plan:
    """Needs of one rank of a calibration, in bytes where not said otherwise.

    Attributes:
        layers: decoder layers.
        tokens: tokens of all micro-batches, padding included.
        counted: tokens of the largest group whose error counts.
        layer: weights of the largest decoder layer, as computed with.
        outside: weights of everything else.
        hidden_states: of this rank's micro-batches on the paths that the recipe needs; host memory, or disk.
        device: expected peak on the compute device.
        export: size of the result and of the state beside it.
    """

    layers: int
    tokens: int
    counted: int
    layer: int
    outside: int
    hidden_states: int
    device: int
    export: int

    def lines(self) -> list[str]:
        """The plan for a person to read."""
        return [
            f"{self.layers} decoder layers of up to {gib(self.layer)}, {gib(self.outside)} outside them",
            f"{self.tokens} tokens, up to {self.counted} of them counted in a linear group",
            f"expected peak per rank: {gib(self.device)} on the device, {gib(self.hidden_states)} of hidden states",
            f"disk: {gib(self.export)} for the result and the state beside it",
        ]


def gib(size: int) -> str:
    """Bytes for a person to read."""
    return f"{size / 2**30:.2f} GiB"


def plan(
    model: StreamedModel, batches: Sequence[Batch], weights: TokenWeights, recipe: Recipe, scheme: Scheme, ranks: Ranks
) -> Plan:
    """What the job will need.

    Raises:
        ValueError: a group size does not divide a layer's width, an override matches nothing, a linear is missing.
    """
    check_shapes(model.skeleton, model.architecture, scheme)
    count = len(model.architecture.decoder_layers(model.skeleton))
    hidden = model.skeleton.config.get_text_config().hidden_size
    item = model.dtype.itemsize
    layer = max(_elements(model, model.layer_names(index)) for index in range(count)) * item
    outside = _elements(model, model.outside_names) * item
    tokens = sum(batch.valid.numel() for batch in batches)
    own = _own_tokens(batches, ranks)
    paths = (recipe.inputs_for(scheme) == "exposed") + ("full_precision" in (recipe.inputs_for(scheme), recipe.target))
    counted = max((sum(int((part > 0).sum()) for part in parts) for parts in weights.values()), default=0)
    work = max(_group_bytes(model, group, counted, own, recipe, item) for group in model.architecture.groups)
    micro_batch = max((batch.valid.numel() for batch in batches), default=0) * hidden * item
    return Plan(
        layers=count,
        tokens=tokens,
        counted=counted,
        layer=layer,
        outside=outside,
        hidden_states=own * hidden * item * paths if recipe.needs_data else 0,
        device=int(_SLACK * max(2 * layer + work + 8 * micro_batch, outside + 8 * micro_batch)),
        export=2 * sum(file.stat().st_size for file in {place.file for place in model.stored.values()}),
    )


def _elements(model: StreamedModel, names: Sequence[str]) -> int:
    parameters = model.skeleton.state_dict()
    return sum(parameters[name].numel() for name in names)


def _own_tokens(batches: Sequence[Batch], ranks: Ranks) -> int:
    """Tokens of this rank's micro-batches, padding included."""
    shards = shard_ranges(len(batches))
    own = [number for shard in ranks.own_shards(len(shards)) for number in shards[shard]]
    return sum(batches[number].valid.numel() for number in own)


def _group_bytes(model: StreamedModel, group: LinearGroup, counted: int, own: int, recipe: Recipe, item: int) -> int:
    """Working memory of one linear group: its inputs, a few copies of its weight, its second moments."""
    linears = [get_linear(model.architecture.decoder_layers(model.skeleton)[0], path) for path in group.linears]
    width, rows = linears[0].in_features, sum(linear.out_features for linear in linears)
    weight = 4 * rows * width * _FLOAT
    if not recipe.needs_data:
        return weight
    inputs = min(counted, own) * (2 * width * item + rows * _FLOAT)
    compensated = recipe.rounding == "compensated"
    moments = 5 * width * width * _FLOAT if compensated or counted > width else 0
    if compensated:
        moments += 3 * width * width * _DOUBLE
    return weight + inputs + moments


def refuse_impossible(needed: Plan, out: Path, ranks: Ranks) -> None:
    """Compare the plan with what this machine has.

    Raises:
        MemoryError: the device is too small.
        OSError: the disk is.
    """
    free = _device_memory(ranks.device)
    if needed.device > free:
        where = "the device" if ranks.device.type == "cuda" else "this host"
        raise MemoryError(
            f"one rank needs about {gib(needed.device)} on {where}, {gib(free)} are free; lower calibrate.batch_size, "
            "use fewer samples or tokens_per_layer, or set model.dtype to bfloat16"
        )
    folder = next(parent for parent in (out, *out.absolute().parents) if parent.exists())
    disk = shutil.disk_usage(folder).free
    if needed.export > disk:
        raise OSError(
            f"{folder}: {gib(needed.export)} are needed for the result, {gib(disk)} are free; free some space"
        )


def _device_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
