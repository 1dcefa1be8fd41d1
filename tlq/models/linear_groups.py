"""Linear groups: the linears of a decoder layer that read the same input, and the module that absorbs their scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a decoder layer that read the same input.

    Attributes:
        name: short name used in files and reports.
        linears: module paths inside the decoder layer.
        fold: module whose output is the group's input, into which 1/s is folded: a norm, or a linear's rows; None if
            others read the same input, so that the group has no scales.
        fold_last: number of projections of equal size that follow the first one in a fused linear ``fold``, if the last
            of them is the group's input; the first has as many rows as the input has channels. 0 for all rows.
        parent: module whose output error AWQ and MBQ measure; None if they measure the linear itself.
        tokenwise: whether the module around the linears computes each token from its hidden state alone.
        kept: linears that read the same input and stay in full precision; the group's scale goes into their columns.
        gain: the gain of the norm ``fold`` is ``gain + weight``; None takes the decoder's ``norm_offset``.
        aliases: other paths by which engines look for the group's scheme: of linears that this kind of layer lacks, but
            that engines fuse with those of the group, or an engine's own name of one.
        experts: for a group of an expert, the module that holds all experts; it is called with the hidden states
            [tokens, hidden] and with the numbers of the experts [tokens, k] that each token is routed to.
        modality: ``text`` or ``image`` if an expert computes only tokens of it.
    """

    name: str
    linears: tuple[str, ...]
    fold: str | None
    parent: str | None = None
    tokenwise: bool = False
    kept: tuple[str, ...] = ()
    gain: float | None = None
    experts: str | None = None
    fold_last: int = 0
    aliases: tuple[str, ...] = ()
    modality: str | None = None

    @property
    def block(self) -> str:
        """Path of the module around the linears: the attention, the MLP, or the expert."""
        return self.linears[0].rpartition(".")[0]

    @property
    def expert(self) -> int:
        """Number of the expert among those of its layer. Raises ValueError if the group is of no expert."""
        return int(self.block.rpartition(".")[2])


def ending_block(groups: Sequence[LinearGroup]) -> str | None:
    """Path of the module that ends a decoder layer with these groups, if it computes token by token, else None.

    In the last layer it need only run on the tokens that are read.
    """
    last = groups[-1]
    return last.block if last.tokenwise and last.experts is None else None


#: Name of the experts of a layer together, where one name stands for all of their groups.
EXPERTS = "experts"


def is_expert(group: str) -> bool:
    """Whether a group, by its name, belongs to one expert."""
    return group.startswith(f"{EXPERTS}.")


def kind_of(group: str) -> str:
    """The name of a group without the number of the expert: ``experts.down`` of ``experts.3.down``."""
    return f"{EXPERTS}.{group.rpartition('.')[2]}" if is_expert(group) else group


#: Group name -> the group whose output is the output of the same attention or MLP; MBQ's ratio of modalities uses it.
BLOCK_OUTPUT = {
    "qkv": "o_proj",
    "o_proj": "o_proj",
    "conv_in": "conv_out",
    "conv_out": "conv_out",
    "delta_in": "delta_out",
    "delta_out": "delta_out",
    "gate_up": "down",
    "down": "down",
    "shared.gate_up": "shared.down",
    "shared.down": "shared.down",
    EXPERTS: EXPERTS,
}
