"""The losses whose gradients are the importance of tokens, and one pass of micro-batches through the decoder.

A pass keeps the input of every layer; for the gradients each layer is computed once more (gradient checkpointing).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tlq.models.architectures import EXPERTS, get_linear
from tlq.models.decoder import LayerCalls, answer_logits, run_layer
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
    """

    def __init__(
        self, model: LayeredModel, batches: Sequence[Batch], calls: Sequence[LayerCalls], memory: HostMemory
    ) -> None:
        self.model, self.batches, self.calls = model, batches, calls
        self._memory = memory
        self.inputs = [self._activations(call.take_hidden_states() for call in calls)]

    def _activations(self, values: Iterable[Tensor]) -> Activations:
        return Activations(self._memory, self.model.device, values)

    @property
    def order(self) -> range:
        """Indices of the decoder layers, in forward order."""
        return range(len(self.model.architecture.decoder_layers(self.model.skeleton)))

    @torch.no_grad()
    def forward(self, index: int, layer: nn.Module) -> None:
        """Append the output of layer ``index`` for every micro-batch."""
        self.inputs.append(
            self._activations(
                call.next_input(index, run_layer(layer, self.inputs[index][position], call.kwargs[index]))
                for position, call in enumerate(self.calls)
            )
        )

    def recompute(self, index: int, position: int, layer: nn.Module) -> tuple[Tensor, Tensor, dict[str, GroupOutputs]]:
        """Layer ``index`` once more with an autograd graph, for the micro-batch at ``position``.

        Returns:
            its input, its output, and group name -> outputs of the group's linears. ``EXPERTS`` is the name of the
            output of all experts of the layer together.
        """
        hidden = self.inputs[index][position].detach().requires_grad_()
        outputs: dict[str, GroupOutputs] = {}
        handles = []

        def observe(name: str, path: str, expert: Any = None) -> None:
            own = outputs.setdefault(name, GroupOutputs([]))

            def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
                own.outputs.append(output)
                own.tokens = None if expert is None else expert.tokens

            handles.append(layer.get_submodule(path).register_forward_hook(keep))

        for group in self.model.architecture.groups[index]:
            if group.experts is not None and EXPERTS not in outputs:
                observe(EXPERTS, group.experts)
            for path in group.linears:
                observe(group.name, path, layer.get_submodule(group.block) if group.experts else None)
        try:
            with torch.enable_grad(), _deterministic():
                output = run_layer(layer, hidden, self.calls[position].kwargs[index])
        finally:
            for handle in handles:
                handle.remove()
        return hidden, output, outputs

    def close(self) -> None:
        """Release the memory of all hidden states."""
        for states in self.inputs:
            states.clear()
        release_freed_memory()


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


#: What ``Loss.gradients`` yields: layer, position of the micro-batch in the pass, group name -> g_t [batch, time].
LayerGradients = tuple[int, int, dict[str, Tensor]]


class Loss(Protocol):
    """A loss whose gradient is the importance of a token."""

    def gradients(self, resident: ResidentBatches) -> Iterator[LayerGradients]:
        """g_t of every layer, micro-batch and group, in any order."""
        ...


@dataclass(frozen=True)
class AnswerLoss:
    """The cross-entropy of the answer (TLQ)."""

    def gradients(self, resident: ResidentBatches) -> Iterator[LayerGradients]:
        for index, layer in resident.model.layers(resident.order):
            resident.forward(index, layer)
        with resident.model.head():
            output_gradients = [self._last_gradient(resident, position) for position in range(len(resident.batches))]
        for index, layer in resident.model.layers(resident.order[::-1]):
            for position, output_gradient in enumerate(output_gradients):
                hidden, output, outputs = resident.recompute(index, position, layer)
                output_gradients[position], values = _gradients(output, output_gradient, hidden, outputs)
                yield index, position, values

    def _last_gradient(self, resident: ResidentBatches, position: int) -> Tensor:
        """Gradient of the loss with respect to the last layer's output, [batch, time, hidden]."""
        hidden = resident.inputs[-1][position].detach().requires_grad_()
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

    def gradients(self, resident: ResidentBatches) -> Iterator[LayerGradients]:
        architecture = resident.model.architecture
        for index, layer in resident.model.layers(resident.order):
            resident.forward(index, layer)
            with torch.no_grad(), self._rounded([get_linear(layer, path) for path in architecture.linears(index)]):
                for position, call in enumerate(resident.calls):
                    hidden, output, outputs = resident.recompute(index, position, layer)
                    difference = call.next_input(index, output.detach()) - resident.inputs[index + 1][position]
                    difference[~resident.batches[position].valid.to(difference.device)] = 0
                    yield index, position, _gradients(output, 2 * difference, hidden, outputs)[1]

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


def _gradients(
    output: Tensor, output_gradient: Tensor, hidden: Tensor, outputs: dict[str, GroupOutputs]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient with respect to ``hidden``, and g_t [batch, time] of every group: mean over channels of |dL/dy_t|."""
    linear_outputs = [each for group in outputs.values() for each in group.outputs]
    with _deterministic():
        input_gradient, *rest = torch.autograd.grad(output, [hidden, *linear_outputs], output_gradient)
    gradients = iter(rest)
    return input_gradient, {name: group.importance(gradients, hidden.shape[:-1]) for name, group in outputs.items()}


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
