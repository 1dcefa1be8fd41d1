"""Encoding of calibration samples: answers, images, padding, errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tlq.samples import Sample, encode_batches, image_token_id


@pytest.fixture(scope="module")
def image_id(tiny_model: PreTrainedModel) -> int:
    return image_token_id(tiny_model.config)


def text_only(question: str) -> Sample:
    return Sample(
        "text", [], [{"role": "user", "content": question}, {"role": "assistant", "content": "No image at all."}]
    )


def test_loss_is_taken_on_the_answer_and_its_end(tiny_processor: Any, samples: list[Sample], image_id: int) -> None:
    for batch in encode_batches(samples, tiny_processor, image_id, 4, 512):
        for row, sample in enumerate(batch.samples):
            answer = tiny_processor.tokenizer.decode(batch.input_ids[row][batch.is_answer[row]])
            assert answer == samples[sample].messages[-1]["content"] + "<|im_end|>"


def test_image_tokens_are_marked_and_match_the_pixels(
    tiny_processor: Any, samples: list[Sample], image_id: int
) -> None:
    for batch in encode_batches(samples, tiny_processor, image_id, 4, 512):
        patches = batch.encode()["image_grid_thw"].prod(1)
        assert batch.is_image.sum(1).tolist() == (patches // 4).tolist()
        assert len(batch.encode()["pixel_values"]) == int(patches.sum())
        assert not bool((batch.is_image & ~batch.valid).any())


def test_pixels_are_encoded_on_demand_and_match_their_digest(
    tiny_processor: Any, samples: list[Sample], image_id: int
) -> None:
    first, *others = encode_batches(samples, tiny_processor, image_id, 4, 512)
    assert first.encode()["pixel_values"] is not first.encode()["pixel_values"]
    torch.testing.assert_close(first.encode(), first.encode(), rtol=0, atol=0)
    total = sum(value.numel() * value.element_size() for value in first.encode().values())
    assert 0.9 * total < first.size <= total
    assert torch.equal(first.encode()["input_ids"], first.input_ids)
    assert torch.equal(first.encode()["attention_mask"].bool(), first.valid)
    assert len({batch.digest for batch in (first, *others)}) == 1 + len(others)
    number, *rest = first.samples
    changed = list(samples)
    changed[number] = dataclasses.replace(samples[number], images=samples[rest[0]].images)
    again = [batch.digest for batch in encode_batches(changed, tiny_processor, image_id, 4, 512)]
    assert again != [first.digest, *(batch.digest for batch in others)]


def test_every_sample_is_batched_once_longest_first(tiny_processor: Any, samples: list[Sample], image_id: int) -> None:
    batches = encode_batches(samples, tiny_processor, image_id, 4, 512)
    assert sorted(sample for batch in batches for sample in batch.samples) == list(range(len(samples)))
    lengths = [int(length) for batch in batches for length in batch.valid.sum(1)]
    assert lengths == sorted(lengths, reverse=True)


def test_a_batch_may_mix_samples_with_and_without_images(
    tiny_model: PreTrainedModel, tiny_processor: Any, samples: list[Sample], image_id: int
) -> None:
    """The longest sample, first of its batch, has no image: the others' pixels must not get lost with it."""
    mixed = [text_only("A question that is far longer than those about images, and about nothing." * 2), *samples[:2]]
    (batch,) = encode_batches(mixed, tiny_processor, image_id, 3, 512)
    with torch.no_grad():
        together = tiny_model(**batch.encode()).logits
        for alone in encode_batches(mixed, tiny_processor, image_id, 1, 512):
            row = batch.samples.index(alone.samples[0])
            length = alone.valid.shape[1]
            torch.testing.assert_close(
                tiny_model(**alone.encode()).logits[0], together[row, :length], rtol=0, atol=1e-4
            )


def test_a_sample_too_long_is_never_cut(tiny_processor: Any, samples: list[Sample], image_id: int) -> None:
    with pytest.raises(ValueError, match=r"sample s\d: \d+ tokens, more than the 20 allowed; raise max_tokens"):
        encode_batches(samples, tiny_processor, image_id, 4, 20)


def test_a_sample_must_end_with_an_answer(tiny_processor: Any, samples: list[Sample], image_id: int) -> None:
    question_only = dataclasses.replace(samples[0], messages=samples[0].messages[:1])
    with pytest.raises(ValueError, match="sample s0: the last turn must be the assistant's answer"):
        encode_batches([question_only], tiny_processor, image_id, 1, 512)


def test_an_empty_answer_is_refused(tiny_processor: Any, samples: list[Sample], image_id: int) -> None:
    messages = [samples[0].messages[0], {**samples[0].messages[1], "content": " "}]
    with pytest.raises(ValueError, match="sample s0: its answer is empty; correct the sample or leave it out"):
        encode_batches([dataclasses.replace(samples[0], messages=messages)], tiny_processor, image_id, 1, 512)


def test_a_model_without_image_tokens_is_refused() -> None:
    class Config:
        model_type = "text_only"

    with pytest.raises(ValueError, match="'text_only' names no image token"):
        image_token_id(Config())
