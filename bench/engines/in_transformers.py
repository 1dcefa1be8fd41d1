"""transformers, in float32: the reference of the comparison."""

from __future__ import annotations

from typing import Any

import torch
from job import main
from PIL import Image
from transformers import AutoModelForImageTextToText

from tlq.models.processor import load_processor


class Transformers:
    """A checkpoint of compressed-tensors, or in full precision."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.processor = load_processor(job["path"])
        self.model = AutoModelForImageTextToText.from_pretrained(job["path"], dtype=torch.float32).eval()

    def _inputs(self, prompt: dict[str, Any], answer: list[int]) -> dict[str, torch.Tensor]:
        text, bos = prompt["text"], self.processor.tokenizer.bos_token
        # As in tlq.inputs.chat and in vLLM: where the chat template writes the bos token, no other is added.
        special = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        inputs = self.processor(images=Image.open(prompt["image"]), text=text, return_tensors="pt", **special)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        kinds = inputs.get("mm_token_type_ids")
        if kinds is not None:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(answer)))
        return dict(inputs)

    @torch.no_grad()
    def reply(self, prompt: dict[str, Any]) -> str:
        inputs = self._inputs(prompt, [])
        ids = self.model.generate(**inputs, max_new_tokens=16, do_sample=False)
        return str(self.processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    @torch.no_grad()
    def log_probabilities(self, prompt: dict[str, Any]) -> list[list[float]]:
        answer = prompt["answer_ids"]
        logits = self.model(**self._inputs(prompt, answer)).logits[0, -len(answer) - 1 : -1]
        return list(logits.log_softmax(-1).tolist())

    @torch.no_grad()
    def generate(self, prompt: dict[str, Any], tokens: int) -> None:
        inputs = self._inputs(prompt, [])
        self.model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)


if __name__ == "__main__":
    main(Transformers)
