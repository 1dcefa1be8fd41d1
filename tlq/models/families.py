"""Families of vision-language models as data: where the decoder is, and what stays in full precision."""

from __future__ import annotations

from dataclasses import dataclass


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
GEMMA4 = Family(
    (
        "lm_head",
        "re:.*vision_tower.*",
        "re:.*embed_vision.*",
        "re:.*audio_tower.*",
        "re:.*embed_audio.*",
        "re:.*per_layer_model_projection.*",
    )
)
#: ``vision_embedder`` is where checkpoints and vLLM have what transformers puts into ``embed_vision``.
GEMMA4_UNIFIED = Family(("lm_head", "re:.*vision_embedder.*", "re:.*embed_vision.*", "re:.*embed_audio.*"))
MUSE_GLIMMER = Family(("lm_head", "re:.*vision_tower.*", "re:.*vision_adapter.*", "re:.*vision_projection.*"))
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
    "gemma4": GEMMA4,
    "gemma4_unified": GEMMA4_UNIFIED,
    "muse_glimmer": MUSE_GLIMMER,
    "smolvlm": IDEFICS3,
    "idefics3": IDEFICS3,
}
