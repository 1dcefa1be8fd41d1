"""The two activation streams through the decoder, one layer at a time, and the inputs of linear groups on them.

The full-precision stream passes through the original layers; its inputs give the target. The exposed stream passes
through the layers and groups that are already quantized, as in the finished model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tlq.calibration.job import CalibrationJob
from tlq.calibration.routing import LEAST_TOKENS, ExpertTokens, expert_tokens
from tlq.models.architectures import get_linear
from tlq.models.carried import CarriedStates
from tlq.models.decoder import LayerCalls, enter_decoder, observe, run_layer
from tlq.models.linear_groups import EXPERTS, LinearGroup, ending_block
from tlq.models.streaming import LayeredModel
from tlq.quantization.errors import Arguments
from tlq.runtime.activations import Activations


@dataclass
class Routed:
    """The input of a layer's experts, by micro-batch.

    Attributes:
        hidden: [tokens, hidden], padding included.
        routes: [tokens, k], numbers of the experts of every token.
        scales: [tokens, experts], by which the router multiplies the experts' inputs; none where it multiplies outputs.
    """

    hidden: Activations
    routes: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)

    def append(self, experts: nn.Module, arguments: Arguments) -> None:
        """Keep the arguments of a call of the module of experts."""
        (hidden, routes, weights), _ = arguments
        self.hidden.append(hidden)
        self.routes.append(routes.cpu())
        if experts.scales_inputs:
            self.scales.append(weights.cpu())

    def scaled(self, number: int, hidden: Tensor, counts: Tensor, expert: int) -> Tensor:
        """The rows of ``hidden`` for which ``counts`` is true, as micro-batch ``number`` enters an expert."""
        rows = _counted(hidden, counts)
        if not self.scales:
            return rows
        return rows * self.scales[number].to(rows.device)[counts.flatten(), expert, None]


@dataclass
class FullPrecision:
    """One layer on the full-precision stream, by micro-batch: group inputs [tokens, in], parents' arguments.

    The inputs of an expert's groups are computed from ``experts`` when they are needed.
    """

    inputs: dict[str, list[Tensor]]
    parents: dict[str, list[Arguments]]
    experts: Routed

    def clear(self) -> None:
        """Release the memory of the experts' input."""
        self.experts.hidden.clear()


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
        self._device, self._memory, self._ranks = model.device, job.memory, job.ranks
        self._valid = [batch.valid for batch in job.batches]
        self._of_modality = {
            "image": [batch.is_image for batch in job.batches],
            "text": [batch.valid & ~batch.is_image for batch in job.batches],
        }
        self._batches = [job.batches[number] for number in self.numbers]
        self._last = len(model.architecture.decoder_layers(model.skeleton)) - 1
        self._parent_of = recipe.error_measure.parent_of
        self.sees_full_precision = recipe.sees("full_precision", job.scheme)
        self.sees_exposed = recipe.sees("exposed", job.scheme)
        self.calls: list[LayerCalls] = []
        if self._batches:
            with job.ranks.clock.phase("enter"), model.entrance() as entered:
                self.calls = enter_decoder(entered, self.architecture, self._batches, model.device)
        first = [call.take_hidden_states() for call in self.calls]
        self.full = self._activations(first if self.sees_full_precision else [])
        self.exposed = self._activations(first if self.sees_exposed else [])
        self._carried_full, self._carried_exposed = (CarriedStates(self._activations) for _ in range(2))
        self._finished: dict[str, Activations] = {}
        self._returns: dict[type, type] = {}
        self._routed: Routed | None = None  # on the stream whose routing decides
        self._routes: Tensor | None = None
        self._expert_tokens: dict[str, ExpertTokens] = {}

    def _activations(self, values: Sequence[Tensor] = ()) -> Activations:
        return Activations(self._memory, self._device, values)

    def weights_of(self, index: int, group: LinearGroup, number: int) -> Tensor:
        """Weights [batch, time] of this rank's micro-batch ``number``."""
        return self._all_weights(index, group)[self.numbers[number]].to(self._device)

    def counted_weights(self, index: int, group: LinearGroup) -> list[Tensor]:
        """Weights [tokens] of the tokens that count in a linear group, by micro-batch of all ranks."""
        return [part[part > 0] for part in self._all_weights(index, group)]

    def _all_weights(self, index: int, group: LinearGroup) -> Sequence[Tensor]:
        if group.experts is None:
            return self._weights[index, group.name]
        return self._expert_tokens[group.name].weights

    def prepare_expert(
        self, index: int, layer: nn.Module, group: LinearGroup, reference: FullPrecision | None
    ) -> ExpertTokens:
        """Decide which tokens count in a group of an expert, by the routing of the exposed stream if there is one.

        All modules before the experts must be final.
        """
        if self._routed is None:
            if reference is None or self.sees_exposed:
                self._routed = self._enter_experts(index, layer, group)
            else:
                self._routed = reference.experts
        if group.name not in self._expert_tokens:
            shared = self._weights.get((index, EXPERTS))
            if shared is None:
                nothing = [torch.zeros(valid.shape) for valid in self._valid]  # no token is routed to the expert
                own = self._weights.get((index, group.name), nothing)
            else:
                own = self._shares_of(group, shared)
            least = LEAST_TOKENS * get_linear(layer, group.linears[0]).in_features
            self._expert_tokens[group.name] = expert_tokens(own, self._tokens_for(group, own), least)
        return self._expert_tokens[group.name]

    def _tokens_for(self, group: LinearGroup, weights: Sequence[Tensor]) -> list[Tensor]:
        """Masks [batch, time] of the tokens that an expert can be given, by micro-batch of all ranks.

        These are the tokens of its modality, if there are any, and those with a weight: the marks before and after an
        image may be routed with it.
        """
        masks = self._of_modality.get(group.modality or "", self._valid)
        masks = masks if any(bool(mask.any()) for mask in masks) else self._valid
        return [mask | (own > 0) for mask, own in zip(masks, weights, strict=True)]

    def _enter_experts(self, index: int, layer: nn.Module, group: LinearGroup) -> Routed:
        """The input of the experts on the exposed stream."""
        assert group.experts is not None
        self._finish_before(index, group)
        module, routed = layer.get_submodule(group.experts), Routed(self._activations())
        for number in range(len(self.exposed)):
            seen = self._observed(index, number, layer, {EXPERTS: module}, module)
            routed.append(module, seen[EXPERTS])
        return routed

    def _shares_of(self, group: LinearGroup, weights: Sequence[Tensor]) -> list[Tensor]:
        """The weights of the tokens that are routed to the group's expert, and 0 for all others."""
        assert self._routed is not None
        if self._routes is None:
            own = iter(self._routed.routes)
            k = self._routed.routes[0].shape[1] if self._routed.routes else 0
            k = int(self._ranks.all_reduce_max(torch.tensor(k, device=self._device)))
            mine = set(self.numbers)
            parts = [
                next(own) if number in mine else torch.zeros(valid.numel(), k, dtype=torch.int64)
                for number, valid in enumerate(self._valid)
            ]
            self._routes = self._ranks.all_reduce(torch.cat(parts).to(self._device)).cpu()
        sent = (self._routes == group.expert).any(1).split([valid.numel() for valid in self._valid])
        return [part * mask.view(part.shape) for part, mask in zip(weights, sent, strict=True)]

    # -- full precision ------------------------------------------------------------------------------------------

    def full_precision(self, index: int, layer: nn.Module) -> FullPrecision | None:
        """Inputs of every group on the full-precision stream, advanced past ``layer``; None if the recipe uses none."""
        if not self.sees_full_precision:
            return None
        every = self.architecture.groups[index]
        groups = [group for group in every if group.experts is None]
        experts = next((group.experts for group in every if group.experts is not None), None)
        parents = {parent for group in groups if (parent := self._parent_of(group)) is not None}
        # The module that ends the last layer runs on the tokens that count only.
        ending = ending_block(groups) if index == self._last and experts is None and not parents else None
        modules = {group.name: _first_linear(layer, group) for group in groups if group.block != ending}
        if ending is not None:
            modules[ending] = layer.get_submodule(ending)
        if experts is not None:
            modules[EXPERTS] = layer.get_submodule(experts)
        modules |= {parent: layer.get_submodule(parent) for parent in parents}
        # Shared experts come before the others in some families, after them in some.
        stop = modules[ending or groups[-1].name] if index == self._last and experts is None else None
        inputs: dict[str, list[Tensor]] = {group.name: [] for group in groups}
        reference = FullPrecision(inputs, {parent: [] for parent in parents}, Routed(self._activations()))
        for number, call in enumerate(self.calls):
            with call.arguments(index, self._carried_full, number) as arguments:
                seen, output = observe(layer, self.full[number], arguments, modules, stop)
            if output is not None and index != self._last:
                self._advance(self.full, index, number, output)
            for group in groups:
                counts = self.weights_of(index, group, number) > 0
                if group.block == ending:
                    (hidden,), _ = seen[ending]
                    rows = _counted(hidden, counts)
                    counted = _input_in_block(modules[ending], _first_linear(layer, group), rows)
                else:
                    (hidden,), _ = seen[group.name]
                    counted = _counted(hidden, counts)
                reference.inputs[group.name].append(_finite(counted, index, group))
            if experts is not None:
                reference.experts.append(modules[EXPERTS], seen[EXPERTS])
            for parent in parents:
                reference.parents[parent].append(seen[parent])
        return reference

    def full_precision_inputs(
        self, index: int, layer: nn.Module, group: LinearGroup, reference: FullPrecision
    ) -> list[Tensor]:
        """Take the inputs [tokens, in] of a group, by micro-batch, out of ``reference``.

        An expert's are computed when its first group asks for them, with weights that are still the original ones.
        """
        if group.name not in reference.inputs:
            block = layer.get_submodule(group.block)
            for each in (each for each in self.architecture.groups[index] if each.block == group.block):
                self.prepare_expert(index, layer, each, reference)
                reference.inputs[each.name] = self._expert_inputs(index, each, block, reference.experts)
        return reference.inputs.pop(group.name)

    def _expert_inputs(self, index: int, group: LinearGroup, block: nn.Module, routed: Routed) -> list[Tensor]:
        """Inputs [tokens, in] of a group of an expert by micro-batch, for the tokens that count in it."""
        first = block.get_submodule(group.linears[0].removeprefix(f"{group.block}."))
        inputs = []
        for number, hidden in enumerate(routed.hidden):
            rows = routed.scaled(number, hidden, self.weights_of(index, group, number) > 0, group.expert)
            inputs.append(_finite(_input_in_block(block, first, rows), index, group))
        return inputs

    def advance_full_precision(self, index: int, layer: nn.Module) -> None:
        """Advance past ``layer``, which an earlier run solved and which still has its original weights."""
        for number in range(len(self.full)):
            with self.calls[number].arguments(index, self._carried_full, number) as arguments:
                output = run_layer(layer, self.full[number], arguments)
            self._advance(self.full, index, number, output)

    # -- exposed -------------------------------------------------------------------------------------------------

    def exposed_inputs(self, index: int, layer: nn.Module, group: LinearGroup) -> tuple[list[Tensor], list[Arguments]]:
        """Inputs of ``group`` [tokens, in] after all groups quantized so far, and its parent module's arguments.

        Both are lists with one entry per micro-batch. From this call on, the modules before the group's own are final.
        """
        if group.experts is not None:
            assert self._routed is not None
            return self._expert_inputs(index, group, layer.get_submodule(group.block), self._routed), []
        self._finish_before(index, group)
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
                seen, _ = observe(block, _counted(hidden, counts), {}, modules, stop)
                (counted,), _ = seen[group.name]
            else:
                seen = self._observed(index, number, layer, modules, stop)
                (hidden,), _ = seen[group.name]
                counted = _counted(hidden, counts)
            rows.append(_finite(counted, index, group))
            if parent is not None:
                parents.append(seen[parent])
        return rows, parents

    def advance_exposed(self, index: int, layer: nn.Module) -> None:
        """Advance past ``layer``, all of whose groups are installed; nothing runs past the last layer."""
        if index != self._last:
            for number in range(len(self.exposed)):
                with self._exposed_call(index, number, layer) as arguments:
                    output = run_layer(layer, self.exposed[number], arguments)
                self._advance(self.exposed, index, number, output)
        for outputs in self._finished.values():
            outputs.clear()
        self._finished.clear()
        if self._routed is not None:
            self._routed.hidden.clear()
        self._routed = self._routes = None
        self._expert_tokens.clear()

    def _finish_before(self, index: int, group: LinearGroup) -> None:
        """From now on the modules before the group's own are final: their outputs are kept."""
        order = [each.experts or each.block for each in self.architecture.groups[index]]
        for path in order[: order.index(group.experts or group.block)]:
            self._finished.setdefault(path, self._activations())

    def _observed(
        self, index: int, number: int, layer: nn.Module, modules: dict[str, nn.Module], stop: nn.Module
    ) -> dict[str, Arguments]:
        """Arguments of ``modules`` on the exposed stream, in a pass that ends at ``stop``."""
        with self._exposed_call(index, number, layer) as arguments:
            return observe(layer, self.exposed[number], arguments, modules, stop)[0]

    @contextmanager
    def _exposed_call(self, index: int, number: int, layer: nn.Module) -> Iterator[dict[str, Any]]:
        """The arguments of one call of ``layer`` on the exposed stream; final modules return their cached outputs.

        Attention last runs after all of its groups, so what it leaves for later layers is final.
        """
        with ExitStack() as stack:
            for path, outputs in self._finished.items():
                stack.enter_context(_shortcut(layer.get_submodule(path), outputs, number, self._returns))
            yield stack.enter_context(self.calls[number].arguments(index, self._carried_exposed, number))

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


def _counted(hidden: Tensor, counts: Tensor) -> Tensor:
    """The rows [tokens, width] of the tokens that count; some modules are called without the dimension of samples."""
    return hidden.reshape(-1, hidden.shape[-1])[counts.flatten()]


def _input_in_block(block: nn.Module, linear: nn.Module, rows: Tensor) -> Tensor:
    """Input [tokens, in] of a linear of ``block`` for the ``rows`` [tokens, width] that enter the block."""
    (inputs,), _ = observe(block, rows, {}, {"linear": linear}, linear)[0]["linear"]
    return inputs


def _first_linear(layer: nn.Module, group: LinearGroup) -> nn.Module:
    return layer.get_submodule(group.linears[0])


def _finite(rows: Tensor, index: int, group: LinearGroup) -> Tensor:
    if not torch.isfinite(rows).all():
        raise FloatingPointError(
            f"layer {index}, group {group.name}: its input is not finite; run in float32 or bfloat16"
        )
    return rows
