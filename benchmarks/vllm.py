"""Run benchmarks on vLLM through lm-eval's ``vllm-vlm`` model, which is faster and measures no reference answers."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm

from benchmarks.data import BenchmarkError
from benchmarks.divergence import ItemKey
from benchmarks.items import Finished, pixels
from benchmarks.replies import final_answer
from tlq.inputs.images import IMAGE_ERRORS

MOST_IMAGES = 7  # maximum per item, in MMMU


def load_vllm(path: str, dtype: str, pixel_bounds: Mapping[str, int]) -> LM:
    """lm-eval's vLLM model of a checkpoint. It needs the ``vllm`` package, which this project does not install."""
    try:
        from lm_eval.models.vllm_vlms import VLLM_VLM
    except ImportError as error:
        raise BenchmarkError(
            f"evaluate.backend is vllm, and vLLM cannot be imported ({error}); `pip install vllm`, or use backend hf"
        ) from error
    extra = {"mm_processor_kwargs": dict(pixel_bounds)} if pixel_bounds else {}
    return VLLM_VLM(pretrained=path, dtype=dtype, batch_size="auto", max_images=MOST_IMAGES, **extra)


class WrappedLM(LM):
    """Wrap another lm-eval model: decode images for one chunk at a time, so that an interrupted run can continue."""

    MULTIMODAL = True

    def __init__(
        self,
        inner: LM,
        name_of: Callable[[str, int], str],
        chunk_size: int = 256,
        max_new_tokens: int | None = None,
        finished: Mapping[ItemKey, Finished] | None = None,
        on_batch: Callable[[Sequence[Finished]], None] = lambda batch: None,
    ) -> None:
        """See ``VisionLM`` for the arguments."""
        super().__init__()
        self.finished = dict(finished or {})
        self._inner = inner
        self._name_of = name_of
        self._chunk_size = chunk_size
        self._max_new_tokens = max_new_tokens
        self._on_batch = on_batch

    @property
    def tokenizer_name(self) -> str:
        return str(self._inner.tokenizer_name)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._inner.apply_chat_template(chat_history, add_generation_prompt)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        keyed = [(self._key(request), request) for request in requests]
        waiting = [(key, request) for key, request in keyed if key not in self.finished]
        starts = range(0, len(waiting), self._chunk_size)
        for start in tqdm(starts, desc="answers", unit="chunk", disable=disable_tqdm):
            done = self._answer(waiting[start : start + self._chunk_size])
            self.finished |= {item.key: item for item in done}
            self._on_batch(done)
        return [final_answer(self.finished[key].reply) for key, _ in keyed]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("these benchmarks generate; use output_type generate_until")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("these benchmarks generate; use output_type generate_until")

    def _key(self, request: Instance) -> ItemKey:
        task = str(request.task_name)
        return ItemKey(task, self._name_of(task, int(request.doc_id or 0)))

    def _answer(self, chunk: Sequence[tuple[ItemKey, Instance]]) -> list[Finished]:
        keys, decoded, failed = [], [], []
        for key, request in chunk:
            try:
                decoded.append(self._decoded(request))
                keys.append(key)
            except IMAGE_ERRORS as error:
                failed.append(Finished(key, failure=f"image cannot be decoded: {error}"[:200]))
        replies: list[str] = self._inner.generate_until(decoded) if decoded else []
        return failed + [Finished(key, reply) for key, reply in zip(keys, replies, strict=True)]

    def _decoded(self, request: Instance) -> Instance:
        prompt, generation, extra = request.args
        if self._max_new_tokens is not None:
            generation = generation | {"max_gen_toks": self._max_new_tokens}
        images = [pixels(image) for image in extra["visual"]]
        arguments: tuple[Any, ...] = (prompt, generation, extra | {"visual": images})
        metadata = (request.task_name, request.doc_id, request.repeats)
        return dataclasses.replace(request, arguments=arguments, metadata=metadata, resps=[], filtered_resps={})
