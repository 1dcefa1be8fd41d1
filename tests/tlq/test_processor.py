"""The processor that ships with a checkpoint, with and without torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available

from tlq.processor import image_only_class, load_processor

TEXT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What colour?<|im_end|>\n"


def test_gives_ids_and_pixels_for_an_image_and_a_text(tiny_processor: Any) -> None:
    """One image token per 2 x 2 patches, and pixels normalised as the checkpoint says: a red image is one value."""
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


def test_chat_template_comes_with_it(tiny_processor: Any) -> None:
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]}]
    assert tiny_processor.apply_chat_template(turns, tokenize=False) == TEXT


def test_image_settings_can_be_changed(tiny_checkpoint: Path) -> None:
    processor = load_processor(tiny_checkpoint, min_pixels=256, max_pixels=256)
    encoded = processor(text=[TEXT], images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    assert encoded["image_grid_thw"].tolist() == [[1, 2, 2]]


@pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")
def test_both_ways_give_the_same(tiny_checkpoint: Path) -> None:
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
