"""The part of lm-eval's interface that every model of this project shares: chats, items and their encoding."""

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from benchmarks.data import BenchmarkError
from benchmarks.divergence import ItemKey
from benchmarks.items import AnswerOptions, Finished, Reference, Work, pixels
from benchmarks.replies import final_answer
from tlq.inputs.chat import (
    AnsweredText,
    Inputs,
    Message,
    answer_ids,
    chat,
    encode,
    ids_after,
    render_answers,
    render_prompt,
)
from tlq.inputs.images import IMAGE_ERRORS

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Image tokens are estimated for sorting only; 28 x 28 pixels a token is Qwen2-VL's.
PIXELS_PER_TOKEN = 784


class ChatLM(LM):
    """An lm-eval model that answers chats with images, and keeps what it has answered in ``finished``."""

    MULTIMODAL = True

    #: What else shortens an item that is too long, in words that follow the first.
    _also_lower = ""

    def __init__(
        self,
        processor: Any,
        options: AnswerOptions,
        name_of: Callable[[str, int], str] = lambda task, position: str(position),
        answers: Mapping[ItemKey, str] | None = None,
    ) -> None:
        """
        Args:
            name_of: function from task and position to the row's name.
            answers: reference answers.
        """
        super().__init__()
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

    @abstractmethod
    def _answered(self, waiting: Sequence[Work], silent: bool) -> Iterator[list[Finished]]:
        """Answer items; yields them part by part, as they are finished.

        Args:
            silent: show no progress bar.
        """

    @abstractmethod
    def _needs_reference(self, key: ItemKey) -> bool:
        """Whether an item's reference answer is read by the model."""

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
        for done in self._answered(waiting, disable_tqdm):
            self.finished |= {item.key: item for item in done}
            self._on_batch(done)
        return [final_answer(self.finished[item.key].reply) for item in work]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("these benchmarks generate; use output_type generate_until")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("these benchmarks generate; use output_type generate_until")

    # --- Items ----------------------------------------------------------------------------------------

    def _work(self, request: Instance) -> Work:
        if len(request.args) < 3:
            raise BenchmarkError(f"{request.task_name}: the task gives no images; set doc_to_image in its YAML")
        prompt, generation, extra = request.args
        key = ItemKey(str(request.task_name), self._name_of(str(request.task_name), int(request.doc_id or 0)))
        images = tuple(extra["visual"])
        max_new_tokens = self._max_new_tokens or generation["max_gen_toks"]
        n_text = len(self.tokenizer(prompt, add_special_tokens=False).input_ids)
        n_image = sum(image.width * image.height // PIXELS_PER_TOKEN for image in images)
        answer = self._answers.get(key, "")
        asked = answer and prompt not in self._refused and self._needs_reference(key)
        reference = self._reference(key, prompt, answer) if asked else Reference()
        return Work(key, prompt, images, max_new_tokens, reference, n_text + n_image)

    def _reference(self, key: ItemKey, prompt: str, answer: str) -> Reference:
        """An answer as the chat template writes it after the question."""
        (reference,) = self._references(key, prompt, [answer])
        return reference

    def _references(self, key: ItemKey, prompt: str, answers: Sequence[str]) -> list[Reference]:
        """Several answers to one question, each as ``_reference``."""
        if prompt not in self._chats:
            raise BenchmarkError(f"{key}: its prompt is not from the chat template; remove gen_prefix from the task")
        rendered = render_answers(self.processor, self._chats[prompt], answers)
        return [self._reference_of(prompt, answered) for answered in rendered]

    def _reference_of(self, prompt: str, answered: AnsweredText) -> Reference:
        text = answered.context + answered.answer
        own = answer_ids(self.tokenizer, answered)
        if text.startswith(prompt):
            follows, tokens = ids_after(self.tokenizer, prompt, text[len(prompt) :])
            if follows:
                return Reference(tuple(tokens), len(tokens) - len(own))
        return Reference(tuple(own), 0, text)

    def _check_length(self, item: Work, prompt: int, reply: int, limit: int | None) -> None:
        """Raise an error if prompt and reply are longer than a context: cutting the prompt would cut its image.

        Args:
            prompt, reply: tokens.
            limit: of the model; None if its config states none.
        """
        if limit is not None and prompt + reply > limit:
            raise BenchmarkError(
                f"{item.key}: the prompt has {prompt} tokens and with the reply may reach {prompt + reply}, the model "
                f"takes {limit}; lower evaluate.max_pixels{self._also_lower}"
            )

    def _encode_item(self, item: Work) -> tuple[Inputs, Inputs]:
        """An item's prompt, and what its reference answer follows, which is nearly always the same.

        Raises:
            Errors of ``IMAGE_ERRORS``: it cannot be encoded.
        """
        images = [pixels(image) for image in item.images]
        prompt = encode(self.processor, item.prompt, images)
        if item.reference.conversation is None:
            return prompt, prompt
        inputs = encode(self.processor, item.reference.conversation, images)
        shape, length = inputs["input_ids"].shape, len(item.reference.tokens)
        return prompt, {name: value[:, :-length] if value.shape == shape else value for name, value in inputs.items()}

    def _prepared(
        self, items: Sequence[Work], prepare: Callable[[Work], T]
    ) -> tuple[list[tuple[Work, T]], list[Finished]]:
        """Items with what ``prepare`` returns for them, and a failure for each item that is refused."""
        usable, failed = [], []
        for item in items:
            if (reason := self._refused.get(item.prompt)) is not None:
                failed.append(Finished(item.key, failure=reason[:200]))
                continue
            try:
                usable.append((item, prepare(item)))
            except IMAGE_ERRORS as error:
                failed.append(Finished(item.key, failure=f"it cannot be encoded: {error}"[:200]))
        return usable, failed


def context_length(config: Any) -> int | None:
    """The number of tokens that a model takes; None if its config states none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def append_answers(inputs: Any, answers: Sequence[Sequence[int]], longest: int, pad: int) -> dict[str, Any]:
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


def log_softmax(logits: torch.Tensor, key: ItemKey) -> torch.Tensor:
    """Log-probabilities in float32. Raises FloatingPointError if a logit is not finite."""
    if not torch.isfinite(logits).all():
        raise FloatingPointError(f"{key}: the model gives non-finite logits; its weights or scales are broken")
    return logits.float().log_softmax(-1)
