"""Calibration samples: chat turns with images, encoded into padded micro-batches.

The last turn of a sample is the answer; importance is the gradient of the loss on its tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tlq.inputs.chat import Inputs, Message, answer_ids, collate, encode, render_answer
from tlq.inputs.images import decode_image
from tlq.runtime.digest import update_with_tensor


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


def encode_batches(
    samples: Sequence[Sample], processor: Any, image_token_id: int, batch_size: int, max_tokens: int
) -> list[Batch]:
    """Encode all samples as micro-batches, longest first, so that the rows of a batch need little padding.

    Raises:
        ValueError: a sample is longer than ``max_tokens`` (samples are never cut), has no answer, or has an unreadable
            image.
    """
    rows = [EncodedRow.of(*_encode(sample, processor)) for sample in samples]
    for sample, row in zip(samples, rows, strict=True):
        if row.length > max_tokens:
            raise ValueError(
                f"sample {sample.id}: {row.length} tokens, more than the {max_tokens} allowed; "
                "raise max_tokens, or leave the sample out of the calibration data"
            )

    def encode(index: int) -> Inputs:
        return _encode(samples[index], processor)[0]

    return micro_batches(rows, encode, processor.tokenizer.pad_token_id or 0, image_token_id, batch_size)


def micro_batches(
    rows: Sequence[EncodedRow], encode: Callable[[int], Inputs], pad_id: int, image_token_id: int, batch_size: int
) -> list[Batch]:
    """Rows as micro-batches, longest first.

    Args:
        encode: the inputs of the row at an index, computed again at every call.
    """
    order = sorted(range(len(rows)), key=lambda index: (-rows[index].length, index))
    chunks = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [_batch(chunk, rows, encode, pad_id, image_token_id) for chunk in chunks]


@dataclass(frozen=True)
class EncodedRow:
    """The parts of an encoded sample that a batch keeps.

    Attributes:
        input_ids: [tokens].
        answer_length: number of answer tokens, at the end of the sample.
        size, digest: bytes and SHA-256 of all inputs of the model's forward; the digest may be left out.
    """

    input_ids: Tensor
    answer_length: int
    size: int
    digest: bytes

    @classmethod
    def of(cls, encoded: Inputs, answer_length: int, with_digest: bool = True) -> EncodedRow:
        """The row of an encoded sample; ``with_digest`` if a resumed job has to recognise it."""
        total = hashlib.sha256()
        for name, tensor in sorted(encoded.items()) if with_digest else ():
            update_with_tensor(total, name, tensor)
        size = sum(value.numel() * value.element_size() for value in encoded.values())
        return cls(encoded["input_ids"][0], answer_length, size, total.digest() if with_digest else b"")

    @property
    def length(self) -> int:
        return len(self.input_ids)


def encode_sample(sample: Sample, processor: Any) -> tuple[Inputs, int]:
    """One sample encoded by the processor, and the number of its last tokens that are the answer.

    Raises:
        ValueError: the sample cannot be encoded, with the reason.
    """
    answered = render_answer(processor, sample.messages)
    inputs = encode(processor, answered.context + answered.answer, [decode_image(data) for data in sample.images])
    answer = answer_ids(processor.tokenizer, answered)
    if inputs["input_ids"][0, -len(answer) :].tolist() != answer:
        raise ValueError("its tokens do not end with those of its answer")
    return inputs, len(answer)


def _encode(sample: Sample, processor: Any) -> tuple[Inputs, int]:
    try:
        return encode_sample(sample, processor)
    except ValueError as error:
        raise ValueError(f"sample {sample.id}: {error}; correct the sample or leave it out") from error


def _batch(
    chunk: list[int], rows: Sequence[EncodedRow], encode: Callable[[int], Inputs], pad_id: int, image_token_id: int
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
        encode=lambda: collate([encode(index) for index in chunk], pad_id),
    )


def image_token_id(config: Any) -> int:
    """The id of image tokens in ``input_ids``.

    Raises:
        ValueError: the config does not name one.
    """
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    raise ValueError(f"model type {config.model_type!r} names no image token in its config")
