"""The architecture of a model: its linear groups, layer by layer, from its config.

A model is a family (``FAMILIES``: vision tower, connector, and where the decoder is) around a text decoder
(``DECODERS``: its linears and norms), so supporting another one is one more row in either table.
``tlq families`` lists the families.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from tlq.models.families import FAMILIES
from tlq.models.linear_groups import LinearGroup
from tlq.models.text_decoders import DECODERS, UNSUPPORTED

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Architecture:
    """The rows of a model's family and decoder together: everything that calibration and export need.

    Attributes:
        groups: the linear groups of every decoder layer.
        norm: name of the norm after the last layer.
        ungrouped: linears inside decoder layers that are in no group and stay in full precision.
        joined: whether checkpoints keep several linears of a layer in one tensor.
    """

    model_type: str
    layers: str
    groups: tuple[tuple[LinearGroup, ...], ...]
    norm_offset: float
    ignore: tuple[str, ...]
    norm: str = "norm"
    ungrouped: tuple[str, ...] = ()
    joined: bool = False

    def linears(self, layer: int) -> list[str]:
        """Paths of the linears inside a decoder layer, in group order."""
        return [path for group in self.groups[layer] for path in group.linears]

    @cached_property
    def kinds(self) -> dict[tuple[LinearGroup, ...], int]:
        """The kinds of layers by their groups, and the first layer of each."""
        return {groups: self.groups.index(groups) for groups in self.groups}

    @cached_property
    def kept(self) -> list[str]:
        """Paths of linears and routers inside decoder layers that stay in full precision, each once."""
        of_groups = (path for groups in self.kinds for group in groups for path in group.kept)
        return list(dict.fromkeys((*self.ungrouped, *of_groups)))

    @cached_property
    def experts(self) -> str | None:
        """Path inside a decoder layer of the module that holds experts; None if no layer has any."""
        return next((group.experts for groups in self.kinds for group in groups if group.experts), None)

    @property
    def loads_in_transformers(self) -> bool:
        """Whether transformers loads a quantized checkpoint; `tlq.load_model` loads every one."""
        return self.experts is None and not self.joined

    @property
    def final_norm(self) -> str:
        """Module path of the norm after the last decoder layer."""
        return self.layers.removesuffix("layers") + self.norm

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        return cast(nn.ModuleList, model.get_submodule(self.layers))


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a model, from its config alone.

    Raises:
        ValueError: its family or its decoder is not supported; the message gives the reason in ``UNSUPPORTED``.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"model type {config.model_type!r} is not supported{_because(config.model_type)}; choose a model of one "
            f"of: {', '.join(FAMILIES)}, or add a row to FAMILIES in tlq/models/families.py"
        )
    text_type = config.get_text_config().model_type
    decoder = DECODERS.get(text_type)
    if decoder is None:
        raise ValueError(
            f"model type {config.model_type!r} with decoder {text_type!r} is not supported{_because(text_type)}; "
            f"choose a model whose decoder is one of: {', '.join(DECODERS)}, or add a row to DECODERS in "
            "tlq/models/text_decoders.py"
        )
    text = config.get_text_config()
    return Architecture(
        config.model_type,
        family.layers,
        decoder.layers(text),
        decoder.norm_offset,
        family.ignore,
        decoder.final_norm,
        decoder.ungrouped(text),
        family.joined,
    )


def _because(model_type: str) -> str:
    return f": {UNSUPPORTED[model_type]}" if model_type in UNSUPPORTED else ""


def get_linear(layer: nn.Module, path: str) -> nn.Linear:
    """The linear at ``path`` of a decoder layer.

    Raises:
        ValueError: there is none (fused, or a mixture of experts), or it is not a plain linear (already quantized).
    """
    module = layer
    for name in path.split("."):
        if name not in dict(module.named_children()):
            children = ", ".join(child for child, _ in module.named_children())
            raise ValueError(
                f"{path}: there is no {name} in {type(module).__name__}, which has {children}; "
                "fused linears, and experts without a row, are not supported; choose a model with one Linear per "
                "projection"
            )
        module = module.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{path} is a {type(module).__name__}, not a Linear; give a full-precision checkpoint")
    return module


def check_linears(model: nn.Module, architecture: Architecture) -> None:
    """Refuse a decoder whose linears differ from those of its row, before any work.

    Raises:
        ValueError: a linear is missing, or a linear belongs to no group and would not be quantized.
    """
    for index, layer in enumerate(architecture.decoder_layers(model)):
        where = f"{architecture.layers}.{index}"
        covered = {*architecture.linears(index), *architecture.kept}
        try:
            for path in architecture.linears(index):
                get_linear(layer, path)
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from error
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear) and path not in covered:
                raise ValueError(
                    f"{where}.{path}: this Linear is in no linear group and would not be quantized; "
                    "add it to the groups of the decoder's row in tlq/models/text_decoders.py"
                )


def head_dim_of(config: Any, index: int = 0) -> int:
    """Width of an attention head of decoder layer ``index``."""
    text = config.get_text_config()
    text = text.per_layer_config[index] if text.is_heterogeneous else text
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def input_widths(model: nn.Module, architecture: Architecture) -> dict[tuple[int, str], int]:
    """(layer, group name) -> input channels of the group; ``model`` may have no data."""
    return {
        (index, group.name): get_linear(layer, group.linears[0]).in_features
        for index, layer in enumerate(architecture.decoder_layers(model))
        for group in architecture.groups[index]
    }


def linear_paths(architecture: Architecture, layer: int) -> list[str]:
    """Full module paths of the linears of decoder layer ``layer``, in group order."""
    prefix = f"{architecture.layers}.{layer}"
    return [f"{prefix}.{path}" for path in architecture.linears(layer)]
