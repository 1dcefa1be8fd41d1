"""Text decoders as data: what a layer of each kind is made of.

A decoder is a row of ``DECODERS``: which linears share an input, into which norm or linear their scales fold, and how
a norm computes its gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from tlq.models.linear_groups import EXPERTS, LinearGroup

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


@dataclass(frozen=True)
class Experts:
    """A mixture of experts. The input of gate and up projections has no scales, because all experts read it.

    Attributes:
        path: the module that holds the experts (``tlq.models.experts``).
        kept: linears of routers and gates, which stay in full precision.
        shared: path of the MLP that every token passes, or None.
        count: number of experts, from the config of the text decoder.
        sparse: whether a layer has experts, from that config and its index; the others have a plain MLP.
        modalities: what equal parts of the experts compute, in their order; none if every expert computes any token.
        beside_mlp: a layer with experts has the plain MLP too.
        optional: only some models of the family have experts.
    """

    path: str
    kept: tuple[str, ...]
    shared: str | None
    count: Callable[[Any], int]
    sparse: Callable[[Any, int], bool] = lambda _text, _index: True
    modalities: tuple[str, ...] = ()
    beside_mlp: bool = False
    optional: bool = False

    def groups(self, count: int) -> tuple[LinearGroup, ...]:
        """The linear groups of a layer with ``count`` experts."""
        shared = () if self.shared is None else self._of("shared", self.shared, None)
        experts = (self._of(f"{EXPERTS}.{number}", f"{self.path}.{number}", self.path) for number in range(count))
        pairs = zip(experts, self._modalities(count), strict=True)
        return (*shared, *(replace(group, modality=modality) for pair, modality in pairs for group in pair))

    def _modalities(self, count: int) -> Iterator[str | None]:
        """The modality of each of ``count`` experts."""
        kinds = self.modalities or (None,)
        return (kinds[number * len(kinds) // count] for number in range(count))

    def _of(self, name: str, block: str, experts: str | None) -> tuple[LinearGroup, LinearGroup]:
        gate_up = (f"{block}.gate_proj", f"{block}.up_proj")
        return (
            LinearGroup(f"{name}.gate_up", gate_up, None, kept=self.kept, experts=experts),
            LinearGroup(f"{name}.down", (f"{block}.down_proj",), f"{block}.up_proj", tokenwise=True, experts=experts),
        )


def _layer_type(text: Any, index: int) -> str | None:
    stated = getattr(text, "layer_types", None)
    return stated[index] if stated else None


@dataclass(frozen=True)
class Decoder:
    """A kind of text decoder.

    Folded scales never reach norms on queries and keys, which follow their projections, nor norms on an attention or
    MLP output, which follow the last linear.

    Attributes:
        attention, mlp: linear groups in the order of computation.
        norm_offset: the gain of a norm is ``norm_offset + weight``.
        kinds: what takes the place of attention in layers of another kind, by the name of the kind.
        kind: the name of a layer's kind, from the config and its index; by default that in ``layer_types``.
        experts: what takes the place of the MLP, in some layers or in all.
        ungrouped: from the config, linears in the layers that are in no group and stay in full precision.
        final_norm: name of the norm after the last layer.
        post_norm: whether norms come only after attention and MLP, from the config: no scale folds into them.
    """

    attention: tuple[LinearGroup, ...] = (QKV, O_PROJ)
    mlp: tuple[LinearGroup, ...] = (GATE_UP, DOWN)
    norm_offset: float = 0.0
    kinds: tuple[tuple[str, tuple[LinearGroup, ...]], ...] = ()
    kind: Callable[[Any, int], str | None] = _layer_type
    experts: Experts | None = None
    ungrouped: Callable[[Any], tuple[str, ...]] = lambda _text: ()
    final_norm: str = "norm"
    post_norm: Callable[[Any], bool] = lambda _text: False

    def layers(self, text: Any) -> tuple[tuple[LinearGroup, ...], ...]:
        """The groups of every layer of a decoder, from its config."""
        kinds, post_norm = dict(self.kinds), self.post_norm(text)
        sparse: tuple[LinearGroup, ...] = ()
        if self.experts is not None:
            sparse = (*(self.mlp if self.experts.beside_mlp else ()), *self.experts.groups(self.experts.count(text)))

        @cache
        def groups(kind: str | None, has_experts: bool) -> tuple[LinearGroup, ...]:
            layer = (*kinds.get(kind or "", self.attention), *(sparse if has_experts else self.mlp))
            return tuple(replace(each, fold=None) if each.parent else each for each in layer) if post_norm else layer

        return tuple(
            groups(self.kind(text, index), self.experts is not None and self.experts.sparse(text, index))
            for index in range(text.num_hidden_layers)
        )


def _stated_sparse(text: Any, index: int) -> bool:
    return bool(text.mlp_layer_types[index] == "sparse")


def _qwen_sparse(text: Any, index: int) -> bool:
    return index not in text.mlp_only_layers and (index + 1) % text.decoder_sparse_step == 0


#: Gate and up are rows of one linear, in this order; the norms after attention and MLP take no scales.
FUSED_MLP = (
    LinearGroup("gate_up", ("mlp.gate_up_proj",), "post_attention_layernorm", "mlp"),
    replace(DOWN, fold="mlp.gate_up_proj", fold_last=1),
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
DEEPSEEK_EXPERTS = Experts(
    "mlp.experts", ("mlp.gate",), "mlp.shared_experts", lambda text: text.n_routed_experts, _stated_sparse
)
DEEPSEEK_OCR2 = Decoder(experts=DEEPSEEK_EXPERTS)
GLM4V_MOE = Decoder(experts=replace(DEEPSEEK_EXPERTS, sparse=lambda text, index: index >= text.first_k_dense_replace))
#: Queries, keys and values are rows of one linear, in this order.
PHI3 = Decoder(
    attention=(
        replace(QKV, linears=("self_attn.qkv_proj",)),
        replace(O_PROJ, fold="self_attn.qkv_proj", fold_last=2),
    ),
    mlp=FUSED_MLP,
)
MOLMO2 = Decoder(post_norm=lambda text: text.norm_after)
ERNIE4_5_VL_MOE = Decoder(
    experts=Experts(
        "mlp.experts",
        ("mlp.text_moe.gate", "mlp.vision_moe.gate"),
        "mlp.shared_experts",
        lambda text: 2 * text.num_experts,
        _stated_sparse,
        modalities=("text", "image"),
    )
)
# Engines reorder the rows of queries and keys as they load them, but not those of packed codes and their scales
# (https://github.com/vllm-project/vllm/pull/34997), and they fuse queries, keys and values: all three stay as they are.
LLAMA4 = Decoder(
    attention=(O_PROJ,),
    mlp=(
        LinearGroup(
            "gate_up", ("feed_forward.gate_proj", "feed_forward.up_proj"), "post_attention_layernorm", "feed_forward"
        ),
        LinearGroup("down", ("feed_forward.down_proj",), "feed_forward.up_proj", tokenwise=True),
    ),
    experts=Experts(
        "feed_forward.experts",
        ("feed_forward.router",),
        "feed_forward.shared_expert",
        lambda text: text.num_local_experts,
        lambda text, index: index in text.moe_layers,
    ),
    ungrouped=lambda _text: QKV.linears,
)


def _gemma4_kind(text: Any, index: int) -> str | None:
    if text.kv_sharing_modes[index] == "reuse":
        return "shared_kv"
    return "k_is_v" if text.attention_k_eq_v and text.layer_types[index] != "sliding_attention" else None


# The norm on values comes after their projection, so nothing folds into its rows. The norm before the MLP feeds the MLP
# alone: router and experts have norms of their own.
GEMMA4_UNIFIED = Decoder(
    attention=(QKV, replace(O_PROJ, fold=None)),
    mlp=(replace(GATE_UP, fold="pre_feedforward_layernorm"), DOWN),
    kinds=(
        ("k_is_v", (replace(QKV, linears=QKV.linears[:2], aliases=QKV.linears[2:]), replace(O_PROJ, fold=None))),
        ("shared_kv", (replace(QKV, linears=QKV.linears[:1], aliases=QKV.linears[1:]), replace(O_PROJ, fold=None))),
    ),
    kind=_gemma4_kind,
)
#: In E2B and E4B an embedding of the token per layer enters between a gate and a projection. Both stay in full
#: precision, as in llm-compressor's examples: they are 1 to 2 % of a layer, and no norm before them could take a scale.
GEMMA4 = replace(
    GEMMA4_UNIFIED,
    experts=Experts(
        "experts",
        ("router.proj",),
        None,
        lambda text: text.num_experts or 0,
        lambda text, _index: text.enable_moe_block,
        beside_mlp=True,
        optional=True,
    ),
    ungrouped=lambda text: ("per_layer_input_gate", "per_layer_projection") if text.hidden_size_per_layer_input else (),
)
#: A gate on the output of attention reads its input; vLLM calls it output_gate_proj.
MUSE_GLIMMER = Decoder(
    attention=(
        replace(QKV, linears=(*QKV.linears, "self_attn.gate_proj"), aliases=("self_attn.output_gate_proj",)),
        O_PROJ,
    ),
    mlp=(replace(GATE_UP, fold="pre_feedforward_layernorm"), DOWN),
    norm_offset=1.0,
)

#: By the ``model_type`` of the text config.
DECODERS: dict[str, Decoder] = {
    "llama": LLAMA,
    "llama4_text": LLAMA4,
    "molmo2_text": MOLMO2,
    "mistral": LLAMA,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen2_vl_text": LLAMA,
    "qwen2_5_vl_text": LLAMA,
    "qwen3_vl_text": LLAMA,
    "granite4_vision_text": LLAMA,
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
    "deepseek_ocr2_text": DEEPSEEK_OCR2,
    "ernie4_5_vl_moe_text": ERNIE4_5_VL_MOE,
    "gemma3_text": GEMMA3,
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4_UNIFIED,
    "muse_glimmer_text": MUSE_GLIMMER,
}

#: Well-known decoders and families that a row cannot describe -> the reason.
UNSUPPORTED: dict[str, str] = {
    "mixtral": "its mlp.experts is a mixture of experts",
    "qwen2_moe": "its mlp.experts is a mixture of experts",
    "gpt_oss": "its mlp.experts is a mixture of experts",
    "gemma3n": "the altup of its decoder layers takes four hidden states for each token; the nearest family is gemma4",
    "phi4_multimodal": "transformers 5.23 does not load it for images and text",
    "perception_lm": "its vision tower is one of timm's",
    "fast_vlm": "its vision tower is one of timm's",
    "kimi_k25": "its vision tower is not stored in the form that transformers uses",
    "step3p7": "its vision tower is not stored in the form that transformers uses",
    "qianfan_ocr": "its vision tower is not stored in the form that transformers uses",
    "paligemma": "it reads a prompt in both directions, so that an answer behind it would see itself",
    "hunyuan_vl": "transformers 5.23 computes other logits for a sample in a batch than alone",
}
