"""MLX, through the package mlx-vlm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from job import main
from mlx_vlm import load, stream_generate
from mlx_vlm.utils import load_model, prepare_inputs


class MLX:
    """A folder as `tlq convert --to mlx` writes it."""

    def __init__(self, job: dict[str, Any]) -> None:
        if any(prompt["image"] for prompt in job["prompts"]):
            self.model, self.processor = load(job["path"])
        else:  # a processor may need packages that the environment lacks
            self.model = load_model(Path(job["path"]))

    def _stream(self, prompt: dict[str, Any], tokens: int, **settings: Any) -> list[Any]:
        images = [prompt["image"]]
        return list(
            stream_generate(
                self.model, self.processor, prompt["text"], images, max_tokens=tokens, temperature=0, **settings
            )
        )

    def reply(self, prompt: dict[str, Any]) -> str:
        return "".join(part.text for part in self._stream(prompt, 16))

    def log_probabilities(self, prompt: dict[str, Any]) -> list[list[float]]:
        answer = prompt["answer_ids"]
        if prompt["image"] is None:
            return self._answered(self.model(mx.array([prompt["ids"]]), None, None).logits, len(answer))
        text = prompt["text"] + "".join(prompt["pieces"])
        inputs = prepare_inputs(self.processor, images=[prompt["image"]], prompts=[text])
        ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values")
        assert np.array(ids)[0, -len(answer) :].tolist() == answer
        mask = inputs.pop("attention_mask", None)
        return self._answered(self.model(ids, pixels, mask, **inputs).logits, len(answer))

    def _answered(self, logits: mx.array, tokens: int) -> list[list[float]]:
        logits = logits[0, -tokens - 1 : -1].astype(mx.float32)
        return list(np.array(logits - mx.logsumexp(logits, -1, keepdims=True)).tolist())

    def generate(self, prompt: dict[str, Any], tokens: int) -> None:
        tokenizer = self.processor.tokenizer
        before, tokenizer.stopping_criteria = tokenizer.stopping_criteria, lambda token: False
        try:
            found = self._stream(prompt, tokens)
        finally:
            tokenizer.stopping_criteria = before
        assert found[-1].generation_tokens == tokens, found[-1].generation_tokens


if __name__ == "__main__":
    main(MLX)
