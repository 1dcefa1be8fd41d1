"""Calibration, evaluation and serving turn a chat into the tokens that transformers makes of it, for every family."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from PIL import Image
from support.processors import PROCESSORS, buildable, write_processor
from transformers import GotOcr2Processor

from benchmarks.chat_model import ChatLM
from benchmarks.divergence import ItemKey
from benchmarks.items import AnswerOptions, Finished, Work
from tasks.registry.served_model import VisionQuestionAnswering
from tlq.inputs.chat import Inputs, Message
from tlq.models.families import FAMILIES
from tlq.models.processor import load_processor
from tlq.samples import Sample, encode_sample

QUESTION = Message(role="user", content="<image>Which letter?")
PICTURE = Image.new("RGB", (48, 32), "red")


class EncodingLM(ChatLM):
    """An evaluated model that answers nothing and keeps its inputs."""

    inputs: Inputs

    def _answered(self, waiting: Sequence[Work], silent: bool) -> Iterator[list[Finished]]:
        for item in waiting:
            self.inputs = self._encode_item(item)[0]
            yield [Finished(item.key)]

    def _needs_reference(self, key: ItemKey) -> bool:
        return False


def calibrated(processor: Any) -> Inputs:
    """The inputs up to the answer."""
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    sample = Sample("1", [file.getvalue()], [QUESTION, Message(role="assistant", content="OAK")])
    inputs, answer = encode_sample(sample, processor)
    shape = inputs["input_ids"].shape
    return {name: value[:, :-answer] if value.shape == shape else value for name, value in inputs.items()}


def evaluated(processor: Any) -> Inputs:
    lm = EncodingLM(processor, AnswerOptions(1, None))
    prompt = lm.apply_chat_template([{"role": "user", "content": QUESTION["content"]}])
    lm.generate_until([Instance("generate_until", {}, (prompt, {"max_gen_toks": 4}, {"visual": [PICTURE]}), 0)])
    return lm.inputs


def served(processor: Any) -> Inputs:
    model = VisionQuestionAnswering()
    text = SimpleNamespace(max_position_embeddings=4096)
    config = SimpleNamespace(get_text_config=lambda: text)
    model.model = SimpleNamespace(config=config, device="cpu", dtype=torch.float32)
    model.processor, model.max_new_tokens = processor, 4
    return dict(model._encode(0, PICTURE, "Which letter?"))


def of_transformers(processor: Any) -> Inputs:
    content = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "Which letter?"}]
    turns = [{"role": "user", "content": content}]
    if isinstance(processor, GotOcr2Processor):  # refuses images in the form in which its own method gives them
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        return dict(processor(text=text, images=PICTURE, return_tensors="pt"))
    return dict(
        processor.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    )


def test_every_supported_family_has_a_processor_here() -> None:
    assert set(PROCESSORS) == set(FAMILIES)


@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_every_family_is_encoded_as_transformers_does(name: str, tmp_path: Path) -> None:
    """All inputs of the model are equal: text and image tokens, the token at the beginning, pixels."""
    buildable(name)
    processor = load_processor(write_processor(name, tmp_path))
    expected = of_transformers(processor)
    for way in (calibrated, evaluated, served):
        inputs = way(processor)
        assert set(inputs) == set(expected), way.__name__
        for each, tensor in inputs.items():
            assert torch.equal(tensor, expected[each]), (way.__name__, each)
