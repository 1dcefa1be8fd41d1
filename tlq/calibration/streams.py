"""The two activation streams through the decoder, one layer at a time, and the inputs of linear groups on them.

The full-precision stream passes through the original layers; its inputs give the target. The exposed stream passes
through the layers and groups that are already quantized, as in the finished model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlq.calibration.job import CalibrationJob
from tlq.models.architectures import LinearGroup
from tlq.models.decoder import LayerCalls, enter_decoder, observe, run_layer
from tlq.models.streaming import LayeredModel
from tlq.quantization.errors import Arguments
from tlq.runtime.activations import Activations


@dataclass
class FullPrecision:
    """One layer on the full-precision stream, by micro-batch: group inputs [tokens, in], parents' arguments."""

    inputs: dict[str, list[Tensor]]
    parents: dict[str, list[Arguments]]


class Streams:
    """Hidden states of this rank's micro-batches on both streams.

    Computation is lazy. On the exposed stream the output of a module is cached after its last group is solved. A module
    that computes token by token runs only on the tokens with a weight. Nothing runs after the last group.

    Attributes:
        numbers: indices of this rank's micro-batches among all.
        full, exposed: hidden states before the current layer; empty for a stream that the recipe does not use.
    """

    def __init__(self, model: LayeredModel, job: CalibrationJob) -> None:
        recipe = job.recipe
        self.architecture, self.numbers, self._weights = model.architecture, job.own_batches, job.weights
        self._device, self._memory = model.device, job.memory
        self._batches = [job.batches[number] for number in self.numbers]
        self._last = len(model.architecture.decoder_layers(model.skeleton)) - 1
        self._parent_of = recipe.error_measure.parent_of
        self.sees_full_precision = recipe.sees("full_precision", job.scheme)
        self.sees_exposed = recipe.sees("exposed", job.scheme)
        self.calls: list[LayerCalls] = []
        if self._batches:
            with job.ranks.clock.phase("enter"), model.outside() as entered:
                self.calls = enter_decoder(entered, self.architecture, self._batches, model.device)
        first = [call.take_hidden_states() for call in self.calls]
        self.full = self._activations(first if self.sees_full_precision else [])
        self.exposed = self._activations(first if self.sees_exposed else [])
        self._finished: dict[str, Activations] = {}
        self._returns: dict[type, type] = {}

    def _activations(self, values: Sequence[Tensor] = ()) -> Activations:
        return Activations(self._memory, self._device, values)

    def weights_of(self, index: int, group: LinearGroup, number: int) -> Tensor:
        """Weights [batch, time] of this rank's micro-batch ``number``."""
        return self._weights[index, group.name][self.numbers[number]].to(self._device)

    # -- full precision ------------------------------------------------------------------------------------------

    def full_precision(self, index: int, layer: nn.Module) -> FullPrecision | None:
        """Inputs of every group on the full-precision stream, advanced past ``layer``; None if the recipe uses none."""
        if not self.sees_full_precision:
            return None
        groups = self.architecture.groups[index]
        modules = {group.name: _first_linear(layer, group) for group in groups}
        parents = {parent for group in groups if (parent := self._parent_of(group)) is not None}
        modules |= {parent: layer.get_submodule(parent) for parent in parents}
        stop = modules[groups[-1].name] if index == self._last else None
        reference = FullPrecision({group.name: [] for group in groups}, {parent: [] for parent in parents})
        for number, call in enumerate(self.calls):
            seen, output = observe(layer, self.full[number], call.kwargs[index], modules, stop)
            if output is not None:
                self._advance(self.full, index, number, output)
            for group in groups:
                (hidden,), _ = seen[group.name]
                counts = self.weights_of(index, group, number) > 0
                reference.inputs[group.name].append(_finite(hidden[counts], index, group))
            for parent in parents:
                reference.parents[parent].append(seen[parent])
        return reference

    def advance_full_precision(self, index: int, layer: nn.Module) -> None:
        """Advance past ``layer``, which an earlier run solved and which still has its original weights."""
        for number in range(len(self.full)):
            self._advance(
                self.full, index, number, run_layer(layer, self.full[number], self.calls[number].kwargs[index])
            )

    # -- exposed -------------------------------------------------------------------------------------------------

    def exposed_inputs(self, index: int, layer: nn.Module, group: LinearGroup) -> tuple[list[Tensor], list[Arguments]]:
        """Inputs of ``group`` [tokens, in] after all groups quantized so far, and its parent module's arguments.

        Both are lists with one entry per micro-batch. From this call on, the modules before the group's own are final.
        """
        order = [each.block for each in self.architecture.groups[index]]
        for path in order[: order.index(group.block)]:
            self._finished.setdefault(path, self._activations())
        stop = _first_linear(layer, group)
        modules, parent = {group.name: stop}, self._parent_of(group)
        if parent is not None:
            modules[parent] = layer.get_submodule(parent)
        rows, parents = [], []
        for number in range(len(self.exposed)):
            counts = self.weights_of(index, group, number) > 0
            if group.tokenwise:
                block = layer.get_submodule(group.block)
                (hidden,), _ = self._observed(index, number, layer, {group.block: block}, block)[group.block]
                seen, _ = observe(block, hidden[counts], {}, modules, stop)
                (counted,), _ = seen[group.name]
            else:
                seen = self._observed(index, number, layer, modules, stop)
                (hidden,), _ = seen[group.name]
                counted = hidden[counts]
            rows.append(_finite(counted, index, group))
            if parent is not None:
                parents.append(seen[parent])
        return rows, parents

    def advance_exposed(self, index: int, layer: nn.Module) -> None:
        """Advance past ``layer``, all of whose groups are installed; nothing runs past the last layer."""
        if index != self._last:
            for number in range(len(self.exposed)):
                with self._shortcuts(layer, number):
                    output = run_layer(layer, self.exposed[number], self.calls[number].kwargs[index])
                self._advance(self.exposed, index, number, output)
        for outputs in self._finished.values():
            outputs.clear()
        self._finished.clear()

    def _observed(
        self, index: int, number: int, layer: nn.Module, modules: dict[str, nn.Module], stop: nn.Module
    ) -> dict[str, Arguments]:
        """Arguments of ``modules`` on the exposed stream, in a pass that ends at ``stop``."""
        with self._shortcuts(layer, number):
            return observe(layer, self.exposed[number], self.calls[number].kwargs[index], modules, stop)[0]

    @contextmanager
    def _shortcuts(self, layer: nn.Module, number: int) -> Iterator[None]:
        with ExitStack() as stack:
            for path, outputs in self._finished.items():
                stack.enter_context(_shortcut(layer.get_submodule(path), outputs, number, self._returns))
            yield

    # ------------------------------------------------------------------------------------------------------------

    def _advance(self, stream: Activations, index: int, number: int, output: Tensor) -> None:
        if not torch.isfinite(output[self._batches[number].valid.to(output.device)]).all():
            raise FloatingPointError(f"layer {index}: its output is not finite; run in float32 or bfloat16")
        stream[number] = self.calls[number].next_input(index, output)


@contextmanager
def _shortcut(module: nn.Module, outputs: Activations, number: int, returns: dict[type, type]) -> Iterator[None]:
    """Inside this context ``module``, whose output is final, returns its cached output for micro-batch ``number``.

    Args:
        outputs: cached outputs of the micro-batches so far; the next output is computed and appended.
        returns: what a class of modules returns, noted here: attention a tuple, an MLP or a delta net a tensor.
    """
    compute = module.forward

    def forward(*args: Any, **named: Any) -> Any:
        if number < len(outputs):
            return (outputs[number], None) if returns[type(module)] is tuple else outputs[number]
        returned = compute(*args, **named)
        returns[type(module)] = type(returned)
        outputs.append(returned[0] if isinstance(returned, tuple) else returned)
        return returned

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _first_linear(layer: nn.Module, group: LinearGroup) -> nn.Module:
    return layer.get_submodule(group.linears[0])


def _finite(rows: Tensor, index: int, group: LinearGroup) -> Tensor:
    if not torch.isfinite(rows).all():
        raise FloatingPointError(
            f"layer {index}, group {group.name}: its input is not finite; run in float32 or bfloat16"
        )
    return rows
