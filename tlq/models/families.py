"""Families of vision-language models as data: where the decoder is, and what stays in full precision."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A vision-language model around a decoder.

    Attributes:
        ignore: linears that stay in full precision, in compressed-tensors' notation.
        layers: module path of the decoder layers.
        joined: whether checkpoints keep several linears of a layer in one tensor. So do exports, which engines load;
            transformers takes the tensors apart, but not those of a quantized weight.
    """

    ignore: tuple[str, ...]
    layers: str = "model.language_model.layers"
    joined: bool = False


QWEN_VL = Family(("lm_head", "re:.*visual.*"))
LLAVA = Family(("lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"))
LIGHTON_OCR = Family(("lm_head", "re:.*vision_encoder.*", "re:.*vision_projection.*"))
VISUAL_PROJECTOR = Family(("lm_head", "re:.*visual.*", "re:.*projector.*"))
OVIS2 = Family(("lm_head", "re:.*vision_tower.*", "re:.*visual_embeddings_table.*"))
GRANITE = Family(("lm_head", "re:.*vision_tower.*", "re:.*layerwise_projectors.*", "re:.*spatial_projectors.*"))
# The name of transformers, then that of vLLM.
MINICPM_V = Family(("lm_head", "re:.*vision_tower.*", "re:.*vpm.*", "re:.*merger.*"))
# The names of transformers, then those of vLLM.
ERNIE_VL = Family(("lm_head", "re:.*vision_(tower|model).*", "re:.*resampler_model.*", "re:.*_experts_gate"))
# The names of transformers, then those of vLLM.
MOLMO2 = Family(
    ("lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*vision_backbone.*"), joined=True
)
LLAMA4 = Family(
    ("language_model.lm_head", "re:.*vision_model.*", "re:.*multi_modal_projector.*"), "language_model.model.layers"
)
DEEPSEEK_OCR2 = Family(("lm_head", "re:.*vision_tower.*", "re:.*sam_model.*", "re:.*qwen2_model.*", "re:.*projector.*"))
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
VISION_MODEL = Family(("lm_head", "re:.*vision_(model|encoder).*", "re:.*projector.*", "re:.*aligner.*"))
IDEFICS = Family(("lm_head", "re:.*vision_model.*", "re:.*connector.*"), "model.text_model.layers")

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
    "minicpmv4_6": MINICPM_V,
    "minicpmv4_7": MINICPM_V,
    "granite4_vision": GRANITE,
    "cohere2_vision": LLAVA,
    "aya_vision": LLAVA,
    "vipllava": LLAVA,
    "llava_onevision": LLAVA,
    "llava_next": LLAVA,
    "llava_next_video": LLAVA,
    "llava": LLAVA,
    "llama4": LLAMA4,
    "molmo2": MOLMO2,
    "deepseek_ocr2": DEEPSEEK_OCR2,
    "ernie4_5_vl_moe": ERNIE_VL,
    "internvl": LLAVA,
    "got_ocr2": LLAVA,
    "video_llama_3": VISION_MODEL,
    "deepseek_vl": VISION_MODEL,
    "mistral3": LLAVA,
    "lighton_ocr": LIGHTON_OCR,
    "gemma3": LLAVA,
    "gemma4": GEMMA4,
    "gemma4_unified": GEMMA4_UNIFIED,
    "muse_glimmer": MUSE_GLIMMER,
    "smolvlm": IDEFICS,
    "idefics2": IDEFICS,
    "idefics3": IDEFICS,
}
