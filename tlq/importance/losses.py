"""The losses whose gradients are the importance of tokens, and one pass of micro-batches through the decoder.

A pass keeps the input of every layer; for the gradients each layer is computed once more (gradient checkpointing).
Where the whole model and a micro-batch's graph fit the device, the graph is kept instead. Both give the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from tlq.models.architectures import get_linear
from tlq.models.carried import Carried, CarriedStates
from tlq.models.decoder import LayerCalls, answer_logits, run_layer
from tlq.models.linear_groups import EXPERTS, ending_block
from tlq.models.streaming import LayeredModel
from tlq.quantization.formats import Scheme, WeightQuantizer
from tlq.runtime.activations import Activations, HostMemory
from tlq.runtime.memory import release_freed_memory
from tlq.samples import Batch


class ResidentBatches:
    """Micro-batches of one pass, whose hidden states at every decoder layer are kept.

    Attributes:
        inputs: per decoder layer, its input [batch, time, hidden] of every micro-batch; the last entry is the output of
            the last layer.
        carried: what layers left for later ones.
        keeps_graph: all weights are in memory, and so is the autograd graph of a micro-batch through all layers.
        of_answers: whether the loss reads the last layer's output only at the tokens that predict an answer. Then a
            module that ends the last layer and computes token by token runs on them alone; elsewhere it passes no
            gradient.
    """

    def __init__(
        self,
        model: LayeredModel,
        batches: Sequence[Batch],
        calls: Sequence[LayerCalls],
        memory: HostMemory,
        keeps_graph: bool = False,
        of_answers: bool = False,
    ) -> None:
        self.model, self.batches, self.calls, self.keeps_graph = model, batches, calls, keeps_graph
        self.of_answers = of_answers
        self._memory = memory
        self.inputs = [self._activations(call.take_hidden_states() for call in calls)]
        self.carried = CarriedStates(self._activations)

    def _activations(self, values: Iterable[Tensor] = ()) -> Activations:
        return Activations(self._memory, self.model.device, values)

    @property
    def order(self) -> range:
        """Indices of the decoder layers, in forward order."""
        return range(len(self.model.architecture.decoder_layers(self.model.skeleton)))

    @torch.no_grad()
    def forward(self, index: int, layer: nn.Module) -> None:
        """Append the output of layer ``index`` for every micro-batch."""
        with _deterministic():  # as in ``segment``: both select the same kernel for attention
            self.inputs.append(self._activations(self._outputs(index, layer)))

    def _outputs(self, index: int, layer: nn.Module) -> Iterator[Tensor]:
        """The input of the layer after ``index``, for every micro-batch."""
        for position, call in enumerate(self.calls):
            ending = self._ending(index, layer, position)
            with call.arguments(index, self.carried, position) as arguments, _ending_on_rows(ending):
                output = run_layer(layer, self.inputs[index][position], arguments)
            yield call.next_input(index, output)

    def recompute(self, index: int, position: int, layer: nn.Module) -> Segment:
        """Layer ``index`` once more with an autograd graph, for the micro-batch at ``position``."""
        return self.segment(index, position, layer, self.inputs[index][position])

    def segment(self, index: int, position: int, layer: nn.Module, hidden_states: Tensor) -> Segment:
        """Layer ``index`` with an autograd graph that begins at all it reads, for the micro-batch at ``position``."""

        def find(name: str) -> tuple[Tensor, ...]:
            return tuple(tensor.detach().requires_grad_() for tensor in self.carried.find(position, name))

        arguments, carried = self.calls[position].bind(index, find)
        ending = self._ending(index, layer, position)
        hidden = hidden_states.detach().requires_grad_()
        outputs: dict[str, GroupOutputs] = {}
        handles = []

        def observe(name: str, path: str, subset: Any = None) -> None:
            own = outputs.setdefault(name, GroupOutputs([]))

            def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
                own.outputs.append(output)
                own.tokens = None if subset is None else subset.tokens

            handles.append(layer.get_submodule(path).register_forward_hook(keep))

        for group in self.model.architecture.groups[index]:
            if group.experts is not None and EXPERTS not in outputs:
                observe(EXPERTS, group.experts)
            block = layer.get_submodule(group.block)
            subset = ending if ending is not None and ending.module is block else block if group.experts else None
            for path in group.linears:
                observe(group.name, path, subset)
        try:
            with torch.enable_grad(), _deterministic(), _ending_on_rows(ending):
                output = run_layer(layer, hidden, arguments)
        finally:
            for handle in handles:
                handle.remove()
        return Segment(hidden, output, outputs, carried.read, carried.left)

    def _ending(self, index: int, layer: nn.Module, position: int) -> Ending | None:
        """The module that ends the last layer, with its tokens in a micro-batch; None if it runs on all tokens."""
        block = ending_block(self.model.architecture.groups[index])
        if block is None or index != self.order[-1] or not self.of_answers:
            return None
        tokens = predicting(self.batches[position]).flatten().nonzero().flatten()
        return Ending(layer.get_submodule(block), tokens.to(self.model.device))

    def close(self) -> None:
        """Release the memory of all hidden states."""
        for states in self.inputs:
            states.clear()
        self.carried.clear()
        release_freed_memory()


@dataclass
class Ending:
    """A module that ends a decoder layer, and the tokens of a micro-batch, counted over its rows, that it runs on."""

    module: nn.Module
    tokens: Tensor


@contextmanager
def _ending_on_rows(ending: Ending | None) -> Iterator[None]:
    """Inside this context the module runs on its tokens alone; its output is 0 at all others."""
    if ending is None:
        yield
        return
    module, tokens, compute = ending.module, ending.tokens, ending.module.forward

    def forward(hidden_states: Tensor) -> Tensor:
        flat = hidden_states.flatten(0, -2)
        computed = compute(flat[tokens])
        return torch.zeros_like(flat).index_copy(0, tokens, computed).view_as(hidden_states)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@dataclass
class GroupOutputs:
    """Outputs [tokens, out] of the linears of a group in a pass; none of an expert that no token was routed to.

    Attributes:
        tokens: which tokens of the micro-batch they are, for a group of an expert; None means all.
    """

    outputs: list[Tensor]
    tokens: Tensor | None = None

    def importance(self, gradients: Iterator[Tensor], shape: torch.Size) -> Tensor:
        """g_t of every token, in the ``shape`` [batch, time] of the micro-batch; 0 for tokens that are not here.

        Args:
            gradients: those with respect to the outputs come first.
        """
        if not self.outputs:
            return torch.zeros(shape)
        total = torch.stack([next(gradients).float().abs().sum(-1) for _ in self.outputs]).sum(0)
        mean = total / sum(each.shape[-1] for each in self.outputs)
        if self.tokens is not None:
            mean = torch.zeros(shape.numel(), device=mean.device).index_copy_(0, self.tokens, mean)
        return mean.reshape(shape).cpu()


@dataclass
class Segment:
    """A decoder layer's part of the autograd graph, for one micro-batch.

    Attributes:
        hidden, output: input and output of the layer, [batch, time, hidden].
        outputs: group name -> outputs of the group's linears. ``EXPERTS`` is the name of the output of all experts of
            the layer together.
        read, left: what the layer read of earlier ones, and what it left for later ones.
    """

    hidden: Tensor
    output: Tensor
    outputs: dict[str, GroupOutputs]
    read: Carried
    left: Carried

    def gradients(
        self, output_gradient: Tensor, carried: CarriedGradients | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient with respect to ``hidden``, and g_t [batch, time] of each group: mean over channels of |dL/dy_t|.

        Args:
            carried: gradients of what this layer and others left, from the layers after it; those of what it left are
                taken out, those of what it read are added. None means that the loss is of ``output`` alone.
        """
        carried = {} if carried is None else carried
        linear_outputs = [each for group in self.outputs.values() for each in group.outputs]
        ends, end_gradients = [self.output], [output_gradient]
        for name in (name for name in self.left if name in carried):
            ends += self.left[name]
            end_gradients += carried.pop(name)
        read = [tensor for tensors in self.read.values() for tensor in tensors]
        with _deterministic():
            input_gradient, *rest = torch.autograd.grad(ends, [self.hidden, *linear_outputs, *read], end_gradients)
        gradients, shape = iter(rest), self.hidden.shape[:-1]
        importance = {name: group.importance(gradients, shape) for name, group in self.outputs.items()}
        for name, tensors in self.read.items():
            own = [next(gradients) for _ in tensors]
            carried[name] = [a + b for a, b in zip(carried[name], own, strict=True)] if name in carried else own
        return input_gradient, importance


#: Gradients of what layers left for later ones, by name, of one micro-batch: those of the layers seen so far, added up.
CarriedGradients = dict[str, list[Tensor]]


#: What ``Loss.gradients`` yields: layer, position of the micro-batch in the pass, group name -> g_t [batch, time].
LayerGradients = tuple[int, int, dict[str, Tensor]]


class Loss(Protocol):
    """A loss whose gradient is the importance of a token.

    Attributes:
        keeps_graph: it gains if the graph of a micro-batch through all layers is kept.
        sweeps: how often a pass goes through all layers if no graph is kept.
        of_answers: it reads the last layer's output only at the tokens that predict an answer.
    """

    @property
    def keeps_graph(self) -> bool: ...

    @property
    def sweeps(self) -> int: ...

    @property
    def of_answers(self) -> bool: ...

    def gradients(self, resident: ResidentBatches) -> Iterator[LayerGradients]:
        """g_t of every layer, micro-batch and group, in any order."""
        ...


@dataclass(frozen=True)
class AnswerLoss:
    """The cross-entropy of the answer (TLQ)."""

    keeps_graph: ClassVar[bool] = True
    sweeps: ClassVar[int] = 2
    of_answers: ClassVar[bool] = True

    def gradients(self, resident: ResidentBatches) -> Iterator[LayerGradients]:
        if resident.keeps_graph:
            yield from self._batch_by_batch(resident)
            return
        for index, layer in resident.model.layers(resident.order):
            resident.forward(index, layer)
        with resident.model.head():
            output_gradients = [
                self._last_gradient(resident, position, hidden) for position, hidden in enumerate(resident.inputs[-1])
            ]
        carried: list[CarriedGradients] = [{} for _ in output_gradients]
        for index, layer in resident.model.layers(resident.order[::-1]):
            for position, output_gradient in enumerate(output_gradients):
                segment = resident.recompute(index, position, layer)
                output_gradients[position], values = segment.gradients(output_gradient, carried[position])
                yield index, position, values

    def _batch_by_batch(self, resident: ResidentBatches) -> Iterator[LayerGradients]:
        """Keep a micro-batch's graph from its forward pass to its backward pass, so that no layer is computed twice."""
        for position, call in enumerate(resident.calls):
            hidden, segments = resident.inputs[0][position], []
            for index, layer in resident.model.layers(resident.order):
                segments.append(resident.segment(index, position, layer, hidden))
                resident.carried.keep(position, segments[-1].left)
                hidden = call.next_input(index, segments[-1].output.detach())
            gradient = self._last_gradient(resident, position, hidden)
            carried: CarriedGradients = {}
            for index in resident.order[::-1]:
                gradient, values = segments.pop().gradients(gradient, carried)
                yield index, position, values

    def _last_gradient(self, resident: ResidentBatches, position: int, hidden_states: Tensor) -> Tensor:
        """Gradient of the loss with respect to the last layer's output, [batch, time, hidden]."""
        hidden = hidden_states.detach().requires_grad_()
        batch = resident.batches[position]
        with torch.enable_grad(), _deterministic():
            logits = answer_logits(resident.model.skeleton, resident.model.architecture, hidden, batch)
            loss = answer_loss(logits, batch)
            (gradient,) = torch.autograd.grad(loss, [hidden])
        return gradient


@dataclass(frozen=True)
class BlockLoss:
    """The squared error of each decoder layer's output when its own weights are rounded to nearest (VLMQ).

    Attributes:
        scheme: the number format of the rounded weights.
        checkpoint_dtype: dtype of the checkpoint.
    """

    scheme: Scheme
    checkpoint_dtype: torch.dtype
    keeps_graph: ClassVar[bool] = False  # a layer is rounded once for all micro-batches of a pass
    sweeps: ClassVar[int] = 1
    of_answers: ClassVar[bool] = False

    def gradients(self, resident: ResidentBatches) -> Iterator[LayerGradients]:
        architecture = resident.model.architecture
        for index, layer in resident.model.layers(resident.order):
            resident.forward(index, layer)
            with torch.no_grad(), self._rounded([get_linear(layer, path) for path in architecture.linears(index)]):
                for position, call in enumerate(resident.calls):
                    segment = resident.recompute(index, position, layer)
                    difference = call.next_input(index, segment.output.detach()) - resident.inputs[index + 1][position]
                    difference[~resident.batches[position].valid.to(difference.device)] = 0
                    yield index, position, segment.gradients(2 * difference)[1]

    @contextmanager
    def _rounded(self, linears: Sequence[nn.Linear]) -> Iterator[None]:
        quantizer = WeightQuantizer(self.scheme, self.checkpoint_dtype)
        originals = [linear.weight.data for linear in linears]
        try:
            for linear in linears:
                linear.weight.data = quantizer.fake_quantize(linear.weight.data).to(linear.weight.dtype)
            yield
        finally:
            for linear, original in zip(linears, originals, strict=True):
                linear.weight.data = original


@contextmanager
def _deterministic() -> Iterator[None]:
    """Use torch's deterministic algorithms: on a GPU, attention's backward pass otherwise adds in the order of threads.

    A run that continues after a crash would draw other tokens than the run that crashed. The forward pass selects the
    attention kernel, so it needs this context too. ``CUBLAS_WORKSPACE_CONFIG`` keeps a value that is set already.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def predicting(batch: Batch) -> Tensor:
    """Mask [batch, time] of the tokens whose successor belongs to an answer."""
    return nn.functional.pad(batch.is_answer[:, 1:], (0, 1))


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in nats: mean over each sample's answer tokens, summed over samples.

    Args:
        logits: [answer tokens, vocabulary], the predictions of the answers' tokens, row by row of the batch.

    Raises:
        FloatingPointError: the loss of a sample is not finite.
    """
    mask = batch.is_answer[:, 1:].to(logits.device)
    targets = batch.input_ids[:, 1:].to(logits.device)[mask]
    per_token = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    losses = torch.zeros(mask.shape, device=logits.device).masked_scatter(mask, per_token)
    per_sample = losses.sum(1) / mask.sum(1)
    if not torch.isfinite(per_sample).all():
        row = int((~torch.isfinite(per_sample)).nonzero()[0])
        raise FloatingPointError(
            f"sample number {batch.samples[row]}: its loss is not finite; check the model's weights and dtype"
        )
    return per_sample.sum()
