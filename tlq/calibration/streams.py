"""The two paths through the decoder, one layer at a time, and what the linear groups of a layer see on them.

On the full-precision path the layers are what they were; its inputs give the target. On the exposed path they are
quantized as far as calibration has come, and so are a layer's groups behind the one at hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlq.importance.token_weights import TokenWeights
from tlq.models.architectures import LinearGroup
from tlq.models.decoder import LayerCalls, enter_decoder, observe, run_layer
from tlq.models.streaming import LayeredModel
from tlq.parallel import Ranks
from tlq.quantization.formats import Scheme
from tlq.quantization.search import Arguments
from tlq.recipes import Recipe
from tlq.runtime.activations import Activations, HostMemory
from tlq.samples import Batch


@dataclass
class FullPrecision:
    """One layer on the full-precision path, by micro-batch: group inputs [tokens, in], parents' arguments."""

    inputs: dict[str, list[Tensor]]
    parents: dict[str, list[Arguments]]


class Paths:
    """Hidden states of this rank's micro-batches on both paths.

    Nothing is computed that nobody looks at: on the exposed path a module is run once after its last group is solved,
    a module that computes token by token is run on the tokens that count, and no path goes behind the last group.

    Attributes:
        numbers: numbers of the micro-batches.
        full, exposed: hidden states before the layer at hand; empty for a path that the recipe does not look at.
    """

    def __init__(
        self,
        model: LayeredModel,
        batches: Sequence[Batch],
        numbers: Sequence[int],
        weights: TokenWeights,
        recipe: Recipe,
        scheme: Scheme,
        ranks: Ranks,
        memory: HostMemory,
    ) -> None:
        """``batches`` and ``weights`` are those of all ranks, ``numbers`` says which are this one's."""
        self.architecture, self.numbers, self._weights = model.architecture, numbers, weights
        self._device = model.device
        self._batches = [batches[number] for number in numbers]
        self._last = len(model.architecture.decoder_layers(model.skeleton)) - 1
        self._by_parent = recipe.equalization.error == "parent"
        self.sees_full_precision = recipe.sees("full_precision", scheme)
        self.sees_exposed = recipe.sees("exposed", scheme)
        self.calls: list[LayerCalls] = []
        if self._batches:
            with ranks.clock.phase("enter"), model.outside() as entered:
                self.calls = enter_decoder(entered, self.architecture, self._batches, model.device)
        first = [call.take_hidden_states() for call in self.calls]
        self._memory = memory
        self.full = self._activations(first if self.sees_full_precision else [])
        self.exposed = self._activations(first if self.sees_exposed else [])
        self._finished: dict[str, Activations] = {}

    def _activations(self, values: Sequence[Tensor] = ()) -> Activations:
        return Activations(self._memory, self._device, values)

    def weights_of(self, index: int, group: LinearGroup, number: int) -> Tensor:
        """Weights [batch, time] of this rank's micro-batch ``number``."""
        return self._weights[index, group.name][self.numbers[number]].to(self._device)

    # -- full precision ------------------------------------------------------------------------------------------

    def full_precision(self, index: int, layer: nn.Module) -> FullPrecision | None:
        """Inputs of every group on the full-precision path, advanced past ``layer``; None if nobody looks at it."""
        if not self.sees_full_precision:
            return None
        groups = self.architecture.groups
        modules = {group.name: _first_linear(layer, group) for group in groups}
        parents = {group.parent for group in groups if group.parent and self._by_parent}
        modules |= {parent: layer.get_submodule(parent) for parent in parents}
        stop = modules[groups[-1].name] if index == self._last else None
        found = FullPrecision({group.name: [] for group in groups}, {parent: [] for parent in parents})
        for number, call in enumerate(self.calls):
            seen, output = observe(layer, self.full[number], call.kwargs[index], modules, stop)
            if output is not None:
                self._advance(self.full, index, number, output)
            for group in groups:
                (hidden,), _ = seen[group.name]
                counts = self.weights_of(index, group, number) > 0
                found.inputs[group.name].append(_finite(hidden[counts], index, group))
            for parent in parents:
                found.parents[parent].append(seen[parent])
        return found

    def advance_full_precision(self, index: int, layer: nn.Module) -> None:
        """Past ``layer``, which was solved before and still has its own weights."""
        for number in range(len(self.full)):
            self._advance(
                self.full, index, number, run_layer(layer, self.full[number], self.calls[number].kwargs[index])
            )

    # -- exposed -------------------------------------------------------------------------------------------------

    def exposed_inputs(self, index: int, layer: nn.Module, group: LinearGroup) -> tuple[list[Tensor], list[Arguments]]:
        """Inputs of ``group`` [tokens, in] behind everything quantized so far, and its parent module's arguments.

        Both are given by micro-batch. What comes before the module that the group is part of is final from now on.
        """
        order = [each.block for each in self.architecture.groups]
        for path in order[: order.index(group.block)]:
            self._finished.setdefault(path, self._activations())
        stop = _first_linear(layer, group)
        modules = {group.name: stop}
        if group.parent and self._by_parent:
            modules[group.parent] = layer.get_submodule(group.parent)
        rows, parents = [], []
        for number in range(len(self.exposed)):
            counts = self.weights_of(index, group, number) > 0
            if group.tokenwise:
                block = layer.get_submodule(group.block)
                (hidden,), _ = self._observed(index, number, layer, {group.block: block}, block)[group.block]
                seen, _ = observe(block, hidden[counts], {}, modules, stop)
                (chosen,), _ = seen[group.name]
            else:
                seen = self._observed(index, number, layer, modules, stop)
                (hidden,), _ = seen[group.name]
                chosen = hidden[counts]
            rows.append(_finite(chosen, index, group))
            if group.parent in modules:
                parents.append(seen[group.parent])
        return rows, parents

    def advance_exposed(self, index: int, layer: nn.Module) -> None:
        """Past ``layer``, all of whose groups are installed; nobody looks behind the last."""
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
        """What ``modules`` are called with on the exposed path up to ``stop``."""
        with self._shortcuts(layer, number):
            return observe(layer, self.exposed[number], self.calls[number].kwargs[index], modules, stop)[0]

    @contextmanager
    def _shortcuts(self, layer: nn.Module, number: int) -> Iterator[None]:
        with ExitStack() as stack:
            for path, outputs in self._finished.items():
                stack.enter_context(_shortcut(layer.get_submodule(path), outputs, number))
            yield

    # ------------------------------------------------------------------------------------------------------------

    def _advance(self, path: Activations, index: int, number: int, output: Tensor) -> None:
        if not torch.isfinite(output[self._batches[number].valid.to(output.device)]).all():
            raise FloatingPointError(
                f"layer {index}: its output is not finite; run in float32 or bfloat16 (model.dtype)"
            )
        path[number] = self.calls[number].next_input(index, output)


@contextmanager
def _shortcut(module: nn.Module, outputs: Activations, number: int) -> Iterator[None]:
    """Let ``module``, whose output is final, return what it returned for micro-batch ``number`` before.

    Args:
        outputs: of the micro-batches so far; that of the following one is computed and appended.
    """
    compute = module.forward

    def forward(*args: Any, **named: Any) -> Any:
        if number < len(outputs):
            return outputs[number], None
        found = compute(*args, **named)
        outputs.append(found[0])
        return found

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
            f"layer {index}, group {group.name}: its input is not finite; run in float32 or bfloat16 (model.dtype)"
        )
    return rows
