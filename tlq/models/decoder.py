"""Run a decoder one layer at a time.

``enter_decoder`` runs the embeddings and the vision tower once and records the arguments of every decoder layer. After
that a layer needs only hidden states: ``run_layer`` runs it, ``observe`` records the inputs of its modules and may stop
at one of them. What a layer leaves for later ones beside its output is in ``tlq.models.carried``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tlq.models.architectures import Architecture
from tlq.models.carried import CarriedArgument, CarriedStates
from tlq.samples import Batch

if TYPE_CHECKING:  # it takes seconds to import, and parameters and flows import this module by way of the recipes
    from transformers import PreTrainedModel

#: What configs call the factor of logits: Cohere 2, Muse Glimmer.
_LOGIT_SCALES = ("logit_scale", "output_multiplier")


class _Stop(Exception):
    """Ends a forward pass early, after everything that is needed has been recorded."""


@dataclass
class LayerCalls:
    """Arguments of all decoder layers, for one micro-batch.

    Attributes:
        hidden_states: [batch, time, hidden], the first layer's input.
        kwargs: one dict per layer (masks, rotary embeddings); layers may share the tensors. Inputs [batch, time, width]
            of one layer alone (the embeddings per layer of Gemma 4) are in host memory.
        injected: one per layer, [batch, time, hidden] that the model adds to the output of the previous layer to make
            the input of this one (visual features of Qwen3-VL, "DeepStack"), or None.
        device: of computation.
        carries: name of the argument in which layers leave keys and values for later ones; None if the model's layers
            take none.
    """

    hidden_states: Tensor
    kwargs: list[dict[str, Any]]
    injected: list[Tensor | None]
    device: torch.device
    carries: str | None = None

    def bind(self, index: int, find: Callable[[str], tuple[Tensor, ...]]) -> tuple[dict[str, Any], CarriedArgument]:
        """Arguments of one call of layer ``index``, and the one among them in which it leaves what later layers read.

        Args:
            find: returns what earlier layers left, by name.
        """
        carried = CarriedArgument(find)
        arguments = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in self.kwargs[index].items()
        }
        return arguments if self.carries is None else {**arguments, self.carries: carried}, carried

    @contextmanager
    def arguments(self, index: int, carried: CarriedStates, number: int) -> Iterator[dict[str, Any]]:
        """Arguments of one call of layer ``index`` inside this context.

        Args:
            carried: what earlier layers of the stream left; what this one leaves is kept there.
            number: of this micro-batch in the stream.
        """
        arguments, own = self.bind(index, partial(carried.find, number))
        yield arguments
        carried.keep(number, own.left)

    def take_hidden_states(self) -> Tensor:
        """Return the first layer's input and drop it from these calls."""
        hidden_states, self.hidden_states = self.hidden_states, torch.empty(0)
        return hidden_states

    def next_input(self, index: int, output: Tensor) -> Tensor:
        """Input of layer ``index`` + 1, [batch, time, hidden], from the output of layer ``index``."""
        following = self.injected[index + 1] if index + 1 < len(self.injected) else None
        return output if following is None else output + following.to(output.device)


def enter_decoder(
    model: nn.Module, architecture: Architecture, batches: Sequence[Batch], device: torch.device | None = None
) -> list[LayerCalls]:
    """Run embeddings and vision tower over ``batches``; record the arguments of the decoder layers."""
    return list(entering(model, architecture, batches, device))


def entering(
    model: nn.Module, architecture: Architecture, batches: Sequence[Batch], device: torch.device | None = None
) -> Iterator[LayerCalls]:
    """``enter_decoder`` one micro-batch at a time, for a caller who moves its hidden states elsewhere."""
    from transformers.cache_utils import KVSharingDict  # seconds, which a stage without a model saves

    layers = architecture.decoder_layers(model)
    device, dtype = device or next(model.parameters()).device, next(layers[0].parameters()).dtype
    for batch in batches:
        with torch.no_grad(), _recorded_arguments(layers) as recorded, _stop_before_head(model):
            model(**to_device(batch.encode(), device, dtype), use_cache=False)
        hidden_states, *injected = [hidden for hidden, _ in recorded]
        assert hidden_states is not None
        every = [kwargs for _, kwargs in recorded]
        carries = next((name for name, value in every[0].items() if isinstance(value, KVSharingDict)), None)
        kwargs = [_kept_arguments(each, hidden_states, carries) for each in every]
        yield LayerCalls(hidden_states, kwargs, [None, *injected], device, carries)


def _kept_arguments(kwargs: dict[str, Any], hidden_states: Tensor, carries: str | None) -> dict[str, Any]:
    """The arguments of a layer without ``carries``; its own inputs [batch, time, width] in host memory."""

    def is_input(value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() == 3 and value.shape[:2] == hidden_states.shape[:2]

    return {name: value.cpu() if is_input(value) else value for name, value in kwargs.items() if name != carries}


@contextmanager
def _recorded_arguments(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor | None, dict[str, Any]]]]:
    """Replace every layer's forward by one that records its arguments and returns zeros.

    With outputs of zero, the input of the next layer is exactly what the model adds in between. Where it adds nothing,
    the record is None and holds no memory.
    """
    recorded: list[tuple[Tensor | None, dict[str, Any]]] = []

    def recorder(names: Sequence[str]) -> Callable[..., Tensor]:
        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            needed = not recorded or bool(hidden_states.any())
            named = dict(zip(names, args, strict=False))
            recorded.append((hidden_states if needed else None, {**named, **kwargs}))
            return torch.zeros_like(hidden_states)

        return record

    for layer in layers:
        layer.forward = recorder(list(inspect.signature(layer.forward).parameters)[1:])
    try:
        yield recorded
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _stop_before_head(model: nn.Module) -> Iterator[None]:
    """Skip the logits: they are the largest tensor of a forward pass and are not needed here."""

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
    """Output of one decoder layer for its input ``hidden_states``, both [batch, time, hidden]."""
    return first_output(layer(hidden_states, **kwargs))


def first_output(output: Any) -> Tensor:
    """The hidden states in what a module returns: alone, or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def observe(
    layer: nn.Module,
    hidden_states: Tensor,
    kwargs: dict[str, Any],
    modules: dict[str, nn.Module],
    stop_at: nn.Module | None = None,
) -> tuple[dict[str, tuple[tuple[Any, ...], dict[str, Any]]], Tensor | None]:
    """Run a layer and record the arguments of each of ``modules``.

    With ``stop_at`` the pass ends at that module, and there is no layer output.

    Returns:
        arguments (positional, keyword) per module name, and the layer's output or None.
    """
    seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[name] = (args, named)
            if module is stop_at:
                raise _Stop

        return hook

    handles = [
        module.register_forward_pre_hook(record(name), with_kwargs=True, prepend=True)
        for name, module in modules.items()
    ]
    try:
        return seen, run_layer(layer, hidden_states, kwargs)
    except _Stop:
        return seen, None
    finally:
        for handle in handles:
            handle.remove()


def answer_logits(model: PreTrainedModel, architecture: Architecture, hidden: Tensor, batch: Batch) -> Tensor:
    """Logits [answer tokens, vocabulary] that predict the answers' tokens, row by row of a micro-batch.

    Args:
        model: has the weights of its final norm and output embeddings.
        hidden: [batch, time, hidden], the last layer's output.
    """
    before_answer = batch.is_answer[:, 1:].to(hidden.device)
    normed = model.get_submodule(architecture.final_norm)(hidden[:, :-1][before_answer])
    embeddings: Any = model.get_output_embeddings()
    logits: Tensor = embeddings(normed)
    text = model.config.get_text_config()
    scale = next((getattr(text, name) for name in _LOGIT_SCALES if getattr(text, name, None)), None)
    scale = scale or 1 / (getattr(text, "logits_scaling", None) or 1)
    cap = getattr(text, "final_logit_softcapping", None)
    logits = logits if scale == 1 else logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def to_device(inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of a model on its device.

    Args:
        dtype: of the model. Pixels in half precision take it: Llama 4's processor makes them so for its own dtype, and
            the model does not convert them. Models convert pixels in float32 themselves.
    """
    half = (torch.bfloat16, torch.float16)
    return {name: value.to(device, dtype if value.dtype in half else None) for name, value in inputs.items()}
