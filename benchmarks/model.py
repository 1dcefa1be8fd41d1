"""A vision-language model in memory with lm-eval's interface: it answers chats with images by greedy decoding.

One prefill serves two purposes. A forward pass over prompt and reference answer gives the answer's log-probabilities;
``generate`` continues from its cache, cut back to the prompt. Batches are sorted by length. While the model computes a
batch, the images of the next batch are decoded and processed.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import BatchFeature, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from benchmarks.chat_model import ChatLM, append_answers, context_length, log_softmax
from benchmarks.divergence import Divergence, ItemKey
from benchmarks.items import AnswerOptions, Finished, Work
from tlq.inputs.chat import Inputs, collate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoded:
    """A batch as tensors, padded left.

    Attributes:
        usable: items that could be encoded.
        failed: the others, with the reason.
        inputs: of the prompts of the usable items; None if there are none.
        contexts: what the reference answers follow, if that differs from the prompts.
    """

    usable: list[Work]
    failed: list[Finished]
    inputs: BatchFeature | None = None
    contexts: BatchFeature | None = None


class VisionLM(ChatLM):
    """lm-eval model around an already loaded transformers model and its processor."""

    _also_lower = " or evaluate.max_new_tokens"

    def __init__(
        self,
        model: Any,
        processor: Any,
        options: AnswerOptions,
        name_of: Callable[[str, int], str] = lambda task, position: str(position),
        answers: Mapping[ItemKey, str] | None = None,
    ) -> None:
        """
        Args:
            answers: reference answers, which the meter of ``options`` may measure. Others as ``ChatLM``.
        """
        super().__init__(processor, options, name_of, answers)
        self.model = model.eval()
        self._end_of_turn = _end_of_turn(model, self.tokenizer)

    def _needs_reference(self, key: ItemKey) -> bool:
        return self._meter is not None and self._meter.wants(key)

    def _answered(self, waiting: Sequence[Work], silent: bool) -> Iterator[list[Finished]]:
        with tqdm(total=len(waiting), desc="answers", unit="item", disable=silent) as progress:
            for batch, encoded in self._encoded_batches(self._in_batches(waiting)):
                yield self._answer(batch, encoded)
                progress.update(len(batch))

    # --- Batches --------------------------------------------------------------------------------------

    def _in_batches(self, work: Sequence[Work]) -> Iterator[list[Work]]:
        """Batches of items with similar lengths, longest first, so that memory runs out at once or not at all."""
        ordered = sorted(work, key=lambda item: (-item.max_new_tokens, -item.length, item.key))
        start = 0
        while start < len(ordered):
            bound = ordered[start].max_new_tokens
            batch = [item for item in ordered[start : start + self.batch_size] if item.max_new_tokens == bound]
            start += len(batch)
            yield batch

    def _encoded_batches(self, batches: Iterator[list[Work]]) -> Iterator[tuple[list[Work], Encoded]]:
        """Each batch with its encoding, the next one being made in the background."""
        with ThreadPoolExecutor(max_workers=1) as pool:
            pending = None
            for batch in batches:
                upcoming = (batch, pool.submit(self._encode, batch))
                if pending is not None:
                    yield pending[0], pending[1].result()
                pending = upcoming
            if pending is not None:
                yield pending[0], pending[1].result()

    def _encode(self, batch: Sequence[Work]) -> Encoded:
        """Encode a batch, every item on its own: no item's tokens depend on what else is in its batch."""
        prepared, failed = self._prepared(batch, self._encode_item)
        if not prepared:
            return Encoded([], failed)
        usable = [item for item, _ in prepared]
        prompts, contexts = zip(*(inputs for _, inputs in prepared), strict=True)
        differ = any(item.reference.conversation is not None for item in usable)
        return Encoded(usable, failed, self._collate(prompts), self._collate(contexts) if differ else None)

    def _collate(self, rows: Sequence[Inputs]) -> BatchFeature:
        return BatchFeature(collate(rows, self._pad_token, side="left"))

    # --- The model ------------------------------------------------------------------------------------

    def _answer(self, batch: Sequence[Work], encoded: Encoded) -> list[Finished]:
        """Answer a batch; out of memory, answer it in halves and stay with the smaller size."""
        usable, failed = encoded.usable, encoded.failed
        if encoded.inputs is None:
            return failed
        self._check_lengths(usable, encoded.inputs)
        try:
            return failed + self._run(usable, encoded.inputs, encoded.contexts)
        except torch.OutOfMemoryError:
            if len(usable) == 1:
                raise
        torch.cuda.empty_cache()
        self.batch_size = max(1, min(self.batch_size, len(usable)) // 2)
        logger.warning("out of memory with %d items; batch size is now %d", len(usable), self.batch_size)
        middle = (len(usable) + 1) // 2
        halves = (usable[:middle], usable[middle:])
        return failed + [done for half in halves for done in self._answer(half, self._encode(half))]

    def _check_lengths(self, batch: Sequence[Work], inputs: Any) -> None:
        """Check the longest prompt of a batch."""
        lengths = inputs["attention_mask"].sum(-1)
        longest = int(lengths.argmax())
        item = batch[longest]
        reply = max(item.max_new_tokens, len(item.reference.tokens))
        self._check_length(item, int(lengths[longest]), reply, context_length(self.model.config))

    @torch.inference_mode()
    def _run(self, batch: Sequence[Work], inputs: Any, contexts: Any) -> list[Finished]:
        inputs = inputs.to(self.model.device, dtype=self.model.dtype)
        prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        divergences: dict[ItemKey, Divergence] = {}
        cache = None
        if self._meter is not None and any(item.reference.tokens for item in batch):
            if contexts is None:
                log_probs, cache = self._score_answers(batch, inputs)
            else:
                log_probs, _ = self._score_answers(batch, contexts.to(self.model.device, dtype=self.model.dtype))
            divergences = self._meter.measure(log_probs)
        if cache is None:
            prompt = dict(inputs)
        else:
            prompt["past_key_values"] = cache
        sequences = self.model.generate(**prompt, generation_config=self._generation(batch[0].max_new_tokens))
        replies = self.tokenizer.batch_decode(
            sequences[:, inputs["input_ids"].shape[1] :],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return [
            Finished(item.key, reply, divergences.get(item.key)) for item, reply in zip(batch, replies, strict=True)
        ]

    def _score_answers(
        self, batch: Sequence[Work], inputs: Any
    ) -> tuple[dict[ItemKey, tuple[tuple[int, ...], torch.Tensor]], DynamicCache | None]:
        """Forward pass over prompts and answers.

        Returns:
            Answer tokens and their log-probabilities [tokens, vocabulary] by item, and the cache of the prompts except
            their last token; the cache is None if this model's cache cannot be cut.
        """
        longest = max(len(item.reference.tokens) for item in batch)
        extended = append_answers(inputs, [item.reference.tokens for item in batch], longest, self._pad_token)
        # The positions from which ``generate`` will count on: without them some models count padding too.
        positions = self.model._prepare_position_ids_for_generation(extended["input_ids"], dict(extended))
        output = self.model(**extended, position_ids=positions, use_cache=True, logits_to_keep=longest + 1)
        log_probs = {}
        for item, logits in zip(batch, output.logits, strict=True):
            if tokens := item.reference.tokens[item.reference.start :]:
                own = logits[item.reference.start : len(item.reference.tokens)]
                log_probs[item.key] = (tokens, log_softmax(own, item.key))
        cache = output.past_key_values
        if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return log_probs, None
        cache.crop(-(longest + 1))
        return log_probs, cache

    @property
    def _pad_token(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self._end_of_turn if pad is None else int(pad)

    def _generation(self, max_new_tokens: int) -> GenerationConfig:
        """Greedy decoding, in place of the checkpoint's own generation config."""
        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=self.model.generation_config.eos_token_id or self._end_of_turn,
            pad_token_id=self._pad_token,
            use_cache=True,
        )


def _end_of_turn(model: Any, tokenizer: Any) -> int:
    """Token that ends a reply: the tokenizer's eos token if generation stops there, else the first stop token."""
    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    if tokenizer.eos_token_id in stops or not stops:
        if tokenizer.eos_token_id is None:
            raise ValueError("neither tokenizer nor generation config names an end-of-turn token")
        return int(tokenizer.eos_token_id)
    return int(stops[0])
