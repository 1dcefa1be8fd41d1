"""Run a decoder one layer at a time.

``enter_decoder`` runs the embeddings and the vision tower once and records what every decoder layer would be called
with; after that a layer needs only hidden states, and can be run, stopped at one of its linears, or observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlq.models.architectures import Architecture
from tlq.samples import Batch


class _Stop(Exception):
    """Ends a forward pass early once everything of interest has been seen."""


@dataclass
class LayerCalls:
    """What decoder layers are called with, for one micro-batch.

    Attributes:
        hidden_states: [batch, time, hidden], the first layer's input.
        kwargs: one dict per layer (masks, rotary embeddings); layers may share the tensors.
        injected: one per layer, what the model adds to the hidden states between the layer before and this one
            [batch, time, hidden] (visual features of Qwen3-VL, "DeepStack"), or None.
    """

    hidden_states: Tensor
    kwargs: list[dict[str, Any]]
    injected: list[Tensor | None]

    def take_hidden_states(self) -> Tensor:
        """The first layer's input, which these calls then hold no longer."""
        hidden_states, self.hidden_states = self.hidden_states, torch.empty(0)
        return hidden_states

    def next_input(self, index: int, output: Tensor) -> Tensor:
        """What the layer after layer ``index`` is called with, given the output of layer ``index``."""
        following = self.injected[index + 1] if index + 1 < len(self.injected) else None
        return output if following is None else output + following


@torch.no_grad()
def enter_decoder(
    model: nn.Module, architecture: Architecture, batches: Sequence[Batch], device: torch.device | None = None
) -> list[LayerCalls]:
    """Run embeddings and vision tower over ``batches``; the decoder layers only note their arguments."""
    layers = architecture.decoder_layers(model)
    device = device or next(model.parameters()).device
    calls: list[LayerCalls] = []
    with _layers_noting_arguments(layers) as noted:
        for batch in batches:
            noted.clear()
            with _stop_before_head(model):
                model(**to_device(batch.encode(), device), use_cache=False)
            hidden_states, *injected = [hidden for hidden, _ in noted]
            assert hidden_states is not None
            calls.append(LayerCalls(hidden_states, [kwargs for _, kwargs in noted], [None, *injected]))
    return calls


@contextmanager
def _layers_noting_arguments(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor | None, dict[str, Any]]]]:
    """Replace every layer's forward by one that notes its arguments and returns zeros.

    With zeros for outputs, the next layer's input is exactly what the model adds on the way there; where it adds
    nothing, None is noted and no memory held.
    """
    noted: list[tuple[Tensor | None, dict[str, Any]]] = []

    def note(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        needed = not noted or bool(hidden_states.any())
        noted.append((hidden_states if needed else None, kwargs))
        return torch.zeros_like(hidden_states)

    for layer in layers:
        layer.forward = note
    try:
        yield noted
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _stop_before_head(model: nn.Module) -> Iterator[None]:
    """Do not compute logits: they are the largest tensor of a forward pass and nobody reads them here."""

    def stop(*_: Any) -> None:
        raise _Stop

    handle = model.get_output_embeddings().register_forward_pre_hook(stop)  # type: ignore[operator]
    try:
        yield
    except _Stop:
        return
    finally:
        handle.remove()


def run_layer(layer: nn.Module, hidden_states: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """One decoder layer: hidden states in, hidden states out, [batch, time, hidden] both."""
    output = layer(hidden_states, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def observe(
    layer: nn.Module,
    hidden_states: Tensor,
    kwargs: dict[str, Any],
    modules: dict[str, nn.Module],
    stop_at: nn.Module | None = None,
) -> tuple[dict[str, tuple[tuple[Any, ...], dict[str, Any]]], Tensor | None]:
    """Run a layer and note what each of ``modules`` is called with.

    With ``stop_at`` the pass ends when that module is reached and there is no layer output.

    Returns:
        arguments (positional, keyword) per module name, and the layer's output or None.
    """
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[name] = (args, named)
            if module is stop_at:
                raise _Stop

        return hook

    handles = [
        module.register_forward_pre_hook(note(name), with_kwargs=True, prepend=True) for name, module in modules.items()
    ]
    try:
        return seen, run_layer(layer, hidden_states, kwargs)
    except _Stop:
        return seen, None
    finally:
        for handle in handles:
            handle.remove()


def to_device(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}
