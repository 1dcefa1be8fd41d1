"""tlq.load_model in float32: the reference where transformers alone does not load every checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from in_transformers import Transformers
from job import main

from tlq import load_model
from tlq.models.processor import load_processor


class TLQ(Transformers):
    """A checkpoint as `tlq.load_model` loads it, in float32 and in bfloat16."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.token_types = job["token_types"]
        if any(prompt["image"] for prompt in job["prompts"]):
            self.processor = load_processor(job["path"])
        self.exact = load_model(job["path"])
        self.rounded = load_model(job["path"], dtype=torch.bfloat16)
        self.model = self.exact

    def _inputs(self, prompt: dict[str, Any], answer: list[int]) -> dict[str, torch.Tensor]:
        if prompt["image"] is not None:
            inputs = super()._inputs(prompt, answer)
            floating = {name for name, value in inputs.items() if value.is_floating_point()}
            return {name: value.to(self.model.dtype) if name in floating else value for name, value in inputs.items()}
        ids = torch.tensor([prompt["ids"]])
        marks = {name: torch.zeros_like(ids) for name in self.token_types}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **marks}

    def rounded_log_probabilities(self, prompt: dict[str, Any]) -> list[list[float]]:
        """``log_probabilities`` of the model in bfloat16."""
        self.model = self.rounded
        try:
            return self.log_probabilities(prompt)
        finally:
            self.model = self.exact


if __name__ == "__main__":
    main(TLQ)
