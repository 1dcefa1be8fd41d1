"""Model families as data: the place of the decoder, the linears that share an input, the modules that absorb a scale.

A model is a family (``FAMILIES``: vision tower, connector, and where the decoder sits) around a text decoder
(``DECODERS``: its linears and norms), so supporting another one is one more row in either table.
``tlq families`` lists the families.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, cast

from torch import nn
from transformers import PretrainedConfig


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a decoder layer that read the same input.

    Attributes:
        name: short name used in files and reports.
        linears: module paths inside the decoder layer.
        fold: module whose output is the group's input, into which 1/s is folded: a norm, or a linear's rows; None if
            others read the same input, so that the group has no scales.
        fold_last: whether only the last rows of the linear ``fold`` are the group's input: those of a projection that
            follows another one in a fused linear.
        parent: module whose output error AWQ and MBQ measure; None if they measure the linear itself.
        tokenwise: whether the module around the linears computes each token from its hidden state alone.
        kept: linears that read the same input and stay in full precision; the group's scale goes into their columns.
        gain: the gain of the norm ``fold`` is ``gain + weight``; None takes the decoder's ``norm_offset``.
        experts: for a group of an expert, the module that holds all experts; it is called with the hidden states
            [tokens, hidden] and with the numbers of the experts [tokens, k] that each token is routed to.
    """

    name: str
    linears: tuple[str, ...]
    fold: str | None
    parent: str | None = None
    tokenwise: bool = False
    kept: tuple[str, ...] = ()
    gain: float | None = None
    experts: str | None = None
    fold_last: bool = False

    @property
    def block(self) -> str:
        """Path of the module around the linears: the attention, the MLP, or the expert."""
        return self.linears[0].rpartition(".")[0]

    @property
    def expert(self) -> int:
        """Number of the expert among those of its layer. Raises ValueError if the group is of no expert."""
        return int(self.block.rpartition(".")[2])


QKV = LinearGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "self_attn")
O_PROJ = LinearGroup("o_proj", ("self_attn.o_proj",), "self_attn.v_proj")
GATE_UP = LinearGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "mlp")
DOWN = LinearGroup("down", ("mlp.down_proj",), "mlp.up_proj", tokenwise=True)
# A gated delta net: the input projections pass a convolution, so nothing folds into their rows; the gated norm before
# the output projection has one gain for all heads.
DELTA_IN = LinearGroup(
    "delta_in",
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
    "input_layernorm",
    "linear_attn",
    kept=("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
)
DELTA_OUT = LinearGroup("delta_out", ("linear_attn.out_proj",), "linear_attn.norm", gain=0.0)

#: Name of the experts of a layer together, where one name stands for all of their groups.
EXPERTS = "experts"


def is_expert(group: str) -> bool:
    """Whether a group, by its name, belongs to one expert."""
    return group.startswith(f"{EXPERTS}.")


def kind_of(group: str) -> str:
    """The name of a group without the number of the expert: ``experts.down`` of ``experts.3.down``."""
    return f"{EXPERTS}.{group.rpartition('.')[2]}" if is_expert(group) else group


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP. Router and shared experts read the same input: it has no scales.

    Attributes:
        path: the module that holds the experts (``tlq.models.experts``).
        kept: router and gates, which stay in full precision.
        shared: path of the MLP that every token passes, or None.
        count: number of experts, from the config of the text decoder.
        sparse: whether a layer has experts, from that config and its index; the others have a plain MLP.
    """

    path: str
    kept: tuple[str, ...]
    shared: str | None
    count: Callable[[Any], int]
    sparse: Callable[[Any, int], bool] = lambda _text, _index: True

    def groups(self, count: int) -> tuple[LinearGroup, ...]:
        """The linear groups of a layer with ``count`` experts."""
        shared = () if self.shared is None else self._of("shared", self.shared, None)
        experts = (self._of(f"{EXPERTS}.{number}", f"{self.path}.{number}", self.path) for number in range(count))
        return (*shared, *(group for pair in experts for group in pair))

    def _of(self, name: str, block: str, experts: str | None) -> tuple[LinearGroup, LinearGroup]:
        gate_up = (f"{block}.gate_proj", f"{block}.up_proj")
        return (
            LinearGroup(f"{name}.gate_up", gate_up, None, kept=self.kept, experts=experts),
            LinearGroup(f"{name}.down", (f"{block}.down_proj",), f"{block}.up_proj", tokenwise=True, experts=experts),
        )


@dataclass(frozen=True)
class Decoder:
    """A kind of text decoder.

    Folded scales never reach norms on queries and keys, which follow their projections, nor norms on an attention or
    MLP output, which follow the last linear.

    Attributes:
        attention, mlp: linear groups in the order of computation.
        norm_offset: the gain of a norm is ``norm_offset + weight``.
        kinds: what takes the place of attention in layers of another kind, by the name in ``layer_types`` of the
            config.
        experts: what takes the place of the MLP, in some layers or in all.
        final_norm: name of the norm after the last layer.
    """

    attention: tuple[LinearGroup, ...] = (QKV, O_PROJ)
    mlp: tuple[LinearGroup, ...] = (GATE_UP, DOWN)
    norm_offset: float = 0.0
    kinds: tuple[tuple[str, tuple[LinearGroup, ...]], ...] = ()
    experts: Experts | None = None
    final_norm: str = "norm"

    def layers(self, text: Any) -> tuple[tuple[LinearGroup, ...], ...]:
        """The groups of every layer of a decoder, from its config."""
        kinds = dict(self.kinds)
        stated = getattr(text, "layer_types", None) or [None] * text.num_hidden_layers
        sparse = () if self.experts is None else self.experts.groups(self.experts.count(text))

        @cache
        def groups(kind: str | None, has_experts: bool) -> tuple[LinearGroup, ...]:
            return (*kinds.get(kind or "", self.attention), *(sparse if has_experts else self.mlp))

        return tuple(
            groups(kind, self.experts is not None and self.experts.sparse(text, index))
            for index, kind in enumerate(stated)
        )


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


def _qwen_sparse(text: Any, index: int) -> bool:
    return index not in text.mlp_only_layers and (index + 1) % text.decoder_sparse_step == 0


#: Gate and up are rows of one linear, in this order; the norms after attention and MLP take no scales.
FUSED_MLP = (
    LinearGroup("gate_up", ("mlp.gate_up_proj",), "post_attention_layernorm", "mlp"),
    replace(DOWN, fold="mlp.gate_up_proj", fold_last=True),
)
#: Norms come only after attention and MLP (EXAONE 4), or both read the same norm (Cohere 2): no scale folds into it.
UNSCALED_INPUTS = Decoder(attention=(replace(QKV, fold=None), O_PROJ), mlp=(replace(GATE_UP, fold=None), DOWN))
LFM2 = Decoder(
    attention=(
        replace(QKV, fold="operator_norm"),
        LinearGroup("o_proj", ("self_attn.out_proj",), "self_attn.v_proj"),
    ),
    mlp=(
        LinearGroup("gate_up", ("feed_forward.w1", "feed_forward.w3"), "ffn_norm", "feed_forward"),
        LinearGroup("down", ("feed_forward.w2",), "feed_forward.w3", tokenwise=True),
    ),
    # The convolution comes between a gate and the output projection, and may have a bias: nothing folds past it.
    kinds=(
        (
            "conv",
            (
                LinearGroup("conv_in", ("conv.in_proj",), "operator_norm", "conv"),
                LinearGroup("conv_out", ("conv.out_proj",), None),
            ),
        ),
    ),
    final_norm="embedding_norm",
)
DELTA_NET = (("linear_attention", (DELTA_IN, DELTA_OUT)),)
LLAMA = Decoder()
GEMMA3 = Decoder(mlp=(replace(GATE_UP, fold="pre_feedforward_layernorm"), DOWN), norm_offset=1.0)
QWEN3_5 = Decoder(norm_offset=1.0, kinds=DELTA_NET)
QWEN3_MOE = Decoder(experts=Experts("mlp.experts", ("mlp.gate",), None, lambda text: text.num_experts, _qwen_sparse))
QWEN3_5_MOE = replace(
    QWEN3_5,
    experts=Experts(
        "mlp.experts", ("mlp.gate", "mlp.shared_expert_gate"), "mlp.shared_expert", lambda text: text.num_experts
    ),
)
GLM4V = Decoder(mlp=FUSED_MLP)
GLM4V_MOE = Decoder(
    experts=Experts(
        "mlp.experts",
        ("mlp.gate",),
        "mlp.shared_experts",
        lambda text: text.n_routed_experts,
        lambda text, index: index >= text.first_k_dense_replace,
    )
)

#: By the ``model_type`` of the text config.
DECODERS: dict[str, Decoder] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen2_vl_text": LLAMA,
    "qwen2_5_vl_text": LLAMA,
    "qwen3_vl_text": LLAMA,
    "glm4v_text": GLM4V,
    "glm_ocr_text": GLM4V,
    "exaone4": UNSCALED_INPUTS,
    "cohere2": UNSCALED_INPUTS,
    "lfm2": LFM2,
    "paddleocr_vl_text": LLAMA,
    "qwen3_moe": QWEN3_MOE,
    "qwen3_vl_moe_text": QWEN3_MOE,
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5_MOE,
    "glm4v_moe_text": GLM4V_MOE,
    "gemma3_text": GEMMA3,
}

#: Well-known decoders and families that a row cannot describe -> the reason.
UNSUPPORTED: dict[str, str] = {
    "phi3": "its self_attn.qkv_proj and mlp.gate_up_proj are fused linears",
    "mixtral": "its mlp.experts is a mixture of experts",
    "qwen2_moe": "its mlp.experts is a mixture of experts",
    "gpt_oss": "its mlp.experts is a mixture of experts",
    "ernie4_5_vl_moe": "its mlp has one mixture of experts for text and one for images",
    "gemma4": "its decoder layers add inputs of their own and share keys and values",
    "qianfan_ocr": "its vision tower is not stored in the form that transformers uses",
    "hunyuan_vl": "transformers 5.23 computes other logits for a sample in a batch than alone",
    "llama4": "its feed_forward.experts is a mixture of experts whose weights are stored transposed",
}


@dataclass(frozen=True)
class Family:
    """A vision-language model around a decoder.

    Attributes:
        ignore: linears that stay in full precision, in compressed-tensors' notation.
        layers: module path of the decoder layers.
    """

    ignore: tuple[str, ...]
    layers: str = "model.language_model.layers"


QWEN_VL = Family(("lm_head", "re:.*visual.*"))
LLAVA = Family(("lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"))
LIGHTON_OCR = Family(("lm_head", "re:.*vision_encoder.*", "re:.*vision_projection.*"))
VISUAL_PROJECTOR = Family(("lm_head", "re:.*visual.*", "re:.*projector.*"))
OVIS2 = Family(("lm_head", "re:.*vision_tower.*", "re:.*visual_embeddings_table.*"))
IDEFICS3 = Family(("lm_head", "re:.*vision_model.*", "re:.*connector.*"), "model.text_model.layers")

#: By the ``model_type`` of config.json.
FAMILIES: dict[str, Family] = {
    "qwen2_vl": QWEN_VL,
    "qwen2_5_vl": QWEN_VL,
    "qwen3_vl": QWEN_VL,
    "qwen3_vl_moe": QWEN_VL,
    "qwen3_5": QWEN_VL,
    "qwen3_5_moe": QWEN_VL,
    "glm4v": QWEN_VL,
    "glm46v": QWEN_VL,
    "glm_ocr": QWEN_VL,
    "glm4v_moe": QWEN_VL,
    "exaone4_5": QWEN_VL,
    "paddleocr_vl": VISUAL_PROJECTOR,
    "ovis2": OVIS2,
    "lfm2_vl": LLAVA,
    "cohere2_vision": LLAVA,
    "aya_vision": LLAVA,
    "vipllava": LLAVA,
    "llava_onevision": LLAVA,
    "llava_next": LLAVA,
    "llava": LLAVA,
    "internvl": LLAVA,
    "mistral3": LLAVA,
    "lighton_ocr": LIGHTON_OCR,
    "gemma3": LLAVA,
    "smolvlm": IDEFICS3,
    "idefics3": IDEFICS3,
}


@dataclass(frozen=True)
class Architecture:
    """The rows of a model's family and decoder together: everything that calibration and export need.

    Attributes:
        groups: the linear groups of every decoder layer.
        norm: name of the norm after the last layer.
    """

    model_type: str
    layers: str
    groups: tuple[tuple[LinearGroup, ...], ...]
    norm_offset: float
    ignore: tuple[str, ...]
    norm: str = "norm"

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
        return list(dict.fromkeys(path for groups in self.kinds for group in groups for path in group.kept))

    @cached_property
    def experts(self) -> str | None:
        """Path inside a decoder layer of the module that holds experts; None if no layer has any."""
        return next((group.experts for groups in self.kinds for group in groups if group.experts), None)

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
            f"of: {', '.join(FAMILIES)}, or add a row to FAMILIES in tlq/models/architectures.py"
        )
    text_type = config.get_text_config().model_type
    decoder = DECODERS.get(text_type)
    if decoder is None:
        raise ValueError(
            f"model type {config.model_type!r} with decoder {text_type!r} is not supported{_because(text_type)}; "
            f"choose a model whose decoder is one of: {', '.join(DECODERS)}, or add a row to DECODERS in "
            "tlq/models/architectures.py"
        )
    layers = decoder.layers(config.get_text_config())
    return Architecture(
        config.model_type, family.layers, layers, decoder.norm_offset, family.ignore, decoder.final_norm
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
                    "add it to the groups of the decoder's row in tlq/models/architectures.py"
                )


def head_dim_of(config: Any) -> int:
    """Width of an attention head of the decoder."""
    text = config.get_text_config()
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
