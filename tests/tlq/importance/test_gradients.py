"""Token importance: gradients against plain autograd, and the weights made from them."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.pools import pool_of
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlq.importance.gradients import score_tokens
from tlq.importance.losses import ResidentBatches, answer_loss
from tlq.importance.pool import Importance, TokenPool
from tlq.importance.token_set import effective_sample_size
from tlq.importance.weighting import Source, Weighting, modality_ratio, modality_weights, token_weights
from tlq.inputs.images import decode_image
from tlq.models.architectures import architecture_of
from tlq.models.streaming import ResidentModel, StreamedModel
from tlq.samples import Batch, Sample, encode_batches, image_token_id


def plain_importance(model: Any, processor: Any, sample: Sample) -> dict[tuple[int, str], Tensor]:
    """Mean |dL/dy| per token for one sample alone: no batch, no hooks on gradients, labels built by hand."""
    prompt = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{sample.messages[0]['content'][7:]}"
    prompt += "<|im_end|>\n<|im_start|>assistant\n"
    answer = f"{sample.messages[1]['content']}<|im_end|>"
    inputs = processor(text=[prompt + answer], images=[decode_image(sample.images[0])], return_tensors="pt")
    answer_tokens = len(processor.tokenizer(answer)["input_ids"])
    labels = inputs["input_ids"].clone()
    labels[:, :-answer_tokens] = -100

    outputs: dict[str, Tensor] = {}
    layers = model.model.language_model.layers
    handles = [
        module.register_forward_hook(lambda _module, _args, output, name=name: outputs.__setitem__(name, output))
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model.requires_grad_(True)
    loss = model(**inputs, labels=labels, use_cache=False).loss
    gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    for handle in handles:
        handle.remove()
    groups = {
        "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "o_proj": ["self_attn.o_proj"],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    return {
        (layer, group): torch.cat([gradients[f"{layer}.{path}"][0] for path in paths], -1).abs().mean(-1)
        for layer in range(len(layers))
        for group, paths in groups.items()
    }


def test_gradients_equal_plain_autograd_on_single_samples(
    tiny_model: PreTrainedModel, tiny_processor: Any, samples: list[Sample], batches: list[Batch], scores: Importance
) -> None:
    model, pool = copy.deepcopy(tiny_model), TokenPool.of(batches)
    for index in (0, 2, 5):
        expected = plain_importance(model, tiny_processor, samples[index])
        assert set(expected) == set(scores)
        for key, values in expected.items():
            np.testing.assert_allclose(pool.split(scores[key])[index], values.numpy(), rtol=1e-3, atol=1e-8)


def test_the_last_mlp_runs_on_the_tokens_that_predict_an_answer(
    tiny_model: PreTrainedModel, batches: list[Batch]
) -> None:
    model = copy.deepcopy(tiny_model)
    rows = {0: 0, 1: 0}

    def count(index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor], _output: Tensor) -> None:
            rows[index] += args[0].numel() // args[0].shape[-1]

        return hook

    for index, layer in enumerate(model.model.language_model.layers):
        layer.mlp.down_proj.register_forward_hook(count(index))
    score_tokens(ResidentModel(model), batches)
    assert rows == {0: sum(batch.valid.numel() for batch in batches), 1: sum(int(b.is_answer.sum()) for b in batches)}


@pytest.mark.parametrize("batch_size", [1, 6])
def test_batch_size_and_padding_change_nothing(
    tiny_model: PreTrainedModel, tiny_processor: Any, samples: list[Sample], scores: Importance, batch_size: int
) -> None:
    batches = encode_batches(samples, tiny_processor, image_token_id(tiny_model.config), batch_size, 512)
    again = score_tokens(ResidentModel(tiny_model), batches)
    for key, values in scores.items():
        np.testing.assert_allclose(values, again[key], rtol=1e-3, atol=1e-8)


def test_out_of_memory_goes_on_layer_by_layer(
    tiny_checkpoint: Path, batches: list[Batch], scores: Importance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what is scored already: the first micro-batch keeps its graph, the second finds no memory."""
    kept = []
    original = ResidentBatches.segment

    def small_memory(self: ResidentBatches, *arguments: Any) -> Any:
        if self.keeps_graph:
            kept.append(arguments)
            if len(kept) > len(self.order):
                raise torch.OutOfMemoryError
        return original(self, *arguments)

    monkeypatch.setattr(ResidentBatches, "segment", small_memory)
    model = StreamedModel(tiny_checkpoint)
    again = score_tokens(model, batches)
    assert len(kept) == 3
    assert all(np.array_equal(values, scores[key]) for key, values in again.items())
    assert all(parameter.is_meta for parameter in model.skeleton.parameters())


def test_every_token_of_every_sample_has_a_score(batches: list[Batch], scores: Importance) -> None:
    pool = TokenPool.of(batches)
    for values in scores.values():
        assert values.shape == (len(pool),)
        assert values.dtype == np.float32
        assert all(part.max() > 0 for part in pool.split(values))


def test_weights_receive_no_gradient(tiny_model: PreTrainedModel, scores: Importance) -> None:
    assert scores
    assert all(parameter.grad is None for parameter in tiny_model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_model.modules())


def test_loss_that_is_not_finite_names_the_sample(batches: list[Batch]) -> None:
    batch = batches[0]
    logits = torch.zeros(int(batch.is_answer[:, 1:].sum()), 300)
    logits[int(batch.is_answer[:2, 1:].sum())] = math.nan  # the first answer token of the third row
    with pytest.raises(FloatingPointError, match=f"sample number {batch.samples[2]}: its loss is not finite"):
        answer_loss(logits, batch)


def test_gradient_that_is_not_finite_names_layer_and_group(tiny_model: PreTrainedModel, batches: list[Batch]) -> None:
    """A square root whose input is 0 has a finite value and an infinite derivative."""
    model = copy.deepcopy(tiny_model)
    architecture = architecture_of(model.config)
    down = architecture.decoder_layers(model)[1].get_submodule("mlp.down_proj")
    down.register_forward_hook(lambda _module, _args, output: output + (output - output.detach()).abs().sqrt())
    with pytest.raises(FloatingPointError, match=r"layer 1, group \w+: gradient is not finite; score in float32"):
        score_tokens(ResidentModel(model), batches)


def arrays(seed: int) -> tuple[NDArray[np.float32], TokenPool]:
    """Raw importance of a pool of three samples that end with an answer of two tokens."""
    generator = np.random.default_rng(seed)
    lengths = [7, 12, 5]
    raw = np.concatenate([generator.lognormal(-8, 2, length).astype(np.float32) for length in lengths])
    is_image = [generator.random(length) < 0.5 for length in lengths]
    return raw, pool_of(is_image, [(np.arange(len(marks)) >= len(marks) - 2) & ~marks for marks in is_image])


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1000),
    st.sampled_from(["uniform", "modality", "token", "block"]),
    st.floats(0.2, 2),
    st.floats(0.5, 1),
    st.floats(0, 1),
)
def test_weights_have_mean_one(seed: int, source: Source, power: float, quantile: float, mix: float) -> None:
    raw, pool = arrays(seed)
    weights = token_weights(raw, pool, source, Weighting(power, quantile, mix))
    assert (weights.shape, weights.dtype) == (raw.shape, np.float32)
    assert weights.min() >= 0
    assert weights.mean() == pytest.approx(1, rel=1e-5)


def test_uniform_weights_are_one() -> None:
    assert (token_weights(*arrays(0), "uniform", Weighting()) == 1).all()


def test_modality_weights_are_two_values_whatever_the_weighting() -> None:
    raw, pool = arrays(1)
    weights = token_weights(raw, pool, "modality", Weighting(power=3, least_effective=20))
    image, text = weights[pool.is_image], weights[~pool.is_image]
    assert len(np.unique(image)) == len(np.unique(text)) == 1
    assert image[0] / text[0] == pytest.approx(modality_ratio(raw, pool), rel=1e-5)


def test_modality_ratio_is_of_means_over_samples_of_their_own_means() -> None:
    """A long sample counts no more than a short one, and one without images has no part in their mean."""
    raw = np.array([6, 6, 1, 3, 2, 4, 10, 10], np.float32)
    is_image = [np.array(marks, bool) for marks in ([1, 1, 0, 0], [1, 0], [0, 0])]
    assert modality_ratio(raw, pool_of(is_image)) == pytest.approx(((6 + 2) / 2) / ((2 + 4 + 10) / 3))
    assert modality_ratio(raw[6:], pool_of(is_image[2:])) == 1


def test_modality_weights_leave_out_text_that_is_not_the_answer() -> None:
    raw, pool = arrays(4)
    weights = modality_weights(raw, pool, "answer")
    image, answer = pool.is_image, pool.is_answer
    assert (weights[~image & ~answer] == 0).all()
    assert weights[image][0] / weights[answer][0] == pytest.approx(modality_ratio(raw, pool, "answer"), rel=1e-5)
    np.testing.assert_array_equal(
        token_weights(raw, pool, "modality", Weighting(text="answer")), weights.astype(np.float32)
    )


def test_text_without_influence_is_refused() -> None:
    raw, pool = arrays(4)
    with pytest.raises(FloatingPointError, match=r"text tokens sums to 0\.0"):
        token_weights(np.where(pool.is_image, raw, 0), pool, "modality", Weighting())


def test_block_weights_are_token_weights_of_other_scores() -> None:
    raw, pool = arrays(5)
    weighting = Weighting(0.7, 0.9, 0.3, 12)
    block, token = (token_weights(raw, pool, name, weighting) for name in ("block", "token"))  # type: ignore[arg-type]
    np.testing.assert_array_equal(block, token)
    assert len(np.unique(block)) > 2


def test_token_weights_are_clipped_raised_and_mixed() -> None:
    raw, pool = arrays(2)
    flat, image = raw.astype(np.float64), pool.is_image
    plain = token_weights(raw, pool, "token", Weighting(1, 1, 0))
    np.testing.assert_allclose(plain, flat / flat.mean(), rtol=1e-5)

    squared = token_weights(raw, pool, "token", Weighting(2, 1, 0))
    np.testing.assert_allclose(squared, flat**2 / (flat**2).mean(), rtol=1e-5)

    clipped = token_weights(raw, pool, "token", Weighting(1, 0.5, 0))
    median = np.median(flat)
    assert len(np.unique(clipped[flat >= median])) == 1
    assert clipped.max() / clipped.min() == pytest.approx(median / flat.min(), rel=1e-4)

    few = np.concatenate([raw, np.zeros(50 * len(raw), np.float32)])
    marks = np.concatenate([image, np.zeros(50 * len(raw), np.bool_)])
    sparse = token_weights(few, pool_of([marks]), "token", Weighting(1, 0.5, 0))
    assert sparse.max() == pytest.approx(sparse.sum() * median / np.minimum(flat, median).sum(), rel=1e-4)

    mixed = token_weights(raw, pool, "token", Weighting(1, 1, 1))
    means = np.where(image, flat[image].mean(), flat[~image].mean())
    np.testing.assert_allclose(mixed, means / means.mean(), rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 24))
def test_weights_reach_the_required_effective_sample_size(seed: int, least: int) -> None:
    """Exactly as many where the weights had fewer, by drawing all of them towards 1; weights that suffice stay."""
    plain, evened = (
        token_weights(*arrays(seed), "token", Weighting(least_effective=effective)) for effective in (0, least)
    )
    had = effective_sample_size(plain)
    assert effective_sample_size(evened) == pytest.approx(max(had, least), rel=1e-4)
    if had >= least:
        np.testing.assert_array_equal(evened, plain)
    own_share = (evened - 1) / (plain - 1)
    np.testing.assert_allclose(own_share, own_share[0], rtol=1e-2, atol=1e-5)


def test_tokens_without_gradient_count_after_shrinking() -> None:
    """The gradient of the last layer's output is 0 except where it predicts an answer token."""
    raw = np.zeros(60, np.float32)
    raw[-1] = 1
    pool = pool_of([np.arange(30) < 20] * 2)
    weights = token_weights(raw, pool, "token", Weighting(clip_quantile=1, least_effective=15))
    assert effective_sample_size(weights) == pytest.approx(15, rel=1e-4)
    assert weights[-1] > 10 * weights[0] > 0


def test_more_effective_tokens_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="25 effective tokens are needed, the pool has 24 tokens; lower"):
        token_weights(*arrays(0), "token", Weighting(least_effective=25))


def test_a_loss_that_no_token_influences_is_refused() -> None:
    raw, pool = arrays(3)
    with pytest.raises(FloatingPointError, match=r"sums to 0\.0: no token has any influence"):
        token_weights(np.zeros_like(raw), pool, "token", Weighting())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"power": 0}, "use source `uniform`"),
        ({"clip_quantile": 0}, r"\(0, 1\]"),
        ({"modality_mix": 2}, r"\[0, 1\]"),
        ({"least_effective": -1}, "least_effective is -1, must not be negative"),
        ({"text": "captions"}, "text is .captions.; choose all or answer"),
    ],
)
def test_impossible_weightings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Weighting(**changes)


def test_unknown_source() -> None:
    with pytest.raises(
        ValueError, match="unknown importance source 'tokens'; choose uniform, modality, token or block"
    ):
        token_weights(*arrays(0), "tokens", Weighting())  # type: ignore[arg-type]
