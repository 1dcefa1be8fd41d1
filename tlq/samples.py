"""Calibration samples: chat turns with images, encoded into padded micro-batches.

A sample's messages hold plain text in which ``<image>`` marks the place of an image (the convention of LLaVA data). The
last turn is the answer; importance is the gradient of the loss on its tokens.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tlq.runtime.digest import update_with_tensor

IMAGE_MARK = "<image>"

#: Arguments of the model's forward: tensors by name.
Inputs = dict[str, Tensor]


class Message(TypedDict):
    role: str
    content: str


@dataclass(frozen=True)
class Sample:
    """One conversation: encoded image files, chat turns (the last one is the answer), and its source."""

    id: str
    images: list[bytes]
    messages: list[Message]
    source: str = ""


@dataclass(frozen=True)
class Batch:
    """A micro-batch of samples, padded on the right.

    Pixels are not kept, because they take tens of GiB for 512 photographs and are used once or twice: ``encode()``
    computes the model's inputs at every call.

    Attributes:
        samples: index of each row in the list of samples.
        input_ids: [batch, time].
        valid, is_image, is_answer: bool [batch, time]; false for padding, true for image tokens, true for tokens that
            the loss is taken on.
        size: bytes of the encoded inputs without padding.
        digest: SHA-256 of the encoded samples.
        encode: returns the inputs of the model's forward, with all images processed again.
    """

    samples: list[int]
    input_ids: Tensor
    valid: Tensor
    is_image: Tensor
    is_answer: Tensor = field(repr=False)
    size: int
    digest: str
    encode: Callable[[], Inputs] = field(repr=False)


def decode_image(data: bytes) -> Image.Image:
    """An RGB image from the bytes of a PNG or JPEG file.

    Raises:
        ValueError: the bytes are not a readable image.
    """
    try:
        return Image.open(io.BytesIO(data)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable image: {error}") from error


def chat(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Convert messages to the form of chat templates, with image parts in place of ``<image>`` marks."""
    turns = []
    for message in messages:
        parts: list[dict[str, str]] = []
        for index, text in enumerate(message["content"].split(IMAGE_MARK)):
            if index:
                parts.append({"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
        turns.append({"role": message["role"], "content": parts})
    return turns


def encode_batches(
    samples: Sequence[Sample], processor: Any, image_token_id: int, batch_size: int, max_tokens: int
) -> list[Batch]:
    """Encode all samples as micro-batches, longest first, so that the rows of a batch need little padding.

    Raises:
        ValueError: a sample is longer than ``max_tokens`` (samples are never cut), has no answer, or has an unreadable
            image.
    """
    rows = [_Row.of(*_encode(sample, processor)) for sample in samples]
    for sample, row in zip(samples, rows, strict=True):
        if row.length > max_tokens:
            raise ValueError(
                f"sample {sample.id}: {row.length} tokens, more than the {max_tokens} allowed; "
                "raise max_tokens, or leave the sample out of the calibration data"
            )
    order = sorted(range(len(rows)), key=lambda index: (-rows[index].length, index))
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    pad_id = processor.tokenizer.pad_token_id or 0

    def encode(index: int) -> Inputs:
        return _encode(samples[index], processor)[0]

    return [_batch(chunk, rows, encode, pad_id, image_token_id) for chunk in chunks]


@dataclass(frozen=True)
class _Row:
    """The parts of an encoded sample that a batch keeps.

    Attributes:
        input_ids: [tokens].
        answer_length: number of answer tokens, at the end of the sample.
        size, digest: bytes and SHA-256 of all inputs of the model's forward.
    """

    input_ids: Tensor
    answer_length: int
    size: int
    digest: bytes

    @classmethod
    def of(cls, encoded: Inputs, answer_length: int) -> _Row:
        total = hashlib.sha256()
        for name, tensor in sorted(encoded.items()):
            update_with_tensor(total, name, tensor)
        size = sum(value.numel() * value.element_size() for value in encoded.values())
        return cls(encoded["input_ids"][0], answer_length, size, total.digest())

    @property
    def length(self) -> int:
        return len(self.input_ids)


def _encode(sample: Sample, processor: Any) -> tuple[Inputs, int]:
    """Encode one sample; returns the inputs and the number of answer tokens at the end."""
    prompt, answer = _prompt_and_answer(sample, processor)
    images = [[decode_image(data) for data in sample.images]] if sample.images else None
    # As in transformers: where the chat template writes the bos token (Gemma), the tokenizer must not add another.
    bos = processor.tokenizer.bos_token
    special = {"add_special_tokens": False} if bos and prompt.startswith(bos) else {}
    encoded = processor(text=[prompt + answer], images=images, return_tensors="pt", **special)
    answer_ids = _answer_ids(processor.tokenizer, prompt, answer)
    if encoded["input_ids"][0, -len(answer_ids) :].tolist() != answer_ids:
        raise ValueError(f"sample {sample.id}: its tokens do not end with those of the answer; leave the sample out")
    return dict(encoded), len(answer_ids)


def _prompt_and_answer(sample: Sample, processor: Any) -> tuple[str, str]:
    """The text before the answer, exactly as for generation, and the answer with the end of its turn.

    Raises:
        ValueError: the last turn is not an answer, or the text of the chat template does not end with it.
    """
    turns = chat(sample.messages)
    if not turns or turns[-1]["role"] != "assistant":
        raise ValueError(f"sample {sample.id}: the last turn must be the assistant's answer")
    prompt: str = processor.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    conversation: str = processor.apply_chat_template(turns, tokenize=False)
    answer = sample.messages[-1]["content"].strip()
    # LLaVA-OneVision's template writes a generation prompt slightly differently from the same turn in a conversation.
    start = len(prompt) if conversation.startswith(prompt) else conversation.rfind(answer)
    if not answer or start < 0:
        raise ValueError(f"sample {sample.id}: its chat template does not end with the answer, or it is empty")
    return prompt, conversation[start:].rstrip("\n")


def _answer_ids(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """Token ids after the prompt; a token across the boundary belongs to the answer."""
    alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    together = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    common = 0
    while common < min(len(alone), len(together)) and alone[common] == together[common]:
        common += 1
    return list(together[common:])


def _batch(
    chunk: list[int], rows: Sequence[_Row], encode: Callable[[int], Inputs], pad_id: int, image_token_id: int
) -> Batch:
    """The samples at the indices ``chunk`` as a micro-batch.

    Args:
        encode: encodes the sample at an index.
    """
    members = [rows[index] for index in chunk]
    lengths = torch.tensor([row.length for row in members])[:, None]
    answers = torch.tensor([row.answer_length for row in members])[:, None]
    position = torch.arange(int(lengths.max()))[None]
    input_ids = pad_sequence([row.input_ids for row in members], batch_first=True, padding_value=pad_id)
    return Batch(
        samples=chunk,
        input_ids=input_ids,
        valid=position < lengths,
        is_image=input_ids == image_token_id,
        is_answer=(position < lengths) & (position >= lengths - answers),
        size=sum(row.size for row in members),
        digest=hashlib.sha256(b"".join(row.digest for row in members)).hexdigest(),
        encode=lambda: _collate([encode(index) for index in chunk], pad_id),
    )


def _collate(rows: Sequence[Inputs], pad_id: int) -> Inputs:
    """Join encoded samples, [1, ...] each, into one padded batch."""
    width = max(row["input_ids"].shape[1] for row in rows)
    per_token = {"input_ids": pad_id, "attention_mask": 0, "mm_token_type_ids": 0, "token_type_ids": 0}
    inputs: Inputs = {}
    for name in dict.fromkeys(name for row in rows for name in row):  # samples without an image have no pixels
        values = [row[name] for row in rows if name in row]
        if name in per_token:
            values = [_pad_right(value, width, per_token[name]) for value in values]
        inputs[name] = torch.cat(values if name in per_token else _pad_to_common(values))
    return inputs


def _pad_to_common(values: list[Tensor]) -> list[Tensor]:
    """Pad every dimension except the first with zeros, up to the largest size.

    Images are cut into different numbers of tiles. Models that take tiles [images, tiles, ...] ignore the tiles beyond
    those of the image's size (LLaVA-NeXT, LLaVA-OneVision) or tiles of zeros (Idefics3, SmolVLM).
    """
    common = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    padded = []
    for value in values:
        missing = [each for target, size in zip(common, value.shape[1:], strict=True) for each in (target - size, 0)]
        padded.append(torch.nn.functional.pad(value, missing[::-1]))
    return padded


def _pad_right(values: Tensor, width: int, fill: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)


def image_token_id(config: Any) -> int:
    """The id of image tokens in ``input_ids``.

    Raises:
        ValueError: the config does not name one.
    """
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise ValueError(f"model type {config.model_type!r} names no image token in its config")
