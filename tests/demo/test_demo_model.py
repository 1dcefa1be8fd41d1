"""The shipped demo model is small, loads with plain transformers, and needs the picture to answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from demo.evaluate import EvaluateParams, Item, read_benchmark, replies_of, score
from demo.make import BENCHMARKS, MakeParams, make
from demo.model import IMAGE_TOKENS
from tlq.models.processor import load_processor

MODEL = Path(__file__).parents[2] / "data" / "demo" / "model"
ITEMS = 40

pytestmark = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason=f"no model in {MODEL}")


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return Qwen2VLForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval(), load_processor(MODEL)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Item]]:
    """Test items with another seed than the shipped benchmarks."""
    world = tmp_path_factory.mktemp("world")
    make(MakeParams(world, seed=11, calibration=4, items=ITEMS))
    return {name: read_benchmark(world, name) for name in BENCHMARKS}


def test_model_is_small_enough_for_git() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 25e6


def test_model_card_mentions_outliers() -> None:
    card = (MODEL / "README.md").read_text()
    assert "outlier" in card


def test_processor_keeps_the_size_of_pictures(loaded: tuple[Any, Any], items: dict[str, list[Item]]) -> None:
    processor = loaded[1]
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}
    text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[items["textvqa"][0].image], return_tensors="pt")
    assert (inputs["input_ids"] == loaded[0].config.image_token_id).sum() == IMAGE_TOKENS


@pytest.mark.parametrize("benchmark", list(BENCHMARKS))
def test_model_answers_only_with_the_picture(
    loaded: tuple[Any, Any], items: dict[str, list[Item]], benchmark: str
) -> None:
    model, processor = loaded
    seen = score(items[benchmark], replies_of(model, processor, items[benchmark], EvaluateParams()))["all"]
    guessed = score(items[benchmark], replies_of(model, processor, items[benchmark], EvaluateParams(blank=True)))["all"]
    assert seen >= 0.7
    assert guessed <= 0.4
