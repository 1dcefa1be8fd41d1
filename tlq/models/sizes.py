"""Bytes of a model's parts and of its activations, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from torch import nn

from tlq.models.architectures import get_linear, head_dim_of
from tlq.models.carried import carried_width
from tlq.models.linear_groups import LinearGroup, ending_block
from tlq.models.streaming import LayeredModel, StreamedModel
from tlq.samples import Batch

_FLOAT = 4


class ActivationSizes:
    """Bytes of a model's activations, in the dtype of computation.

    Attributes:
        layers: number of decoder layers.
        state: a token's hidden state.
    """

    def __init__(self, model: LayeredModel) -> None:
        self.skeleton, self.architecture, self.item = model.skeleton, model.architecture, model.dtype.itemsize
        self.text = self.skeleton.config.get_text_config()
        self.layers = len(self.architecture.decoder_layers(self.skeleton))
        self.state = self.text.hidden_size * self.item

    def inside(self, streams: int) -> int:
        """Hidden states per token that a layer with experts keeps: their input, the output of an MLP next to them."""
        sparse = [groups for groups in self.architecture.kinds if any(group.experts for group in groups)]
        if not sparse:
            return 0
        return streams + any(group.name in ("shared.down", "down") for groups in sparse for group in groups)

    @cached_property
    def alike(self) -> list[int]:
        """For every decoder layer the first one with the same groups, shapes of weights, and kind of attention.

        Layers with the same groups may have heads of other widths (Gemma 4).
        """
        kinds = getattr(self.text, "layer_types", None) or [None] * self.layers
        first: dict[Any, int] = {}
        found = []
        for index, groups in enumerate(self.architecture.groups):
            shapes = tuple(tuple(weight.shape) for weight in self.module(index).parameters())
            found.append(first.setdefault((groups, shapes, kinds[index]), index))
        return found

    def shape(self, index: int, group: LinearGroup) -> tuple[int, int]:
        """Output rows of all linears of a group of layer ``index``, and their input channels."""
        linears = [get_linear(self.module(index), path) for path in group.linears]
        return sum(linear.out_features for linear in linears), linears[0].in_features

    @property
    def carried(self) -> int:
        """Bytes per token of what layers leave for later ones."""
        return carried_width(self.architecture.decoder_layers(self.skeleton)) * self.item

    def calls(self, batches: Sequence[Batch], own: int) -> int:
        """Attention masks, rotary embeddings and inputs per layer of all of this rank's micro-batches."""
        longest = max((batch.valid.shape[1] for batch in batches), default=0)
        head_dim = max(head_dim_of(self.skeleton.config, index) for index in set(self.alike))
        inputs = self.layers * (getattr(self.text, "hidden_size_per_layer_input", None) or 0)
        return own * (longest + 2 * head_dim + inputs) * self.item

    def activations(self, batches: Sequence[Batch], graph: bool) -> int:
        """Activations of a micro-batch inside a decoder layer; with a graph, also those of the backward pass."""
        width = max(
            sum(
                share * linear.out_features + graph * share * linear.in_features
                for linear, share in self._linears(index)
            )
            for index in set(self.alike)
        )
        width = math.ceil(width) + 8 * int(self.text.hidden_size)
        return self._largest(batches) * width * self.item * (1 + graph)

    def graph(self, batches: Sequence[Batch]) -> int:
        """The graph of a micro-batch through all decoder layers and the head, with a layer's gradients.

        A layer keeps the outputs of its linears and what they were computed from: the input of each group, that of the
        activation function, and eight hidden states of norms and residuals (measured by bench.memory). The module that
        ends the last layer runs on the tokens that predict an answer (see ``AnswerLoss``).
        """
        kept, gradients, tokens = 0.0, 0.0, self._largest(batches)
        for index in range(self.layers):
            groups = self.architecture.groups[index]
            ending = ending_block(groups) if index == self.layers - 1 else None
            outputs, inputs = 0.0, []
            for group in groups:
                own = self._share(index, group) * (self._answers(batches) if group.block == ending else tokens)
                rows, width = self.shape(index, group)
                outputs += own * rows
                inputs.append(own * width)
            kept += outputs + sum(inputs) + max(inputs) + tokens * 8 * int(self.text.hidden_size)
            gradients = max(gradients, outputs)
        return math.ceil(kept + gradients) * self.item + self.head(batches) + self.calls(batches, tokens)

    def passed(self, index: int, group: LinearGroup) -> float:
        """Weights of a group of layer ``index`` that a token passes, on average."""
        return self._share(index, group) * math.prod(self.shape(index, group))

    def share_of(self, index: int, block: str) -> float:
        """The share of the work of layer ``index`` that the groups of a module do."""
        groups = self.architecture.groups[index]
        inside = sum(self.passed(index, each) for each in groups if each.block == block)
        return inside / sum(self.passed(index, each) for each in groups)

    def _answers(self, batches: Sequence[Batch]) -> int:
        """Answer tokens of the micro-batch with the most."""
        return max((int(batch.is_answer.sum()) for batch in batches), default=0)

    def _largest(self, batches: Sequence[Batch]) -> int:
        """Tokens of the largest micro-batch."""
        return max((all_tokens(batch) for batch in batches), default=0)

    def _linears(self, index: int) -> Iterator[tuple[nn.Linear, float]]:
        """The linears of a layer, each with the share of the tokens that pass it."""
        for group in self.architecture.groups[index]:
            for path in group.linears:
                yield get_linear(self.module(index), path), self._share(index, group)

    def _share(self, index: int, group: LinearGroup) -> float:
        """The share of a layer's tokens that pass a group: those of an expert are routed to it."""
        if group.experts is None:
            return 1.0
        experts: Any = self.module(index).get_submodule(group.experts)
        per_token = getattr(self.text, "num_experts_per_tok", None) or self.text.top_k_experts
        return float(per_token / len(experts))

    def head(self, batches: Sequence[Batch]) -> int:
        """Output embeddings, and logits of a micro-batch's answers with their gradients."""
        vocabulary = int(self.text.vocab_size)
        return vocabulary * (int(self.text.hidden_size) * self.item + 4 * self._answers(batches) * _FLOAT)

    def module(self, index: int) -> nn.Module:
        return self.architecture.decoder_layers(self.skeleton)[index]


class ModelSizes(ActivationSizes):
    """Bytes of a model's weights and activations, in the dtype of computation.

    Attributes:
        layer: weights of the largest decoder layer.
        outside: weights outside the decoder layers.
        entrance: weights that are read whole to enter the decoder.
        whole: all weights.
    """

    def __init__(self, model: StreamedModel) -> None:
        super().__init__(model)
        self.layer = max(elements(model, model.layer_names(index)) for index in range(self.layers)) * self.item
        self.outside = elements(model, model.outside_names) * self.item
        self.entrance = elements(model, model.entrance_names) * self.item
        self.whole = elements(model, list(model.weight_map)) * self.item

    def enter(self, batches: Sequence[Batch], own: int) -> int:
        """Weights of the vision tower and the connector, the tower's activations, and the first hidden states."""
        pixels = max((batch.size for batch in batches), default=0)
        return self.entrance + own * self.state + 8 * pixels if batches else 0


def elements(model: StreamedModel, names: Sequence[str]) -> int:
    """Elements of the stored tensors with these names; tied weights count once."""
    return sum(math.prod(place.shape) for place in {model.weight_map[name] for name in names})


def all_tokens(batch: Batch) -> int:
    """Tokens of a micro-batch, with padding."""
    return batch.valid.numel()
