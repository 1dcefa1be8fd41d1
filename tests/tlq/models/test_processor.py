"""The processor that ships with a checkpoint, with and without torchvision."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.families import tiny_config
from support.processors import PROCESSORS, buildable, write_processor, write_tiny_with_processor
from support.quick_project import ROOT
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available

from tlq.export.loading import load_model
from tlq.inputs.chat import Message
from tlq.models.decoder import to_device
from tlq.models.processor import image_only_class, load_processor
from tlq.samples import Sample, encode_batches, image_token_id

TEXT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What colour?<|im_end|>\n"


def png(seed: int, width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def test_the_processor_gives_ids_and_pixels_for_an_image_and_a_text(tiny_processor: Any) -> None:
    """There is one image token per 2 x 2 patches, and a red image has one normalised pixel value per channel."""
    red = Image.new("RGB", (48, 32), (255, 0, 0))
    encoded = tiny_processor(text=[TEXT], images=[red], return_tensors="pt")
    assert encoded["image_grid_thw"].tolist() == [[1, 4, 6]]
    ids = tiny_processor.tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist())
    assert ids.count("<|image_pad|>") == 6
    assert tiny_processor.tokenizer.decode(encoded["input_ids"][0]).replace("<|image_pad|>", "") == TEXT.replace(
        "<|image_pad|>", ""
    )
    pixels = encoded["pixel_values"].view(24, 3, 2, 8, 8)  # patch, channel, time, height, width
    image_processor = tiny_processor.image_processor
    for channel, value in enumerate((1.0, 0.0, 0.0)):
        expected = (value - image_processor.image_mean[channel]) / image_processor.image_std[channel]
        torch.testing.assert_close(pixels[:, channel], torch.full_like(pixels[:, channel], expected))


def test_the_processor_has_the_chat_template(tiny_processor: Any) -> None:
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]}]
    assert tiny_processor.apply_chat_template(turns, tokenize=False) == TEXT


def test_image_settings_can_be_changed(tiny_checkpoint: Path) -> None:
    processor = load_processor(tiny_checkpoint, min_pixels=256, max_pixels=256)
    encoded = processor(text=[TEXT], images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    assert encoded["image_grid_thw"].tolist() == [[1, 2, 2]]


@pytest.mark.parametrize("name", list(PROCESSORS))
def test_every_family_reads_images_of_any_shape(name: str, tmp_path: Path) -> None:
    """As many image tokens as the model makes features (it refuses any other number), none of them cut; one <bos>."""
    buildable(name)
    path = write_tiny_with_processor(name, tmp_path)
    model, processor = load_model(path), load_processor(path)
    shapes = [(16, 16), (48, 16), (20, 37), (64, 30)]
    samples = [
        Sample(str(number), [png(number, *shape)], [user("<image>What is it?"), assistant(f"Number {number}.")])
        for number, shape in enumerate(shapes)
    ]
    samples.append(Sample("two", [png(5, 16, 16), png(6, 30, 20)], [user("<image><image>Same?"), assistant("No.")]))
    counts: dict[int, int] = {}
    for batch in encode_batches(samples, processor, image_token_id(model.config), 3, 1024):
        with torch.no_grad():
            inputs = to_device(batch.encode(), torch.device("cpu"), model.dtype)
            assert bool(torch.isfinite(model(**inputs).logits[batch.valid]).all())
        for row, sample in enumerate(batch.samples):
            counts[sample] = int(batch.is_image[row].sum())
            text = processor.tokenizer.decode(batch.input_ids[row][batch.valid[row]])
            answer = processor.tokenizer.decode(batch.input_ids[row][batch.is_answer[row]])
            assert answer == samples[sample].messages[-1]["content"] + "<|im_end|>"
            assert text.endswith("<|im_start|>assistant\n" + answer)
            assert text.count("<bos>") == PROCESSORS[name].bos
    assert all(counts.values())
    if name == "llava_onevision":
        # The whole image is 2 x 2. 16 x 16: one tile of 2 rows and their newlines. 48 x 16: three tiles side by side.
        # Two images: each one tile without another copy, and one newline.
        assert (counts[0], counts[1], counts[4]) == (4 + 2 * 3, 4 + 2 * 7, 2 * 5)


def test_the_docs_list_the_processors_that_need_torchvision() -> None:
    (sentence,) = re.findall(r"The processors of (.*?) do \(", (ROOT / "docs/models.md").read_text(), re.DOTALL)
    assert re.findall("`(.*?)`", sentence) == sorted(name for name, row in PROCESSORS.items() if row.needs)


@pytest.mark.skipif(is_torchvision_available(), reason="needs torchvision to be absent")
@pytest.mark.parametrize("name", [name for name, row in PROCESSORS.items() if row.needs])
def test_a_processor_that_needs_torchvision_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    needed = PROCESSORS[name].needs
    message = f"{name} needs {' and '.join(needed)} even for images; install it with `pip install {' '.join(needed)}`"
    for write in (lambda: tiny_config(name).save_pretrained(tmp_path), lambda: write_processor(name, tmp_path)):
        write()
        with pytest.raises(ImportError, match=message):
            load_processor(tmp_path)


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
def test_processors_with_and_without_torchvision_agree(tiny_checkpoint: Path) -> None:
    image = Image.effect_noise((70, 50), 90).convert("RGB")
    ways = [
        AutoProcessor.from_pretrained(tiny_checkpoint),
        image_only_class(tiny_checkpoint).from_pretrained(tiny_checkpoint),
    ]
    one, other = (way(text=[TEXT], images=[image], return_tensors="pt") for way in ways)
    assert torch.equal(one["input_ids"], other["input_ids"])
    torch.testing.assert_close(one["pixel_values"], other["pixel_values"], rtol=0, atol=0.02)


def test_a_checkpoint_that_has_no_processor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="no processor for model type 'gpt2'; give a vision-language checkpoint"):
        image_only_class(tmp_path)
