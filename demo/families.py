"""The two model classes that the demo world is trained with: Qwen2-VL, and LLaVA-OneVision as its second witness.

Questions, tokenizer, training and outlier channels are the same for both. A family says how a picture becomes pixel
values, how these become embeddings of the decoder, and at which positions the embeddings stand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2Tokenizer

from demo import llava, model, qwen3_moe
from demo.balance import Balance
from demo.family import Family
from demo.forward import encode_images
from demo.packing import patchify
from demo.world import COLUMNS, ROWS


class Qwen2VL(Family):
    """Two patches of 8 pixels a side are merged to the embedding of a cell; positions are (time, row, column)."""

    name = "qwen2_vl"
    image_tokens = ROWS * COLUMNS

    def build_model(self, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
        return model.build_model(tokenizer)

    def save_processor(self, tokenizer: Qwen2Tokenizer, out: Path) -> None:
        model.save_processor(tokenizer, out)

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        return patchify(images)

    def cells(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return encode_images(network.model.visual, pixels)

    def embeddings(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return self.cells(network, pixels)

    def positions(self, start: int) -> np.ndarray:
        rows, columns = np.divmod(np.arange(self.image_tokens), COLUMNS)
        image = start + np.stack([np.zeros_like(rows), rows, columns])
        return np.concatenate([image, np.full((3, 1), start + max(ROWS, COLUMNS))], axis=1)

    def vision(self, network: Any) -> list[nn.Module]:
        return [network.model.visual]

    def last_linear(self, network: Any) -> nn.Linear:
        linear = network.model.visual.merger.mlp[2]
        assert isinstance(linear, nn.Linear)
        return linear


class LlavaOneVision(Family):
    """The whole picture squashed to one tile, then its two tiles row by row with a mark after each; plain positions."""

    name = "llava_onevision"
    image_tokens = llava.IMAGE_TOKENS

    def build_model(self, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
        return llava.build_model(tokenizer)

    def save_processor(self, tokenizer: Qwen2Tokenizer, out: Path) -> None:
        llava.save_processor(tokenizer, out)

    def pixels(self, images: np.ndarray) -> torch.Tensor:
        return llava.pixel_values(images)

    def cells(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return llava.join_tiles(llava.encode_tiles(network, pixels)[:, 1:])

    def embeddings(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return llava.picture_embeddings(network, pixels)

    def positions(self, start: int) -> np.ndarray:
        return start + np.arange(self.image_tokens + 1)[None]

    def vision(self, network: Any) -> list[nn.Module]:
        return [network.model.vision_tower, network.model.multi_modal_projector]

    def last_linear(self, network: Any) -> nn.Linear:
        linear = network.model.multi_modal_projector.linear_2
        assert isinstance(linear, nn.Linear)
        return linear


class Qwen3VLMoe(Qwen2VL):
    """Pictures and positions of Qwen2-VL; the tower is another one, and experts stand in place of every MLP."""

    name = "qwen3_vl_moe"

    def build_model(self, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
        return qwen3_moe.build_model(tokenizer)

    def cells(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        return qwen3_moe.encode_images(network, pixels)

    def last_linear(self, network: Any) -> nn.Linear:
        linear = network.model.visual.merger.linear_fc2
        assert isinstance(linear, nn.Linear)
        return linear

    def balance(self, network: Any) -> Balance:
        return Balance(network, qwen3_moe.ACTIVE)


QWEN2_VL = Qwen2VL()
FAMILIES: dict[str, Family] = {family.name: family for family in (QWEN2_VL, LlavaOneVision(), Qwen3VLMoe())}
