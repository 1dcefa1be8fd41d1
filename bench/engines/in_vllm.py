"""vLLM, in the dtype of the job on a CPU and in bfloat16 on a GPU."""

from __future__ import annotations

import os
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

from job import main
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform


class VLLM:
    """A checkpoint of compressed-tensors, or in full precision."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.vocabulary = job["vocabulary"]
        self.model = LLM(
            model=job["path"],
            enforce_eager=True,
            max_model_len=512,
            limit_mm_per_prompt=job.get("limits", {"video": 0}),
            max_logprobs=self.vocabulary,
            dtype=job["dtype"] if current_platform.is_cpu() else "bfloat16",
        )

    def _generate(self, prompt: dict[str, Any], text: str, **settings: Any) -> Any:
        if prompt["image"] is None:
            request: dict[str, Any] = {"prompt_token_ids": prompt["ids"]}
        else:
            request = {"prompt": text, "multi_modal_data": {"image": Image.open(prompt["image"])}}
        return self.model.generate(request, SamplingParams(temperature=0, **settings), use_tqdm=False)[0]

    def reply(self, prompt: dict[str, Any]) -> str:
        return str(self._generate(prompt, prompt["text"], max_tokens=16).outputs[0].text)

    def log_probabilities(self, prompt: dict[str, Any]) -> list[list[float]]:
        answer = prompt["answer_ids"]
        text = prompt["text"] + "".join(prompt["pieces"])
        found = self._generate(prompt, text, max_tokens=1, prompt_logprobs=self.vocabulary)
        assert list(found.prompt_token_ids[-len(answer) :]) == answer
        rows = found.prompt_logprobs[-len(answer) :]
        return [[row[token].logprob for token in range(self.vocabulary)] for row in rows]

    def generate(self, prompt: dict[str, Any], tokens: int) -> None:
        self._generate(prompt, prompt["text"], max_tokens=tokens, ignore_eos=True)


if __name__ == "__main__":
    main(VLLM)
