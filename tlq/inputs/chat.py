"""The one place where a chat becomes tokens, for calibration, evaluation and serving.

The tokens are those of ``processor.apply_chat_template(tokenize=True)``. Messages hold plain text in which ``<image>``
marks the place of an image (the convention of LLaVA data).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from tlq.runtime.limit import time_limit

IMAGE_MARK = "<image>"

#: The longest chat that is tokenized: some tokenizers take minutes for a megabyte, and no model here has the context.
MAX_CHARACTERS = 500_000

#: A chat template is code of the checkpoint; rendering takes milliseconds.
TEMPLATE_SECONDS = 10.0

#: Names to tensors, as the model's forward takes them.
Inputs = dict[str, Tensor]

#: What processors and chat templates raise for a chat that they cannot take.
REFUSALS = (ValueError, IndexError, KeyError, TypeError, ArithmeticError, RuntimeError, StopIteration, TemplateError)

#: Two answers that share neither their first nor their last character: see ``render_answer``.
_PROBES = ("0zero0", "1one1")

#: Fill of padded places in inputs that have one value per token; ``input_ids`` are filled with the padding token.
_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids")


#: Processors that take the images of a chat as one list, not as a list for every chat.
_FLAT = ("GotOcr2Processor",)


#: Inputs in whose last dimension the patches of all images follow each other -> the input that gives the images' sizes.
_PACKED = {"pixel_values": "target_sizes"}


#: Fill of padded places in other inputs, if it is not 0: the position of a patch that is none (Gemma 4).
_FILLS = {"image_position_ids": -1}


#: Inputs that are numbers of patches -> the input [crops, patches, ...] whose patches they number; -1 is none.
_NUMBERS = {"image_token_pooling": "pixel_values"}


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True)
class AnsweredText:
    """A conversation as the chat template writes it: all before the answer, and the answer with the end of its turn."""

    context: str
    answer: str


def chat(messages: Sequence[Message], processor: Any) -> list[dict[str, Any]]:
    """Messages in the form that chat templates take, ``<image>`` marks turned into image parts.

    Image tokens of the model that somebody typed become plain words: only a mark stands for an image.

    Raises:
        ValueError: the content of a message is no text, or the texts are longer than ``MAX_CHARACTERS``.
    """
    characters = sum(len(message["content"]) for message in messages)
    if characters > MAX_CHARACTERS:
        raise ValueError(f"its texts have {characters} characters, more than {MAX_CHARACTERS}; shorten them")
    typed = image_tokens(processor)
    turns = []
    for message in messages:
        if not isinstance(message["content"], str):
            raise ValueError(
                f"a turn's content is a {type(message['content']).__name__}, must be text with <image> marks"
            )
        parts: list[dict[str, str]] = []
        for index, text in enumerate(message["content"].split(IMAGE_MARK)):
            if index:
                parts.append({"type": "image"})
            for token in typed:
                text = text.replace(token, "video" if "video" in token else "image")
            if text:
                parts.append({"type": "text", "text": text})
        turns.append({"role": message["role"], "content": parts})
    return turns


def image_tokens(processor: Any) -> list[str]:
    """The tokens with which a processor marks images and videos, the longest first.

    Names that are no token of the tokenizer are words (Aya Vision's ``TILE``), except the mark itself, which the
    processor replaces in the text (Ovis 2).
    """
    tokenizer = processor.tokenizer
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    named = {str(value) for name, value in vars(processor).items() if name.endswith("_token")} & special
    placed = ((processor, "image_token"), (tokenizer, "image_token"), (tokenizer, "boi_token"))
    tokens = named | {str(getattr(place, name)) for place, name in placed if getattr(place, name, None)}
    return sorted(tokens, key=lambda token: (-len(token), token))


def render_prompt(processor: Any, messages: Sequence[Message]) -> str:
    """The text from which the model generates its answer.

    Raises:
        ValueError: the chat template refuses the messages.
        EndlessError: the chat template does not end in ``TEMPLATE_SECONDS``.
    """
    return _render(processor, chat(messages, processor), add_generation_prompt=True)


def render_answer(processor: Any, messages: Sequence[Message]) -> AnsweredText:
    """The conversation's text, parted where its last message, the answer, begins.

    The place of the answer is found by rendering the conversation with two other answers: what all renderings begin
    with is the context, what all end with follows the answer. The first special token that follows is the end of the
    turn; where the template writes none (llava-1.5), the tokenizer's ``eos_token`` is. Where the generation prompt
    differs from the context in its blanks only (LLaVA-OneVision), it is the context: the model is used with it.

    Raises:
        ValueError: the last message is not from the assistant, is empty, or the chat template refuses the messages.
        EndlessError: the chat template does not end in ``TEMPLATE_SECONDS``.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError("the last turn must be the assistant's answer")
    (answered,) = render_answers(processor, messages[:-1], [messages[-1]["content"]])
    return answered


def render_answers(processor: Any, question: Sequence[Message], answers: Sequence[str]) -> list[AnsweredText]:
    """Several answers to one question, each as ``render_answer``; what they share is rendered once."""
    asked: list[dict[str, Any]] = []
    prompt = ""
    probes: list[str] = []
    rendered = []
    for answer in answers:
        turns = chat([*question, Message(role="assistant", content=answer)], processor)
        if not answer.strip():
            raise ValueError("its answer is empty")
        if not probes:
            asked = turns[:-1]
            prompt = _render(processor, asked, add_generation_prompt=True)
            probes = [
                _render(processor, [*asked, {"role": "assistant", "content": [{"type": "text", "text": probe}]}])
                for probe in _PROBES
            ]
        rendered.append(_part(processor, _render(processor, turns), prompt, probes))
    return rendered


def _part(processor: Any, text: str, prompt: str, probes: Sequence[str]) -> AnsweredText:
    """A conversation's ``text``, parted where its answer begins.

    Args:
        prompt: the question's rendering, from which the model generates.
        probes: the conversation's renderings with two other answers.
    """
    start = len(os.path.commonprefix([text, *probes]))
    after = len(os.path.commonprefix([each[::-1] for each in (text[start:], *(probe[start:] for probe in probes))]))
    answer = text[start : len(text) - after]
    if not answer.strip():
        raise ValueError("the chat template does not write its answer")
    context = text[:start]
    if context.split() == prompt.split() and not context.startswith(prompt):
        context = prompt
    return AnsweredText(context, answer + _end_of_turn(processor.tokenizer, text[len(text) - after :]))


def _render(processor: Any, turns: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
    try:
        with time_limit(TEMPLATE_SECONDS, "the model's chat template"):
            text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except REFUSALS as error:
        raise ValueError(f"the model's chat template refuses it: {_reason(error)}") from error
    return str(text)


def _end_of_turn(tokenizer: Any, after: str) -> str:
    """The token that ends the answer's turn, in the text ``after`` the answer."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
    places = {token: after.find(token) for token in tokens if token and token in after}
    if places:
        return min(places, key=lambda token: (places[token], -len(token)))
    return str(tokenizer.eos_token or "")


def answer_ids(tokenizer: Any, answered: AnsweredText) -> list[int]:
    """Token ids of the answer and the end of its turn; a token across the boundary belongs to the answer."""
    return ids_after(tokenizer, answered.context, answered.answer)[1]


def ids_after(tokenizer: Any, context: str, text: str) -> tuple[bool, list[int]]:
    """Tokens of ``text`` where it follows ``context``, from the first that ``context`` alone does not have.

    Returns:
        Whether all tokens of ``context`` stay as they are alone, and the ids.
    """
    alone = tokenizer(context, add_special_tokens=False)["input_ids"]
    together = tokenizer(context + text, add_special_tokens=False)["input_ids"]
    common = len(os.path.commonprefix([alone, together]))
    return common == len(alone), list(together[common:])


def encode(processor: Any, text: str, images: Sequence[Image.Image]) -> Inputs:
    """Inputs [1, ...] of the model's forward for the text of a chat and its images.

    Raises:
        ValueError: the processor cannot take the chat, with its reason.
    """
    # As in transformers: where the chat template writes the bos token (Gemma), the tokenizer must not add another.
    bos = processor.tokenizer.bos_token
    special = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
    try:
        return dict(processor(text=[text], images=_listed(processor, images), return_tensors="pt", **special))
    except REFUSALS as error:
        raise ValueError(f"the model's processor refuses it: {_reason(error)}") from error


def _listed(processor: Any, images: Sequence[Image.Image]) -> list[Any] | None:
    if not images:
        return None
    return list(images) if type(processor).__name__ in _FLAT else [list(images)]


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if text and isinstance(error, ValueError | TemplateError) else f"{type(error).__name__}: {text}"


def collate(rows: Sequence[Inputs], pad_id: int, side: str = "right") -> Inputs:
    """Encoded chats, [1, ...] each, as one batch whose tokens are padded on ``side``."""
    width = max(row["input_ids"].shape[1] for row in rows)
    inputs: Inputs = {}
    names = dict.fromkeys(name for row in rows for name in row)  # chats without an image have no pixels
    for name in names:
        if name in _PER_TOKEN:
            fill = pad_id if name == "input_ids" else 0
            values = [row.get(name, torch.zeros_like(row["input_ids"])) for row in rows]
            inputs[name] = torch.cat([_pad(value, width, fill, side) for value in values])
        elif name in _NUMBERS:
            inputs[name] = torch.cat(_renumbered([row for row in rows if name in row], name))
        elif _PACKED.get(name) in names:
            inputs[name] = torch.cat([row[name] for row in rows if name in row], -1)
        else:
            values = [row[name] for row in rows if name in row]
            inputs[name] = torch.cat(_pad_to_common(values, _FILLS.get(name, 0)))
    return inputs


def _renumbered(rows: Sequence[Inputs], name: str) -> list[Tensor]:
    """Numbers of patches in the patches of all rows together."""
    before, numbers = 0, []
    for row in rows:
        numbers.append(torch.where(row[name] >= 0, row[name] + before, row[name]))
        before += row[_NUMBERS[name]].shape[:2].numel()
    return numbers


def _pad_to_common(values: list[Tensor], fill: int) -> list[Tensor]:
    """Pad every dimension except the first with ``fill``, up to the largest size.

    Images are cut into different numbers of tiles. Models that take tiles [images, tiles, ...] ignore the tiles beyond
    those of the image's size (LLaVA-NeXT, LLaVA-OneVision) or tiles of zeros (Idefics3, SmolVLM).
    """
    common = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [each for target, size in zip(common, value.shape[1:], strict=True) for each in (target - size, 0)]
        padded.append(torch.nn.functional.pad(value, missing[::-1], value=fill))
    return padded


def _pad(values: Tensor, width: int, fill: int, side: str) -> Tensor:
    missing = width - values.shape[1]
    return torch.nn.functional.pad(values, (0, missing) if side == "right" else (missing, 0), value=fill)
