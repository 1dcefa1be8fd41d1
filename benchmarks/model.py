"""A vision-language model with lm-eval's interface: it answers chat prompts with images by greedy decoding.

One prefill serves two purposes. A forward pass over prompt and reference answer gives the answer's log-probabilities;
``generate`` continues from its cache, cut back to the prompt. Batches are sorted by length. While the model computes a
batch, the images of the next batch are decoded and processed.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm
from transformers import BatchFeature, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from benchmarks.data import BenchmarkError
from benchmarks.divergence import AnswerMeter, Divergence, ItemKey
from benchmarks.replies import final_answer
from tlq.inputs.chat import Inputs, Message, answer_ids, chat, collate, encode, ids_after, render_answer, render_prompt
from tlq.inputs.images import IMAGE_ERRORS, as_rgb

logger = logging.getLogger(__name__)

# Image tokens are estimated for sorting only; 28 x 28 pixels a token is Qwen2-VL's.
PIXELS_PER_TOKEN = 784


@dataclass(frozen=True)
class Reference:
    """A reference answer, which the model is measured on.

    Attributes:
        tokens: ids to append to the context.
        start: first of ``tokens`` that belongs to the answer; those before it are the template's (``</think>``).
        conversation: text that ends with ``tokens``, where they do not follow the prompt of generation.
    """

    tokens: tuple[int, ...] = ()
    start: int = 0
    conversation: str | None = None


@dataclass(frozen=True)
class Work:
    """One item to answer."""

    key: ItemKey
    prompt: str
    images: tuple[Any, ...]
    max_new_tokens: int
    reference: Reference = Reference()
    length: int = 0


@dataclass(frozen=True)
class Finished:
    """One finished item. If it could not be answered, ``failure`` is the reason and the reply is empty."""

    key: ItemKey
    reply: str = ""
    divergence: Divergence | None = None
    failure: str | None = None


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


@dataclass(frozen=True)
class AnswerOptions:
    """Options of ``VisionLM``.

    Attributes:
        batch_size: items per batch; halved when memory runs out.
        max_new_tokens: longest reply in tokens, in place of the tasks' own lengths.
        meter: measures reference answers; None measures none.
        finished: items answered by an earlier, interrupted run.
        on_batch: called with each batch of finished items.
    """

    batch_size: int
    max_new_tokens: int | None = None
    meter: AnswerMeter | None = None
    finished: Mapping[ItemKey, Finished] = field(default_factory=dict)
    on_batch: Callable[[Sequence[Finished]], None] = lambda batch: None


class VisionLM(LM):
    """lm-eval model around an already loaded transformers model and its processor."""

    MULTIMODAL = True

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
            name_of: function from task and position to the row's name.
            answers: reference answers, which the meter of ``options`` may measure.
        """
        super().__init__()
        self.model = model.eval()
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.batch_size = options.batch_size
        self.finished = dict(options.finished)
        self._name_of = name_of
        self._max_new_tokens = options.max_new_tokens
        self._answers = answers or {}
        self._meter = options.meter
        self._on_batch = options.on_batch
        self._chats: dict[str, list[Message]] = {}
        self._refused: dict[str, str] = {}
        self._end_of_turn = _end_of_turn(model, self.tokenizer)

    # --- lm-eval's interface --------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", "tokenizer"))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Chat turns with ``<image>`` placeholders to the model's own prompt text."""
        messages = [Message(role=turn["role"], content=turn["content"]) for turn in chat_history]
        if not add_generation_prompt:
            return str(
                self.processor.apply_chat_template(
                    chat(messages, self.processor), tokenize=False, continue_final_message=True
                )
            )
        try:
            prompt = render_prompt(self.processor, messages)
        except ValueError as error:
            prompt = f"refused {len(self._refused)}"  # the item is skipped when it is to be answered
            self._refused[prompt] = str(error)
        self._chats[prompt] = messages
        return prompt

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies in the order of the requests; details of every item are in ``finished``."""
        work = [self._work(request) for request in requests]
        waiting = [item for item in work if item.key not in self.finished]
        if len(waiting) < len(work):
            done_before = len(work) - len(waiting)
            logger.info("%d of %d items were answered before; continuing with the rest", done_before, len(work))
        with tqdm(total=len(waiting), desc="answers", unit="item", disable=disable_tqdm) as progress:
            for batch, encoded in self._encoded_batches(self._in_batches(waiting)):
                done = self._answer(batch, encoded)
                self.finished |= {item.key: item for item in done}
                self._on_batch(done)
                progress.update(len(done))
        return [final_answer(self.finished[item.key].reply) for item in work]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("these benchmarks generate; use output_type generate_until")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("these benchmarks generate; use output_type generate_until")

    # --- Items and batches ----------------------------------------------------------------------------

    def _work(self, request: Instance) -> Work:
        if len(request.args) < 3:
            raise BenchmarkError(f"{request.task_name}: the task gives no images; set doc_to_image in its YAML")
        prompt, generation, extra = request.args
        key = ItemKey(str(request.task_name), self._name_of(str(request.task_name), int(request.doc_id or 0)))
        images = tuple(extra["visual"])
        max_new_tokens = self._max_new_tokens or generation["max_gen_toks"]
        n_text = len(self.tokenizer(prompt, add_special_tokens=False).input_ids)
        n_image = sum(image.width * image.height // PIXELS_PER_TOKEN for image in images)
        return Work(key, prompt, images, max_new_tokens, self._reference(key, prompt), n_text + n_image)

    def _reference(self, key: ItemKey, prompt: str) -> Reference:
        """The reference answer as the chat template writes it after the question; empty if it is not to be measured."""
        answer = self._answers.get(key, "")
        if not answer or prompt in self._refused or self._meter is None or not self._meter.wants(key):
            return Reference()
        if prompt not in self._chats:
            raise BenchmarkError(f"{key}: its prompt is not from the chat template; remove gen_prefix from the task")
        answered = render_answer(self.processor, [*self._chats[prompt], Message(role="assistant", content=answer)])
        text = answered.context + answered.answer
        own = answer_ids(self.tokenizer, answered)
        if text.startswith(prompt):
            follows, tokens = ids_after(self.tokenizer, prompt, text[len(prompt) :])
            if follows:
                return Reference(tuple(tokens), len(tokens) - len(own))
        return Reference(tuple(own), 0, text)

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
        usable, failed, prompts, contexts = [], [], [], []
        for item in batch:
            if item.prompt in self._refused:
                failed.append(Finished(item.key, failure=self._refused[item.prompt][:200]))
                continue
            try:
                images = [pixels(image) for image in item.images]
                prompt = encode(self.processor, item.prompt, images)
                context = self._context(item.reference, images) or prompt
            except IMAGE_ERRORS as error:
                failed.append(Finished(item.key, failure=f"it cannot be encoded: {error}"[:200]))
                continue
            usable.append(item)
            prompts.append(prompt)
            contexts.append(context)
        if not usable:
            return Encoded([], failed)
        differ = any(item.reference.conversation is not None for item in usable)
        return Encoded(usable, failed, self._collate(prompts), self._collate(contexts) if differ else None)

    def _context(self, reference: Reference, images: Sequence[Any]) -> Inputs | None:
        """What the reference answer follows, where that is not the prompt."""
        if reference.conversation is None:
            return None
        inputs = encode(self.processor, reference.conversation, images)
        shape, length = inputs["input_ids"].shape, len(reference.tokens)
        return {name: value[:, :-length] if value.shape == shape else value for name, value in inputs.items()}

    def _collate(self, rows: Sequence[Inputs]) -> BatchFeature:
        return BatchFeature(collate(rows, self._pad_token, side="left"))

    # --- The model ------------------------------------------------------------------------------------

    def _answer(self, batch: Sequence[Work], encoded: Encoded) -> list[Finished]:
        """Answer a batch; out of memory, answer it in halves and stay with the smaller size."""
        usable, failed = encoded.usable, encoded.failed
        if encoded.inputs is None:
            return failed
        self._check_length(usable, encoded.inputs)
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

    def _check_length(self, batch: Sequence[Work], inputs: Any) -> None:
        """Raise an error if a prompt is too long, because cutting the prompt would cut its image."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        lengths = inputs["attention_mask"].sum(-1)
        longest = int(lengths.argmax())
        needed = int(lengths[longest]) + max(batch[longest].max_new_tokens, len(batch[longest].reference.tokens))
        if limit is not None and needed > limit:
            raise BenchmarkError(
                f"{batch[longest].key}: the prompt has {int(lengths[longest])} tokens and with the reply may reach "
                f"{needed}, the model takes {limit}; lower evaluate.max_pixels or evaluate.max_new_tokens"
            )

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
        extended = _append(inputs, [item.reference.tokens for item in batch], longest, self._pad_token)
        # The positions from which ``generate`` will count on: without them some models count padding too.
        positions = self.model._prepare_position_ids_for_generation(extended["input_ids"], dict(extended))
        output = self.model(**extended, position_ids=positions, use_cache=True, logits_to_keep=longest + 1)
        log_probs = {}
        for item, logits in zip(batch, output.logits, strict=True):
            if tokens := item.reference.tokens[item.reference.start :]:
                own = logits[item.reference.start : len(item.reference.tokens)]
                log_probs[item.key] = (tokens, _log_softmax(own, item.key))
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


def _append(inputs: Any, answers: Sequence[Sequence[int]], longest: int, pad: int) -> dict[str, Any]:
    """Append answers [batch, longest] to the prompts, padded on the right; other inputs per token are padded with 0."""
    ids = inputs["input_ids"]
    tail = torch.full((len(answers), longest), pad, dtype=ids.dtype)
    mask = torch.zeros((len(answers), longest), dtype=inputs["attention_mask"].dtype)
    for row, answer in enumerate(answers):
        tail[row, : len(answer)] = torch.tensor(answer, dtype=ids.dtype)
        mask[row, : len(answer)] = 1
    tails = {"input_ids": tail, "attention_mask": mask}
    extended = {}
    for name, value in inputs.items():
        if torch.is_tensor(value) and value.shape == ids.shape:
            addition = tails.get(name, torch.zeros_like(tail)).to(value)
            value = torch.cat([value, addition], dim=1)
        extended[name] = value
    return extended


def _log_softmax(logits: torch.Tensor, key: ItemKey) -> torch.Tensor:
    if not torch.isfinite(logits).all():
        raise FloatingPointError(f"{key}: the model gives non-finite logits; its weights or scales are broken")
    return logits.float().log_softmax(-1)


def pixels(image: Any) -> Any:
    """PIL image, RGB, from an EncodedImage or a PIL image."""
    return image.decode() if hasattr(image, "decode") else as_rgb(image)


def _end_of_turn(model: Any, tokenizer: Any) -> int:
    """Token that ends a reply: the tokenizer's eos token if generation stops there, else the first stop token."""
    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    if tokenizer.eos_token_id in stops or not stops:
        if tokenizer.eos_token_id is None:
            raise ValueError("neither tokenizer nor generation config names an end-of-turn token")
        return int(tokenizer.eos_token_id)
    return int(stops[0])
