"""Training with packing, batched vision and answer-only logits computes the same as the library on single questions."""

import random

import numpy as np
import pytest
import torch
from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration

from demo.forward import answer_logits, answer_loss, encode_images, turns_right, use_grouped_attention
from demo.model import IMAGE_TOKENS, build_image_processor, build_model, build_tokenizer
from demo.optimizer import Optimizer, orthogonalise
from demo.outliers import OutlierParams, add_outliers, channel_factors
from demo.packing import Mix, Packer, draw_batch, patchify
from demo.questions import benchmark_questions
from demo.world import COLUMNS, DIGITS, LETTERS, ROWS, random_scene, render

GRID = [1, 2 * ROWS, 2 * COLUMNS]  # one frame, two patches per cell and side
LENGTH = 208


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return build_tokenizer()


@pytest.fixture
def model(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    return build_model(tokenizer).eval()


def test_capitals_and_digits_are_single_tokens(tokenizer: Qwen2Tokenizer) -> None:
    assert len(tokenizer) <= 512
    word = "".join(random.Random(0).choices(LETTERS + DIGITS, k=40))
    assert tokenizer.tokenize(word) == list(word)
    assert tokenizer.decode(tokenizer(f"What is {word}?").input_ids) == f"What is {word}?"


def test_patchify_equals_the_image_processor() -> None:
    image = render(random_scene("chart", "train", random.Random(0)))
    expected = build_image_processor()(images=[image], return_tensors="pt")
    assert expected.image_grid_thw.tolist() == [GRID]
    torch.testing.assert_close(patchify(np.asarray(image)[None])[0], expected.pixel_values)


@torch.no_grad()
def test_batched_vision_tower_equals_the_library(model: Qwen2VLForConditionalGeneration) -> None:
    rng = random.Random(0)
    pixels = patchify(np.stack([np.asarray(render(random_scene("signs", "train", rng))) for _ in range(3)]))
    grid = torch.tensor([GRID] * 3)
    expected = model.model.visual(pixels.flatten(0, 1), grid_thw=grid).pooler_output
    torch.testing.assert_close(encode_images(model.model.visual, pixels).flatten(0, 1), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("grouped", [False, True])
def test_packed_question_equals_single_question(
    tokenizer: Qwen2Tokenizer, model: Qwen2VLForConditionalGeneration, grouped: bool
) -> None:
    """Each turn of a packed sequence has the logits of a single prompt through the full model and processor."""
    rng = random.Random(0)
    scene = random_scene("signs", "train", rng)
    questions = benchmark_questions(scene, rng)[:4]
    image = build_image_processor()(images=[render(scene)], return_tensors="pt")
    singles = []
    for question in questions:
        user = [{"type": "image"}, {"type": "text", "text": question.prompt}]
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": question.answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        text = text.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS).removesuffix("\n")
        ids = torch.tensor([tokenizer(text).input_ids])
        is_image = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, mm_token_type_ids=is_image, **image).logits[0]
        answered = len(tokenizer(question.answer).input_ids) + 1
        singles.append(logits[-answered - 1 : -1])
    if grouped:
        use_grouped_attention(model)
    packed = Packer(tokenizer, LENGTH).pack([(scene, questions)])
    torch.testing.assert_close(answer_logits(model, packed), torch.cat(singles), atol=1e-4, rtol=1e-4)


def test_training_step_lowers_the_loss(tokenizer: Qwen2Tokenizer, model: Qwen2VLForConditionalGeneration) -> None:
    batch = draw_batch(Packer(tokenizer, LENGTH), 2, Mix(), random.Random(0))
    optimizer, losses = Optimizer(model), []
    for _ in range(4):
        logits = answer_logits(model, batch)
        loss = answer_loss(logits, batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step(0.02, 0.003)
    assert losses[-1] < 0.7 * losses[0]
    assert turns_right(logits, batch).shape == (len(batch.skills),)


def test_orthogonalise_gives_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((64, 32), (32, 64)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.5


@torch.no_grad()
def test_outliers_leave_logits_unchanged(tokenizer: Qwen2Tokenizer, model: Qwen2VLForConditionalGeneration) -> None:
    batch = draw_batch(Packer(tokenizer, LENGTH), 2, Mix(), random.Random(0))
    before = answer_logits(model, batch)
    layer = model.model.language_model.layers[0]
    gain = layer.input_layernorm.weight.clone()
    add_outliers(model, OutlierParams())
    torch.testing.assert_close(answer_logits(model, batch), before, atol=1e-4, rtol=1e-4)
    change = layer.input_layernorm.weight / gain
    assert change.max() / change.median() > 5


def test_channel_factors_have_the_share_and_strength_of_outliers() -> None:
    factors = channel_factors(400, OutlierParams(spread=0.0), torch.Generator().manual_seed(0))
    assert (factors > 10).sum() == 4
    assert set(factors.tolist()) == {1.0, 20.0}


def test_outliers_refuse_half_precision(model: Qwen2VLForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="float32"):
        add_outliers(model.bfloat16(), OutlierParams())
