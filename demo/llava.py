"""The second model of the demo world, a ``LlavaOnevisionForConditionalGeneration`` with the first one's decoder.

A picture of 160 x 80 pixels becomes three tiles of 80 x 80: the whole picture squashed, its left half and its right
half. The SigLIP tower makes 5 x 5 embeddings of each; the halves are put together row by row, and a learned embedding
ends every row.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    Qwen2Tokenizer,
)

from demo.model import SPECIAL_TOKENS, decoder_config, set_greedy
from demo.world import CELL, COLUMNS, HEIGHT, ROWS, WIDTH

TILE = HEIGHT
GRID = TILE // CELL
IMAGE_TOKENS = GRID * GRID + ROWS * (COLUMNS + 1)


def build_config(tokenizer: Qwen2Tokenizer) -> LlavaOnevisionConfig:
    """The decoder of ``demo.model`` as a Qwen2 with plain rotary positions; a SigLIP tower 3 x 192 with patch 16."""
    ids = {token: tokenizer.get_vocab()[token] for token in SPECIAL_TOKENS}
    text = decoder_config(tokenizer)
    return LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            **text,
            "rope_parameters": {"rope_type": "default", "rope_theta": text["rope_parameters"]["rope_theta"]},
        },
        vision_config={
            "model_type": "siglip_vision_model",
            "num_hidden_layers": 3,
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_attention_heads": 4,
            "patch_size": CELL,
            "image_size": TILE,
            "vision_use_head": False,
        },
        image_token_index=ids["<|image_pad|>"],
        video_token_index=ids["<|video_pad|>"],
        image_grid_pinpoints=[[HEIGHT, WIDTH]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


def build_model(tokenizer: Qwen2Tokenizer) -> LlavaOnevisionForConditionalGeneration:
    """An untrained model in fp32 with transformers' initial weights, from torch's global generator."""
    model = LlavaOnevisionForConditionalGeneration(build_config(tokenizer))
    set_greedy(model, tokenizer)
    return model


def build_image_processor() -> LlavaOnevisionImageProcessorPil:
    """The image processor of the three tiles."""
    return LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE},
        image_grid_pinpoints=[[HEIGHT, WIDTH]],
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def save_processor(tokenizer: Qwen2Tokenizer, out: Path) -> None:
    """Write the files of an ordinary LLaVA-OneVision processor: tokenizer, chat template, image processor."""
    tokenizer.save_pretrained(out)
    build_image_processor().save_pretrained(out)
    settings = {
        "processor_class": "LlavaOnevisionProcessor",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "num_image_tokens": GRID * GRID,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
    }
    (out / "processor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def pixel_values(images: np.ndarray) -> torch.Tensor:
    """[B, 3 tiles, 3 channels, TILE, TILE] float32 of uint8 pictures [B, HEIGHT, WIDTH, 3]."""
    values = build_image_processor()(images=[*images], return_tensors="pt")["pixel_values"]
    assert isinstance(values, torch.Tensor)
    return values


def encode_tiles(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[B, 3, GRID * GRID, hidden]: the projector's outputs for each tile."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    size, tiles = pixels.shape[:2]
    dtype = projector.linear_1.weight.dtype
    hidden = tower(pixels.flatten(0, 1).to(dtype), output_hidden_states=True).hidden_states[-1]
    return projector(hidden).view(size, tiles, GRID * GRID, -1)


def join_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """[B, ROWS * COLUMNS, hidden]: the embeddings [B, 2, GRID * GRID, hidden] of both halves, row by row."""
    size = len(tiles)
    return tiles.view(size, 2, GRID, GRID, -1).transpose(1, 2).reshape(size, ROWS * COLUMNS, -1)


def picture_embeddings(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """[B, IMAGE_TOKENS, hidden], equal to the library's ``get_image_features`` on each picture."""
    tiles = encode_tiles(model, pixels)
    size = len(tiles)
    rows = join_tiles(tiles[:, 1:]).view(size, ROWS, COLUMNS, -1)
    marks = model.model.image_newline.to(rows.dtype).expand(size, ROWS, 1, -1)
    return torch.cat([tiles[:, 0], torch.cat([rows, marks], dim=2).flatten(1, 2)], dim=1)
