"""The module tree of a model, without its weights."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tlq.models.checkpoint import last_line
from tlq.models.experts import separate_experts


def empty_model(config: Any, checkpoint: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """The module tree that a config describes, in evaluation mode, its parameters without values (on ``meta``).

    Every expert has linears of its own.

    Raises:
        ValueError: transformers cannot build it, for instance because a size is 0.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(
                deepcopy(config), dtype=dtype, trust_remote_code=False
            )
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise ValueError(
            f"model {checkpoint!s}: transformers cannot build what its config.json describes ({type(error).__name__}: "
            f"{last_line(error)[:200]}); correct it, or download it again"
        ) from error
    separate_experts(model)
    return model.eval()
