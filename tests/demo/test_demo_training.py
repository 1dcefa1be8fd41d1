"""Training with packing, batched vision and answer-only logits computes the same as the library on single questions."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration

from demo.balance import Balance
from demo.families import FAMILIES
from demo.family import Family
from demo.forward import answer_logits, answer_loss, encode_images, turns_right, use_grouped_attention
from demo.model import SPECIAL_TOKENS, build_image_processor, build_model, build_tokenizer, load_or_build_tokenizer
from demo.optimizer import Optimizer, orthogonalise
from demo.outliers import OutlierParams, add_outliers, channel_factors, remove_outliers
from demo.packing import Batch, Mix, Packer, draw_batch, patchify
from demo.questions import benchmark_questions
from demo.qwen3_moe import ACTIVE, EXPERTS
from demo.train import load_decoder
from demo.world import COLUMNS, DIGITS, LETTERS, ROWS, random_scene, render
from tlq.models.processor import load_processor

GRID = [1, 2 * ROWS, 2 * COLUMNS]  # one frame, two patches per cell and side
LENGTH = 158  # of a sequence, in addition to its picture


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return build_tokenizer()


@pytest.fixture
def model(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    return build_model(tokenizer).eval()


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def network(family: Family, tokenizer: Qwen2Tokenizer) -> Any:
    """An untrained model of the family."""
    torch.manual_seed(0)
    return family.build_model(tokenizer).eval()


def packer(family: Family, tokenizer: Qwen2Tokenizer) -> Packer:
    return Packer(tokenizer, LENGTH + family.image_tokens, family)


def logits_of(family: Family, network: Any, batch: Batch) -> torch.Tensor:
    return answer_logits(network, batch, family.embeddings(network, batch.pixels))


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
    family: Family, network: Any, tokenizer: Qwen2Tokenizer, grouped: bool, tmp_path: Path
) -> None:
    """Each turn of a packed sequence has the logits of a single prompt through the full model and processor."""
    rng = random.Random(0)
    scene = random_scene("signs", "train", rng)
    questions = benchmark_questions(scene, rng)[:4]
    network.config.save_pretrained(tmp_path)
    family.save_processor(tokenizer, tmp_path)
    processor = load_processor(tmp_path)
    singles = []
    for question in questions:
        user = [{"type": "image"}, {"type": "text", "text": question.prompt}]
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": question.answer}]
        text = processor.apply_chat_template(turns, tokenize=False).removesuffix("\n")
        inputs = processor(text=[text], images=[render(scene)], return_tensors="pt")
        logits = network(**inputs).logits[0]
        answered = len(tokenizer(question.answer).input_ids) + 1
        singles.append(logits[-answered - 1 : -1])
    if grouped:
        use_grouped_attention(network)
    packed = packer(family, tokenizer).pack([(scene, questions)])
    torch.testing.assert_close(logits_of(family, network, packed), torch.cat(singles), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_cell_has_an_embedding_of_its_own(family: Family, network: Any) -> None:
    """A change inside one cell changes the embedding of that cell most."""
    picture = np.full((1, 80, 160, 3), 200, dtype=np.uint8)
    before = family.cells(network, family.pixels(picture))
    picture[0, 32:48, 112:128] = 20  # row 2, column 7
    change = (family.cells(network, family.pixels(picture)) - before).norm(dim=-1)[0]
    assert change.shape == (ROWS * COLUMNS,)
    assert int(change.argmax()) == 2 * COLUMNS + 7


def test_training_step_lowers_the_loss(family: Family, network: Any, tokenizer: Qwen2Tokenizer) -> None:
    batch = draw_batch(packer(family, tokenizer), 2, Mix(), random.Random(0))
    optimizer, losses = Optimizer(network), []
    for _ in range(4):
        logits = logits_of(family, network, batch)
        loss = answer_loss(logits, batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step(0.02, 0.003)
    assert losses[-1] < 0.7 * losses[0]
    assert turns_right(logits, batch).shape == (len(batch.skills),)


def test_orthogonalise_gives_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((64, 32), (32, 64), (3, 64, 32)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.5


def test_balance_is_least_when_all_experts_are_equally_busy(tokenizer: Qwen2Tokenizer) -> None:
    network = FAMILIES["qwen3_vl_moe"].build_model(tokenizer)
    balance = Balance(network, ACTIVE)
    routers = [module for name, module in network.named_modules() if name.endswith("mlp.gate")]
    width = network.config.text_config.hidden_size
    directions = torch.eye(width)[:EXPERTS]
    for router in routers:
        router.weight.data.copy_(50 * directions + 50 * directions.roll(1, 0))
        router(directions)  # every direction has two experts, and every expert two directions
    assert balance.loss().item() == pytest.approx(1.0, abs=1e-3)
    for router in routers:
        router(directions[:1].expand(EXPERTS, -1))
    assert balance.loss().item() == pytest.approx(EXPERTS / ACTIVE, abs=1e-2)


@torch.no_grad()
def test_outliers_leave_logits_unchanged(family: Family, network: Any, tokenizer: Qwen2Tokenizer) -> None:
    batch = draw_batch(packer(family, tokenizer), 2, Mix(), random.Random(0))
    before = logits_of(family, network, batch)
    layer = network.model.language_model.layers[0]
    gain = layer.input_layernorm.weight.clone()
    add_outliers(network, OutlierParams())
    torch.testing.assert_close(logits_of(family, network, batch), before, atol=1e-4, rtol=1e-4)
    change = layer.input_layernorm.weight / gain
    assert change.max() / change.median() > 5
    remove_outliers(network, OutlierParams())
    torch.testing.assert_close(layer.input_layernorm.weight, gain)


def test_channel_factors_have_the_share_and_strength_of_outliers() -> None:
    factors = channel_factors(400, OutlierParams(spread=0.0), torch.Generator().manual_seed(0))
    assert (factors > 10).sum() == 4
    assert set(factors.tolist()) == {1.0, 20.0}


def test_outliers_refuse_half_precision(model: Qwen2VLForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="float32"):
        add_outliers(model.bfloat16(), OutlierParams())


def test_training_that_starts_from_a_model_uses_its_tokenizer(tmp_path: Path) -> None:
    shipped = Path("data/demo/model")
    tokenizer = load_or_build_tokenizer(tmp_path / "tokenizer", shipped)
    assert tokenizer.get_vocab() == Qwen2Tokenizer.from_pretrained(shipped).get_vocab()
    network = FAMILIES["llava_onevision"].build_model(tokenizer)
    load_decoder(network, shipped, tokenizer)
    source: Any = Qwen2VLForConditionalGeneration.from_pretrained(shipped, dtype=torch.float32)
    remove_outliers(source, OutlierParams())
    assert torch.equal(network.lm_head.weight, source.lm_head.weight)


def test_decoder_with_experts_starts_with_the_attention_of_one_without(tmp_path: Path) -> None:
    shipped = Path("data/demo/model")
    tokenizer = load_or_build_tokenizer(tmp_path / "tokenizer", shipped)
    network: Any = FAMILIES["qwen3_vl_moe"].build_model(tokenizer)
    experts = network.model.language_model.layers[0].mlp.experts.down_proj.clone()
    load_decoder(network, shipped, tokenizer)
    source: Any = Qwen2VLForConditionalGeneration.from_pretrained(shipped, dtype=torch.float32)
    remove_outliers(source, OutlierParams())
    own, given = (each.model.language_model.layers[0] for each in (network, source))
    assert torch.equal(own.self_attn.q_proj.weight, given.self_attn.q_proj.weight)
    assert torch.equal(own.mlp.experts.down_proj, experts)


def test_a_decoder_of_other_tokens_is_refused(tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    words = [token for token in tokenizer.get_vocab() if token not in SPECIAL_TOKENS]
    other = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = other["model"]["vocab"]
    vocab[words[0]], vocab[words[1]] = vocab[words[1]], vocab[words[0]]
    build_model(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="its tokens are not those"):
        load_decoder(FAMILIES["llava_onevision"].build_model(tokenizer), tmp_path, tokenizer)
