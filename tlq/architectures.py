"""Model families as data: where the decoder is, which linears share an input, where a scale can be folded.

Supporting another family is one more row in ``ARCHITECTURES``. ``python -m tlq.architectures`` lists them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import cast

from torch import nn
from transformers import PretrainedConfig


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a decoder layer that read the same input.

    Attributes:
        name: short name used in files and reports.
        linears: module paths inside the decoder layer.
        fold: module whose output is the group's input, into which 1/s is folded: a norm, or a linear's rows.
        parent: module whose output error AWQ and MBQ measure; None where they measure the linear itself.
    """

    name: str
    linears: tuple[str, ...]
    fold: str
    parent: str | None = None


QKV = LinearGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn")
O = LinearGroup("o", ("self_attn.o_proj",), "self_attn.v_proj")  # noqa: E741
GATE_UP = LinearGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp")
DOWN = LinearGroup("down", ("mlp.down_proj",), "mlp.up_proj")
LLAMA_GROUPS = (QKV, O, GATE_UP, DOWN)

FULL_PRECISION = ("lm_head", "re:.*visual.*", "re:.*vision_tower.*", "re:.*multi_modal_projector.*")


@dataclass(frozen=True)
class Architecture:
    """A model family.

    Attributes:
        model_type: the ``model_type`` of its config.json.
        layers: module path of the decoder layers.
        groups: linear groups in the order in which data flows through them.
        ignore: what stays in full precision, in compressed-tensors' notation.
    """

    model_type: str
    layers: str = "model.language_model.layers"
    groups: tuple[LinearGroup, ...] = LLAMA_GROUPS
    ignore: tuple[str, ...] = FULL_PRECISION

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        return cast(nn.ModuleList, model.get_submodule(self.layers))


ARCHITECTURES: dict[str, Architecture] = {
    row.model_type: row
    for row in (
        Architecture("qwen2_vl"),
        Architecture("qwen2_5_vl"),
        Architecture("llava_onevision"),
        Architecture("llava_next"),
        Architecture("llava"),
    )
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The row for a model's config.

    Raises:
        ValueError: the family is not supported.
    """
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise ValueError(
            f"model type {config.model_type!r} is not supported; choose a model of one of: "
            f"{', '.join(ARCHITECTURES)}, or add a row to tlq/architectures.py"
        )
    return row


def get_linear(layer: nn.Module, path: str) -> nn.Linear:
    """The linear at ``path`` of a decoder layer.

    Raises:
        ValueError: there is none, or it is not a plain linear (already quantized, or fused).
    """
    module = layer.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{path} is a {type(module).__name__}, not a Linear; give a full-precision checkpoint")
    return module


def linear_paths(architecture: Architecture, layer: int) -> list[str]:
    """Full module paths of the linears of decoder layer ``layer``, in group order."""
    prefix = f"{architecture.layers}.{layer}"
    return [f"{prefix}.{path}" for group in architecture.groups for path in group.linears]


if __name__ == "__main__":
    sys.stdout.write("".join(f"{name}\n" for name in ARCHITECTURES))
