"""The third model of the demo world, a ``Qwen3VLMoeForConditionalGeneration``: experts in place of every MLP.

The vision tower is that of Qwen3-VL, with a learned table of positions. No feature of its inner layers enters the
decoder (DeepStack), so that the forward pass for training stays the one that all demo models share.
"""

from typing import Any

import torch
from transformers import Qwen2Tokenizer, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from demo.model import PATCH, SPECIAL_TOKENS, decoder_config, set_greedy
from demo.world import COLUMNS, ROWS

EXPERTS, ACTIVE = 8, 2
#: Inner width of an expert: two experts together have the inner width of the other demo models' MLP.
EXPERT_WIDTH = 256


def build_config(tokenizer: Qwen2Tokenizer) -> Qwen3VLMoeConfig:
    """The decoder of ``demo.model`` with experts, and a vision tower 3 x 192 with patch 8 and merge 2."""
    ids = {token: tokenizer.get_vocab()[token] for token in SPECIAL_TOKENS}
    text = decoder_config(tokenizer)
    rope = {**text["rope_parameters"], "mrope_section": [12, 10, 10], "mrope_interleaved": True}
    return Qwen3VLMoeConfig(
        text_config={
            **text,
            "head_dim": 64,
            "num_experts": EXPERTS,
            "num_experts_per_tok": ACTIVE,
            "moe_intermediate_size": EXPERT_WIDTH,
            "norm_topk_prob": True,  # as transformers computes; published checkpoints have it, and vLLM reads it
            "rope_parameters": rope,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_heads": 4,
            "out_hidden_size": text["hidden_size"],
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": (2 * max(ROWS, COLUMNS)) ** 2,
            "deepstack_visual_indexes": [],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen3VLMoeForConditionalGeneration:
    """An untrained model in fp32 with transformers' initial weights, from torch's global generator."""
    network = Qwen3VLMoeForConditionalGeneration(build_config(tokenizer))
    set_greedy(network, tokenizer)
    return network


def encode_images(network: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Merged vision tokens [B, cells, hidden] of pixels [B, patches, .], with the library's tower."""
    size = len(pixels)
    grid = torch.tensor([[1, 2 * ROWS, 2 * COLUMNS]]).expand(size, 3)
    visual = network.model.visual
    tokens: torch.Tensor = visual(pixels.flatten(0, 1).to(visual.dtype), grid_thw=grid).pooler_output
    return tokens.view(size, ROWS * COLUMNS, -1)
