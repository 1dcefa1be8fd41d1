"""Tiny random models of every supported family, their processors, and inputs made without processors.

Every model has two decoder layers of width 128 with grouped-query attention, and a vision tower of one layer on
images of 16 x 16. Norm gains are spread and all weights random, so that no input of a decoder layer is negligible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)

from tlq.inputs.chat import Inputs
from tlq.samples import Batch, EncodedRow, _batch

VOCABULARY = 96
IMAGE, VIDEO, VISION_START, VISION_END = 90, 91, 92, 93


@dataclass(frozen=True)
class TinyFamily:
    """How to build one family.

    Attributes:
        config: fields of its config that differ from the family's defaults.
        image: (number of tiles, generator) -> number of image tokens, and the model's inputs for one sample's image.
        token_types: names of the inputs that mark image tokens with 1, with blanks between, if the model needs any;
            those of ``moe_`` also mark the tokens around an image.
        variant: what distinguishes one of several models of the family.
    """

    model_type: str
    config: dict[str, Any]
    image: Callable[[int, torch.Generator], tuple[int, Inputs]]
    token_types: str | None = None
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.model_type}-{self.variant}" if self.variant else self.model_type


def text(model_type: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **more,
    }


def tower(model_type: str, patch_size: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": patch_size,
        **more,
    }


def pixels(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def qwen_image(tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    """A grid of 4 x 4 patches per tile, 2 x 2 of them one token."""
    grid = torch.tensor([[1, 4, 4 * tiles]])
    return 4 * tiles, {
        "pixel_values": pixels(16 * tiles, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": grid,
    }


def ernie_image(tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    """As ``qwen_image``, without a dimension of time."""
    count, inputs = qwen_image(tiles, generator)
    return count, {**inputs, "pixel_values": pixels(16 * tiles, 3 * 4 * 4, generator=generator)}


def merged_image(tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    """As ``ernie_image``, with the number of patches that make a token along a side."""
    count, inputs = ernie_image(tiles, generator)
    return count, {**inputs, "image_merge_sizes": torch.tensor([2])}


def upsampled_image(tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    """Tiles of 8 x 8 patches, 4 x 4 of them one token."""
    return 4 * tiles, {"pixel_values": pixels(tiles, 3, 32, 32, generator=generator)}


def patch_image(tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    """As ``qwen_image``, the patches as pictures."""
    count, inputs = qwen_image(tiles, generator)
    return count, {**inputs, "pixel_values": pixels(16 * tiles, 3, 4, 4, generator=generator)}


def llava_image(_tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    return 4, {"pixel_values": pixels(1, 3, 16, 16, generator=generator)}


def anyres_image(tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    """The whole image (4 tokens), then ``tiles`` side by side: rows of 2 tokens per tile, each row with a newline."""
    return 4 + 2 * (2 * tiles + 1), {
        "pixel_values": pixels(1, 1 + tiles, 3, 16, 16, generator=generator),
        "image_sizes": torch.tensor([[16, 16 * tiles]]),
    }


def tiled_image(tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    """Tiles stacked in the batch dimension, 4 tokens each."""
    return 4 * tiles, {"pixel_values": pixels(tiles, 3, 16, 16, generator=generator)}


def idefics_image(tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    return 4 * tiles, {
        "pixel_values": pixels(1, tiles, 3, 16, 16, generator=generator),
        "pixel_attention_mask": torch.ones(1, tiles, 16, 16, dtype=torch.long),
    }


def pixtral_image(tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    """4 x 4 patches per tile side by side, 2 x 2 of them one token."""
    return 4 * tiles, {
        "pixel_values": pixels(1, 3, 16, 16 * tiles, generator=generator),
        "image_sizes": torch.tensor([[16, 16 * tiles]]),
    }


def siglip2_image(_tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    """4 x 4 patches, 2 x 2 of them one token."""
    return 4, {
        "pixel_values": pixels(1, 16, 3 * 4 * 4, generator=generator),
        "spatial_shapes": torch.tensor([[4, 4]]),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }


def deepseek_image(tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    """144 tokens per view and a separator; three tiles make a second, local view."""
    views = 1 + tiles // 3
    inputs = {
        "pixel_values": pixels(1, 3, 16, 16, generator=generator),
        "num_local_patches": torch.tensor([views - 1]),
    }
    local = {"pixel_values_local": pixels(views - 1, 3, 16, 16, generator=generator)} if views > 1 else {}
    return 144 * views + 1, {**inputs, **local}


def molmo_image(tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    """A crop of 4 x 4 patches, 2 x 2 of them one token, and a second one cut in two if there is more than one tile."""
    crops = 1 + (tiles > 1)
    patches = torch.arange(16 * crops).view(crops, 2, 2, 2, 2).transpose(2, 3).reshape(-1, 4)
    patches[-1, -1] = -1  # a token of three patches
    return 4 * crops, {
        "pixel_values": pixels(crops, 16, 3 * 4 * 4, generator=generator),
        "image_token_pooling": patches,
        "image_grids": torch.tensor([[2, 2, 2 * (crops - 1), 2]]),
        "image_num_crops": torch.tensor([crops]),
    }


def packed_image(tiles: int, generator: torch.Generator) -> tuple[int, Inputs]:
    """8 x 8 patches per tile side by side, after each other in the last dimension; 4 x 4 of them one token."""
    return 4 * tiles, {
        "pixel_values": pixels(1, 3, 4, 4 * 64 * tiles, generator=generator),
        "target_sizes": torch.tensor([[8, 8 * tiles]]),
    }


def gemma4_image(tiles: int, generator: torch.Generator, side: int = 4) -> tuple[int, Inputs]:
    """``side`` x ``side`` patches per tile side by side, padded to three tiles; a tile is four tokens."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side * tiles), indexing="ij")
    positions = torch.stack([x, y], -1).reshape(1, -1, 2)
    padding = side * side * (3 - tiles)
    patches = pixels(1, side * side * tiles, 768 // side**2, generator=generator)
    return 4 * tiles, {
        "pixel_values": torch.nn.functional.pad(patches, (0, 0, 0, padding)),
        "image_position_ids": torch.nn.functional.pad(positions, (0, 0, 0, padding), value=-1),
    }


#: Patches that are merged before the model: each is one token.
gemma4_unified_image = partial(gemma4_image, side=2)


def mrope(sections: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": sections, **more}}


QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
QWEN_TOWER = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN3_TOWER = {
    **QWEN_TOWER,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
}
DELTA_NETS = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
PIXTRAL_TOWER = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 64,
    "patch_size": 4,
}
PINPOINTS = [[16, 16], [16, 32], [16, 48]]


def minicpm(model_type: str, token_types: str | None = None, **more: Any) -> TinyFamily:
    return TinyFamily(
        model_type,
        {
            "text_config": text(
                "qwen3_5_text",
                head_dim=64,
                **DELTA_NETS,
                **mrope([4, 2, 2], mrope_interleaved=True, partial_rotary_factor=0.25),
            ),
            "vision_config": tower(f"{model_type}_vision", 4, num_hidden_layers=2),
            "insert_layer_id": 0,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            **more,
        },
        packed_image,
        token_types,
    )


#: Heads of another width in layers of full attention, whose keys are their values.
GEMMA4_TEXT = {
    "head_dim": 32,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "use_bidirectional_attention": "vision",
    "final_logit_softcapping": 30.0,
}
#: The last two layers have no keys and values of their own, and a wider MLP.
SHARED_KV = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "attention_k_eq_v": False,
    "use_bidirectional_attention": None,
}


#: The audio tower of E2B and E4B.
GEMMA4_AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [8, 4],
    "output_proj_dims": 32,
}


def gemma4(variant: str, audio: dict[str, Any] | None = None, **more: Any) -> TinyFamily:
    more = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY, **GEMMA4_TEXT, **more}
    return TinyFamily(
        "gemma4",
        {
            "text_config": text("gemma4_text", **more),
            "vision_config": {
                **tower("gemma4_vision", 4, num_key_value_heads=2, head_dim=16),
                "pooling_kernel_size": 2,
                "position_embedding_size": 64,
                "use_clipped_linears": audio is not None,
                "standardize": audio is not None,
            },
            "audio_config": audio,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": 89,
            "boi_token_id": VISION_START,
            "eoi_token_id": VISION_END,
        },
        gemma4_image,
        "mm_token_type_ids",
        variant,
    )


#: GLM's families with one description -> their decoder.
GLM = {"glm4v": "glm4v_text", "glm46v": "glm4v_text", "glm_ocr": "glm_ocr_text"}


def glm(model_type: str, text_type: str, **more: Any) -> TinyFamily:
    return TinyFamily(
        model_type,
        {
            "text_config": text(text_type, head_dim=32, **mrope([2, 3, 3], partial_rotary_factor=0.5), **more),
            "vision_config": {**QWEN3_TOWER, "image_size": 16},
            **QWEN_IDS,
            "image_start_token_id": VISION_START,
            "image_end_token_id": VISION_END,
        },
        qwen_image,
        "mm_token_type_ids",
    )


TINY: dict[str, TinyFamily] = {
    family.name: family
    for family in (
        TinyFamily(
            "qwen2_vl",
            {
                "text_config": text("qwen2_vl_text", **mrope([4, 6, 6])),
                "vision_config": {**QWEN_TOWER, "embed_dim": 32, "hidden_size": 128, "mlp_ratio": 2},
                **QWEN_IDS,
            },
            qwen_image,
            "mm_token_type_ids",
        ),
        TinyFamily(
            "qwen2_5_vl",
            {
                "text_config": text("qwen2_5_vl_text", **mrope([4, 6, 6])),
                "vision_config": {
                    **QWEN3_TOWER,
                    "window_size": 16,
                    "fullatt_block_indexes": [0],
                },
                "tie_word_embeddings": True,
                **QWEN_IDS,
            },
            qwen_image,
            "mm_token_type_ids",
        ),
        TinyFamily(
            "qwen3_vl",
            {
                "text_config": text("qwen3_vl_text", head_dim=64, **mrope([12, 10, 10], mrope_interleaved=True)),
                "vision_config": {**QWEN3_TOWER, "deepstack_visual_indexes": [0]},
                **QWEN_IDS,
            },
            qwen_image,
            "mm_token_type_ids",
        ),
        TinyFamily(
            "qwen3_5",
            {
                "text_config": text(
                    "qwen3_5_text",
                    head_dim=64,
                    **DELTA_NETS,
                    **mrope([4, 2, 2], mrope_interleaved=True, partial_rotary_factor=0.25),
                ),
                "vision_config": QWEN3_TOWER,
                **QWEN_IDS,
            },
            qwen_image,
            "mm_token_type_ids",
        ),
        TinyFamily(
            "qwen3_vl_moe",
            {
                "text_config": text(
                    "qwen3_vl_moe_text",
                    head_dim=64,
                    num_hidden_layers=2,
                    mlp_only_layers=[1],
                    **EXPERTS,
                    **mrope([12, 10, 10], mrope_interleaved=True),
                ),
                "vision_config": {**QWEN3_TOWER, "deepstack_visual_indexes": [0]},
                **QWEN_IDS,
            },
            qwen_image,
            "mm_token_type_ids",
        ),
        TinyFamily(
            "qwen3_5_moe",
            {
                "text_config": text(
                    "qwen3_5_moe_text",
                    head_dim=64,
                    **DELTA_NETS,
                    shared_expert_intermediate_size=128,
                    **EXPERTS,
                    **mrope([4, 2, 2], mrope_interleaved=True, partial_rotary_factor=0.25),
                ),
                "vision_config": QWEN3_TOWER,
                **QWEN_IDS,
            },
            qwen_image,
            "mm_token_type_ids",
        ),
        minicpm("minicpmv4_6"),
        minicpm(
            "minicpmv4_7",
            "mm_token_type_ids",
            image_start_id=VISION_START,
            image_end_id=VISION_END,
            slice_start_id=88,
            slice_end_id=89,
            newline_id=87,
        ),
        *(glm(name, text_type) for name, text_type in GLM.items()),
        TinyFamily(
            "exaone4_5",
            {
                "text_config": text("exaone4", head_dim=32),
                "vision_config": {
                    **QWEN3_TOWER,
                    "window_size": 16,
                    "num_key_value_heads": 2,
                    "fullatt_block_indexes": [0],
                },
                **QWEN_IDS,
            },
            qwen_image,
        ),
        TinyFamily(
            "paddleocr_vl",
            {
                "text_config": text("paddleocr_vl_text", head_dim=32, **mrope([4, 6, 6])),
                "vision_config": tower("paddleocr_vl_vision", 4),
                **QWEN_IDS,
            },
            patch_image,
            "mm_token_type_ids",
        ),
        TinyFamily(
            "ovis2",
            {
                "text_config": text("qwen2"),
                "vision_config": tower(
                    "ovis2_vision_model", 4, vocab_size=24, num_visual_indicator_tokens=5, hidden_stride=2
                ),
                "image_token_id": IMAGE,
                "visual_indicator_token_ids": [85, 86, 87, 88, 89],
                "vocab_size": VOCABULARY,
                "hidden_size": 128,
            },
            tiled_image,
        ),
        TinyFamily(
            "lfm2_vl",
            {
                "text_config": text(
                    "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False, conv_L_cache=3
                ),
                "vision_config": tower("siglip2_vision_model", 4, num_patches=16, vision_use_head=False),
                "image_token_id": IMAGE,
                "projector_hidden_size": 64,
            },
            siglip2_image,
        ),
        TinyFamily(
            "granite4_vision",
            {
                "text_config": text(
                    "granite4_vision_text",
                    embedding_multiplier=2.0,
                    attention_multiplier=0.25,
                    residual_multiplier=0.5,
                    logits_scaling=2.0,
                ),
                "vision_config": tower("siglip_vision_model", 4, hidden_size=64, vision_use_head=False),
                "qformer_config": {
                    "model_type": "blip_2_qformer",
                    "num_hidden_layers": 1,
                    "intermediate_size": 64,
                    "cross_attention_frequency": 1,
                    "use_qformer_text_input": False,
                },
                "image_token_index": IMAGE,
                "image_grid_pinpoints": PINPOINTS,
                "vision_feature_select_strategy": "full",
                "downsample_rate": "1/2",
                "deepstack_layer_map": [[-1, 0]],
                "spatial_target_layers": [1, 2, 3, 4],
            },
            anyres_image,
        ),
        TinyFamily(
            "cohere2_vision",
            {
                "text_config": text("cohere2", sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
                "vision_config": tower("siglip_vision_model", 4, vision_use_head=False),
                "image_token_id": IMAGE,
                "alignment_intermediate_size": 64,
            },
            tiled_image,
        ),
        TinyFamily(
            "aya_vision",
            {
                "text_config": text("cohere2", sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
                "vision_config": tower("siglip_vision_model", 4, vision_use_head=False),
                "image_token_index": IMAGE,
            },
            tiled_image,
        ),
        TinyFamily(
            "vipllava",
            {
                "text_config": text("llama"),
                "vision_config": tower("clip_vision_model", 8, num_hidden_layers=2),
                "image_token_index": IMAGE,
                "vision_feature_layers": [-1, -2],
            },
            llava_image,
        ),
        glm(
            "glm4v_moe",
            "glm4v_moe_text",
            first_k_dense_replace=1,
            n_routed_experts=4,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
        ),
        TinyFamily(
            "llava_onevision",
            {
                "text_config": text("qwen2"),
                "vision_config": tower("siglip_vision_model", 8, vision_use_head=False),
                "image_token_index": IMAGE,
                "video_token_index": VIDEO,
                "image_grid_pinpoints": PINPOINTS,
            },
            anyres_image,
        ),
        TinyFamily(
            "mistral3",
            {
                "text_config": text("mistral", head_dim=32),
                "vision_config": PIXTRAL_TOWER,
                "image_token_index": IMAGE,
                "spatial_merge_size": 2,
            },
            pixtral_image,
        ),
        TinyFamily(
            "lighton_ocr",
            {
                "text_config": text("qwen3", head_dim=32),
                "vision_config": PIXTRAL_TOWER,
                "image_token_id": IMAGE,
                "spatial_merge_size": 2,
            },
            pixtral_image,
        ),
        TinyFamily(
            "llava_next",
            {
                "text_config": text("mistral", head_dim=32, sliding_window=32),
                "vision_config": tower("clip_vision_model", 8),
                "image_token_index": IMAGE,
                "vision_feature_layer": -1,
                "image_grid_pinpoints": PINPOINTS,
            },
            anyres_image,
        ),
        TinyFamily(
            "llava_next_video",
            {
                "text_config": text("llama"),
                "vision_config": tower("clip_vision_model", 8),
                "image_token_index": IMAGE,
                "video_token_index": VIDEO,
                "vision_feature_layer": -1,
                "image_grid_pinpoints": PINPOINTS,
            },
            anyres_image,
        ),
        TinyFamily(
            "deepseek_ocr2",
            {
                "text_config": text(
                    "deepseek_ocr2_text",
                    n_routed_experts=4,
                    n_shared_experts=1,
                    num_experts_per_tok=2,
                    moe_intermediate_size=128,
                    mlp_layer_types=["dense", "sparse"],
                ),
                "vision_config": {
                    "sam_config": {
                        "hidden_size": 32,
                        "num_hidden_layers": 1,
                        "num_attention_heads": 2,
                        "image_size": 16,
                        "patch_size": 4,
                        "output_channels": 16,
                        "global_attn_indexes": [0],
                        "downsample_channels": [16, 32],
                    },
                    "encoder_config": tower("deepseek_ocr2_encoder", 4, num_key_value_heads=2, vocab_size=4),
                },
                "image_token_id": IMAGE,
            },
            deepseek_image,
        ),
        TinyFamily(
            "ernie4_5_vl_moe",
            {
                "text_config": text(
                    "ernie4_5_vl_moe_text",
                    moe_intermediate_size=[128, 256],
                    moe_k=2,
                    moe_num_experts=4,
                    moe_num_shared_experts=1,
                    mlp_layer_types=["sparse", "dense"],
                    **mrope([4, 4, 8]),
                ),
                "vision_config": {
                    "depth": 1,
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_heads": 2,
                    "patch_size": 4,
                },
                **QWEN_IDS,
                "image_start_token_id": VISION_START,
                "image_end_token_id": VISION_END,
            },
            ernie_image,
            "mm_token_type_ids moe_mm_token_type_ids",
        ),
        TinyFamily(
            "molmo2",
            {
                "text_config": text("molmo2_text", head_dim=32, additional_vocab_size=8),
                "vision_config": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "image_size": [16, 16],
                    "patch_size": 4,
                },
                "adapter_config": {
                    "vision_feature_layer": [0],
                    "hidden_size": 32,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 2,
                    "head_dim": 16,
                    "intermediate_size": 64,
                    "text_hidden_size": 128,
                },
                "image_patch_id": IMAGE,
            },
            molmo_image,
            "mm_token_type_ids",
        ),
        TinyFamily(
            "got_ocr2",
            {
                "text_config": text("qwen2"),
                "vision_config": {
                    "hidden_size": 32,
                    "output_channels": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 32,
                    "patch_size": 4,
                    "mlp_dim": 64,
                    "global_attn_indexes": [0],
                },
                "image_token_index": IMAGE,
                "image_seq_length": 4,
            },
            upsampled_image,
        ),
        TinyFamily(
            "video_llama_3",
            {
                "text_config": text("qwen2"),
                "vision_config": tower("video_llama_3_vision", 4),
                "image_token_id": IMAGE,
                "video_token_id": VIDEO,
            },
            merged_image,
        ),
        TinyFamily(
            "deepseek_vl",
            {
                "text_config": text("llama"),
                "vision_config": tower("siglip_vision_model", 8, vision_use_head=False),
                "image_token_id": IMAGE,
                "tie_word_embeddings": False,
            },
            llava_image,
        ),
        TinyFamily(
            "llama4",
            {
                "text_config": text(
                    "llama4_text",
                    head_dim=32,
                    intermediate_size=128,
                    intermediate_size_mlp=256,
                    num_local_experts=4,
                    num_experts_per_tok=2,
                    moe_layers=[0],
                    no_rope_layers=[1, 0],
                    attention_chunk_size=8,
                    floor_scale=4,
                ),
                "vision_config": tower(
                    "llama4_vision_model",
                    4,
                    intermediate_size=128,
                    vision_output_dim=64,
                    projector_input_dim=64,
                    projector_output_dim=64,
                ),
                "image_token_index": IMAGE,
            },
            tiled_image,
        ),
        TinyFamily(
            "llava",
            {
                "text_config": text("llama"),
                "vision_config": tower("clip_vision_model", 8),
                "image_token_index": IMAGE,
                "vision_feature_layer": -1,
            },
            llava_image,
        ),
        TinyFamily(
            "internvl",
            {
                "text_config": text("qwen3", head_dim=64),
                "vision_config": tower("internvl_vision", 4, image_size=[16, 16]) | {"patch_size": [4, 4]},
                "image_token_id": IMAGE,
                "image_seq_length": 4,
            },
            tiled_image,
        ),
        TinyFamily(
            "gemma3",
            {
                "text_config": text(
                    "gemma3_text",
                    head_dim=64,
                    query_pre_attn_scalar=64,
                    sliding_window=6,
                    layer_types=["sliding_attention", "full_attention"],
                ),
                "vision_config": tower("siglip_vision_model", 4, vision_use_head=False),
                "image_token_index": IMAGE,
                "boi_token_index": VISION_START,
                "eoi_token_index": VISION_END,
                "mm_tokens_per_image": 4,
            },
            llava_image,
            "token_type_ids",
        ),
        gemma4(""),
        gemma4("experts", enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=128),
        gemma4("shared_kv", GEMMA4_AUDIO, hidden_size_per_layer_input=32, **SHARED_KV),
        TinyFamily(
            "gemma4_unified",
            {
                "text_config": text("gemma4_unified_text", **GEMMA4_TEXT),
                "vision_config": {
                    "patch_size": 4,
                    "pooling_kernel_size": 2,
                    "mm_embed_dim": 32,
                    "mm_posemb_size": 16,
                    "output_proj_dims": 32,
                },
                "image_token_id": IMAGE,
                "video_token_id": VIDEO,
                "audio_token_id": 89,
                "boi_token_id": VISION_START,
                "eoi_token_id": VISION_END,
            },
            gemma4_unified_image,
            "mm_token_type_ids",
        ),
        TinyFamily(
            "muse_glimmer",
            {
                "text_config": text(
                    "muse_glimmer_text",
                    head_dim=32,
                    sliding_window=6,
                    layer_types=["sliding_attention", "full_attention"],
                    layer_rope_theta=[100.0, 0],
                    output_multiplier=0.5,
                ),
                "vision_config": {
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "patch_size": 4,
                    "pos_emb_height": 8,
                    "pos_emb_width": 8,
                },
                "image_token_id": IMAGE,
                "video_token_id": VIDEO,
                "out_hidden_size": 128,
                "projector_hidden_size": 64,
            },
            qwen_image,
        ),
        TinyFamily(
            "smolvlm",
            {
                "text_config": text("llama"),
                "vision_config": tower("smolvlm_vision", 4),
                "image_token_id": IMAGE,
                "scale_factor": 2,
            },
            idefics_image,
        ),
        TinyFamily(
            "idefics2",
            {
                "text_config": text("mistral", head_dim=32),
                "vision_config": tower("idefics2_vision", 4),
                "perceiver_config": {
                    "hidden_size": 128,
                    "resampler_n_latents": 4,
                    "resampler_depth": 1,
                    "resampler_n_heads": 2,
                    "resampler_head_dim": 16,
                    "num_key_value_heads": 1,
                },
                "image_token_id": IMAGE,
            },
            idefics_image,
        ),
        TinyFamily(
            "idefics3",
            {
                "text_config": text("llama"),
                "vision_config": tower("idefics3_vision", 4),
                "image_token_id": IMAGE,
                "scale_factor": 2,
                "tie_word_embeddings": True,
            },
            idefics_image,
        ),
    )
}


#: A known family around a decoder that no family here has by itself.
TINY["llava phi3"] = replace(TINY["llava"], config={**TINY["llava"].config, "text_config": text("phi3")})


def tiny_config(name: str, **changes: Any) -> PretrainedConfig:
    return AutoConfig.for_model(TINY[name].model_type, **{**TINY[name].config, **changes})


def write_tiny(name: str, folder: Path, **text_changes: Any) -> Path:
    """A random checkpoint of the family in bfloat16; ``text_changes`` are fields of its text config."""
    text_config = {**TINY[name].config["text_config"], **text_changes}
    config = tiny_config(name, text_config=text_config)
    randomized(AutoModelForImageTextToText.from_config(config)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@torch.no_grad()
def randomized(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights of unit gain, biases of a tenth, decoder norms, routers and layers with gains spread around 1."""
    offset = 1.0 if model.config.model_type == "gemma3" else 0.0
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if ("norm" in name and name.endswith("weight")) or (".router." in name and name.endswith("scale")):
            parameter.copy_(torch.exp(0.5 * values) - offset)
        elif parameter.dim() >= 2:
            inputs = parameter[0, 0] if ".experts." in name else parameter[0]
            parameter.copy_(values / inputs.numel() ** 0.5)
        else:
            parameter.copy_(0.1 * values)
    for name, buffer in model.named_buffers():
        if name.endswith(("layer_scalar", "std_scale")):
            buffer.copy_(torch.exp(0.2 * torch.randn(buffer.shape, generator=generator)))
        elif name.endswith(("input_min", "output_min")):
            buffer.fill_(-1.5)
        elif name.endswith(("input_max", "output_max")):
            buffer.fill_(1.5)
    return model.eval()


def batches_of(name: str, batch_size: int = 2) -> list[Batch]:
    """Four samples: an image of one to three tiles between two texts, then an answer of four tokens."""
    generator = torch.Generator().manual_seed(3)
    encoded = [_row(TINY[name], 1 + index % 3, 5 + 3 * index, generator) for index in range(4)]
    rows = [EncodedRow.of(row, 4) for row in encoded]
    chunks = [list(range(start, min(start + batch_size, 4))) for start in range(0, 4, batch_size)]
    return [_batch(chunk, rows, encoded.__getitem__, 0, IMAGE) for chunk in chunks]


def _row(family: TinyFamily, tiles: int, words: int, generator: torch.Generator) -> Inputs:
    count, inputs = family.image(tiles, generator)
    before, after = (torch.randint(1, IMAGE, (1, length), generator=generator) for length in (3, words + 4))
    image = torch.full((1, count), IMAGE)
    ids = torch.cat([before, torch.tensor([[VISION_START]]), image, torch.tensor([[VISION_END]]), after], 1)
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
    for name in (family.token_types or "").split():
        row[name] = (ids >= IMAGE if name.startswith("moe_") else ids == IMAGE).long()
    return row
