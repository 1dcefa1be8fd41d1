"""The shipped demo models are small, load with plain transformers, and need the picture to answer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from demo.evaluate import EvaluateParams, Item, read_benchmark, replies_of, score
from demo.families import FAMILIES
from demo.make import BENCHMARKS, MakeParams, make
from tlq.models.processor import load_processor

DEMO = Path(__file__).parents[2] / "data" / "demo"
MODELS = {"qwen2_vl": DEMO / "model", "llava_onevision": DEMO / "llava_onevision"}
ITEMS = 40


@pytest.fixture(scope="module", params=list(MODELS))
def model_type(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(model_type: str) -> tuple[Any, Any]:
    folder = MODELS[model_type]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.model_type == model_type
    return model, load_processor(folder)


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Item]]:
    """Test items with another seed than the shipped benchmarks."""
    world = tmp_path_factory.mktemp("world")
    make(MakeParams(world, seed=11, calibration=4, items=ITEMS))
    return {name: read_benchmark(world, name) for name in BENCHMARKS}


@pytest.mark.parametrize("folder", MODELS.values())
def test_model_is_small_enough_for_git(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6


@pytest.mark.parametrize("folder", MODELS.values())
def test_model_card_mentions_outliers(folder: Path) -> None:
    assert "outlier" in (folder / "README.md").read_text().lower()


def test_processor_keeps_the_size_of_pictures(
    loaded: tuple[Any, Any], items: dict[str, list[Item]], model_type: str
) -> None:
    processor = loaded[1]
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}
    text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[items["textvqa"][0].image], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == FAMILIES[model_type].image_tokens


@pytest.mark.parametrize("benchmark", list(BENCHMARKS))
def test_model_answers_only_with_the_picture(
    loaded: tuple[Any, Any], items: dict[str, list[Item]], benchmark: str
) -> None:
    model, processor = loaded
    seen = score(items[benchmark], replies_of(model, processor, items[benchmark], EvaluateParams()))["all"]
    guessed = score(items[benchmark], replies_of(model, processor, items[benchmark], EvaluateParams(blank=True)))["all"]
    assert seen >= 0.7
    assert guessed <= 0.4
