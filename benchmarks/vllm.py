"""Run benchmarks on vLLM through lm-eval's ``vllm-vlm`` model, which is faster and measures NLL but no KL.

vLLM returns the probability of every token of a prompt, not the whole distribution: so the reference answer is the end
of a second prompt, whose question is computed once more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm

from benchmarks.chat_model import ChatLM
from benchmarks.data import BenchmarkError
from benchmarks.divergence import Divergence, ItemKey
from benchmarks.items import AnswerOptions, Finished, Work, pixels

MOST_IMAGES = 7  # maximum per item, in MMMU
CHUNK = 256


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


class VllmLM(ChatLM):
    """lm-eval's vLLM model with this project's prompts, in chunks, so that an interrupted run can continue."""

    def __init__(
        self,
        inner: Any,
        processor: Any,
        options: AnswerOptions,
        name_of: Callable[[str, int], str],
        answers: Mapping[ItemKey, str] | None = None,
    ) -> None:
        """
        Args:
            inner: from ``load_vllm``.
            answers: reference answers to measure the NLL of. Others as ``ChatLM``.
        """
        super().__init__(processor, options, name_of, answers)
        self._inner = inner
        inner.chat_applied = True  # prompts have the model's own image tokens

    def _needs_reference(self, key: ItemKey) -> bool:
        return True

    def _answered(self, waiting: Sequence[Work], silent: bool) -> Iterator[list[Finished]]:
        starts = range(0, len(waiting), CHUNK)
        for start in tqdm(starts, desc="answers", unit="chunk", disable=silent):
            yield self._answer(waiting[start : start + CHUNK])

    def _answer(self, chunk: Sequence[Work]) -> list[Finished]:
        asked, failed = self._prepared(chunk, lambda item: [pixels(image) for image in item.images])
        replies = self._inner.generate_until([_request(*each) for each in asked]) if asked else []
        measured = self._measure([each for each in asked if each[0].reference.tokens])
        return failed + [
            Finished(item.key, reply, measured.get(item.key)) for (item, _), reply in zip(asked, replies, strict=True)
        ]

    def _measure(self, asked: Sequence[tuple[Work, list[Any]]]) -> dict[ItemKey, Divergence]:
        """NLL of reference answers, from the log-probabilities of a prompt that ends with the answer."""
        if not asked:
            return {}
        from vllm import SamplingParams

        prompts = [
            {"prompt_token_ids": self._tokens_with_answer(item), "multi_modal_data": {"image": images}}
            for item, images in asked
        ]
        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._inner.model.generate(prompts, sampling_params=sampling, use_tqdm=False)
        return {item.key: answer_nll(item, output) for (item, _), output in zip(asked, outputs, strict=True)}

    def _tokens_with_answer(self, item: Work) -> list[int]:
        """Token ids of question and reference answer, with one image token for each picture."""
        reference, bos = item.reference, self.tokenizer.bos_token
        text = item.prompt if reference.conversation is None else reference.conversation
        special = not (bos and text.startswith(bos))  # as ``encode``: no second bos token
        ids: list[int] = self.tokenizer(text, add_special_tokens=special).input_ids
        return ids if reference.conversation is not None else [*ids, *reference.tokens]


def answer_nll(item: Work, output: Any) -> Divergence:
    """NLL of an item's answer, per token in nats, from vLLM's output for a prompt that ends with the answer."""
    answer = item.reference.tokens[item.reference.start :]
    places = output.prompt_logprobs[-len(answer) :]
    total = sum(place[token].logprob for token, place in zip(answer, places, strict=True))
    return Divergence(len(answer), -total / len(answer), None)


def _request(item: Work, images: list[Any]) -> Instance:
    generation = {"until": [], "do_sample": False, "max_gen_toks": item.max_new_tokens}
    return Instance("generate_until", {}, (item.prompt, generation, {"visual": images}), 0)
