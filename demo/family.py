"""A model class of the demo world, as the packing of its batches and the training use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, Qwen2Tokenizer

from demo.balance import Balance


class Family(ABC):
    """A model class of the demo world. B pictures have ``image_tokens`` embeddings each, and a cell each 16 pixels."""

    name: ClassVar[str]
    image_tokens: ClassVar[int]

    @abstractmethod
    def build_model(self, tokenizer: Qwen2Tokenizer) -> PreTrainedModel:
        """An untrained model in fp32 with transformers' initial weights, from torch's global generator."""

    @abstractmethod
    def save_processor(self, tokenizer: Qwen2Tokenizer, out: Path) -> None:
        """Write the files of an ordinary processor of this class."""

    @abstractmethod
    def pixels(self, images: np.ndarray) -> torch.Tensor:
        """[B, ...] float32: the image processor's values of uint8 pictures [B, HEIGHT, WIDTH, 3]."""

    @abstractmethod
    def cells(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        """[B, cells, hidden]: one embedding for each cell, row by row; the vision stage trains them."""

    @abstractmethod
    def embeddings(self, network: Any, pixels: torch.Tensor) -> torch.Tensor:
        """[B, image_tokens, hidden]: the embeddings of each picture in the decoder's input."""

    @abstractmethod
    def positions(self, start: int) -> np.ndarray:
        """[axes, image_tokens + 1]: positions of a picture that begins at ``start``, and of the token after it."""

    @abstractmethod
    def vision(self, network: Any) -> list[nn.Module]:
        """What the vision stage trains and the decoder stage leaves as it is."""

    @abstractmethod
    def last_linear(self, network: Any) -> nn.Linear:
        """The linear whose outputs are the embeddings."""

    def balance(self, network: Any) -> Balance | None:
        """What keeps the experts of ``network`` equally busy during training; None for a model without experts."""
        return None
