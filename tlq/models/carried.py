"""What decoder layers leave for later ones: keys and values that several layers share (Gemma 4 E2B and E4B).

Such a layer has no key and value projections; it attends with those of the last layer of its kind that has them. They
are a second way from layer to layer, next to the hidden states: a stream keeps them for every micro-batch, and the
gradients of the layers that read them flow into the layer that left them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from tlq.runtime.activations import Activations

#: Keys and values [batch, heads, time, head_dim] by a name; one layer leaves those of a name.
Carried = Mapping[str, tuple[Tensor, ...]]


class CarriedArgument:
    """The argument of one call of a layer in which it finds what earlier layers left, and leaves its own.

    What it leaves is in no stream until ``CarriedStates.keep`` is called: a trial with other weights changes nothing.

    Attributes:
        read: what the layer has read.
        left: what it has left.
    """

    def __init__(self, find: Callable[[str], tuple[Tensor, ...]]) -> None:
        """``find`` returns the tensors of a name; it is called when a layer reads them."""
        self._find = find
        self.read: dict[str, tuple[Tensor, ...]] = {}
        self.left: dict[str, tuple[Tensor, ...]] = {}

    def __getitem__(self, name: str) -> tuple[Tensor, ...]:
        if name not in self.read:
            self.read[name] = self._find(name)
        return self.read[name]

    def __setitem__(self, name: str, tensors: tuple[Tensor, ...]) -> None:
        self.left[name] = tensors


class CarriedStates:
    """What the layers of one stream have left so far, for every micro-batch."""

    def __init__(self, activations: Callable[[], Activations]) -> None:
        """``activations`` returns an empty list of tensors in the stream's memory."""
        self._activations = activations
        self._states: dict[str, tuple[Activations, ...]] = {}

    def find(self, number: int, name: str) -> tuple[Tensor, ...]:
        """The tensors of a name for the micro-batch ``number``, on the compute device."""
        return tuple(states[number] for states in self._states[name])

    def keep(self, number: int, left: Carried) -> None:
        """Keep what a layer left for the micro-batch ``number``, in place of what it left in an earlier call."""
        for name, tensors in left.items():
            kept = self._states.setdefault(name, tuple(self._activations() for _ in tensors))
            for states, tensor in zip(kept, tensors, strict=True):
                if number < len(states):
                    states[number] = tensor
                else:
                    assert number == len(states)
                    states.append(tensor)

    def clear(self) -> None:
        """Release the memory of all tensors."""
        for states in (each for kept in self._states.values() for each in kept):
            states.clear()
        self._states.clear()

    close = clear


def leaving(layers: nn.ModuleList) -> list[int]:
    """Indices of the layers that leave keys and values for later ones."""
    attentions: list[Any] = [getattr(layer, "self_attn", None) for layer in layers]
    return [index for index, each in enumerate(attentions) if getattr(each, "store_full_length_kv", False)]


def carried_width(layers: nn.ModuleList) -> int:
    """Elements per token of what the layers leave for later ones."""
    attentions: list[Any] = [layers[index].self_attn for index in leaving(layers)]
    return sum(2 * each.k_proj.out_features for each in attentions)
