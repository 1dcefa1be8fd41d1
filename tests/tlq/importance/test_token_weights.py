"""Weights of every layer and group: MBQ's against a plain implementation of the paper's code, the token set's caps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tlq.importance.token_set import TokenBudget, effective_sample_size
from tlq.importance.token_weights import all_tokens, token_set
from tlq.importance.weighting import Importance, Weighting, token_weights

GROUPS = ("qkv", "o_proj", "gate_up", "down")
Marks = list[NDArray[np.bool_]]


def scored(seed: int, layers: int = 5) -> tuple[Importance, Marks, Marks]:
    """Scores whose modalities differ by layer, image marks, and answer marks at the end of samples of any length."""
    generator = np.random.default_rng(seed)
    shape = [(int(image), int(prompt), int(answer)) for image, prompt, answer in generator.integers(2, 12, (4, 3))]
    is_image = [np.arange(sum(parts)) < parts[0] for parts in shape]
    is_answer = [np.arange(sum(parts)) >= parts[0] + parts[1] for parts in shape]
    scores: Importance = {}
    for layer in range(layers):
        for group in GROUPS:
            strength = generator.lognormal(-1, 1)
            scores[layer, group] = [
                (generator.lognormal(-8, 1, len(marks)) * np.where(marks, strength, 1)).astype(np.float32)
                for marks in is_image
            ]
    return scores, is_image, is_answer


def plain_mbq(scores: Importance, is_image: Marks, is_text: Marks) -> dict[tuple[int, str], list[NDArray[np.float64]]]:
    """Factors on the error of every token as MBQ's search has them, one sample, layer and block at a time."""
    ratios: dict[str, dict[int, float]] = {"attention": {}, "mlp": {}}
    for block, last in (("attention", "o_proj"), ("mlp", "down")):
        for layer in sorted({layer for layer, _ in scores}):
            vision, caption = [], []
            for sample, gradient in enumerate(scores[layer, last]):
                vision.append(np.mean([g for g, mark in zip(gradient, is_image[sample], strict=True) if mark]))
                caption.append(np.mean([g for g, mark in zip(gradient, is_text[sample], strict=True) if mark]))
            ratios[block][layer] = float(np.mean(vision) / np.mean(caption))
    factors: dict[tuple[int, str], list[NDArray[np.float64]]] = {}
    for layer, group in scores:
        of_block = ratios["attention" if group in ("qkv", "o_proj") else "mlp"]
        ordered = sorted(of_block.values())
        middle = len(ordered) // 2
        median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
        ratio = max(of_block[layer], median)
        factors[layer, group] = [
            np.array([ratio if image else float(text) for image, text in zip(*marks, strict=True)])
            for marks in zip(is_image, is_text, strict=True)
        ]
    return factors


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6), st.booleans())
def test_modality_weights_are_those_of_mbq(seed: int, layers: int, marked: bool) -> None:
    scores, is_image, is_answer = scored(seed, layers)
    is_text = is_answer if marked else [~marks for marks in is_image]
    expected = plain_mbq(scores, is_image, is_text)
    weighting = Weighting(text="answer" if marked else "all")
    weights = all_tokens(scores, is_image, "modality", weighting, is_answer)
    assert set(weights) == set(expected)
    for key, factors in expected.items():
        whole = np.concatenate([weights[key][sample] for sample in range(len(is_image))])
        plain = np.concatenate(factors)
        np.testing.assert_allclose(whole, plain / plain.mean(), rtol=1e-5)


def test_a_layer_whose_images_matter_little_is_raised_to_the_median() -> None:
    """At a last layer image gradients vanish; without MBQ's bound their error there would count for nothing."""
    scores, is_image, _ = scored(3)
    for values, marks in zip(scores[4, "down"], is_image, strict=True):
        values[marks] = 0
    weights = all_tokens(scores, is_image, "modality", Weighting())
    assert weights[4, "down"][0][is_image[0]].min() > 0
    alone = token_weights(scores[4, "down"], is_image, "modality", Weighting())
    assert alone[0][is_image[0]].max() == 0


@pytest.mark.parametrize("source", ["token", "block", "uniform"])
def test_other_sources_weigh_every_group_by_its_own_scores(source: str) -> None:
    scores, is_image, is_answer = scored(7)
    weighting = Weighting(0.5, 0.95, 0.2, 20)
    weights = all_tokens(scores, is_image, source, weighting, is_answer)  # type: ignore[arg-type]
    for key, raw in scores.items():
        expected = token_weights(raw, is_image, source, weighting)  # type: ignore[arg-type]
        for sample, values in enumerate(expected):
            np.testing.assert_array_equal(weights[key][sample], values)


def test_a_set_by_modality_holds_answers_and_images_only() -> None:
    scores, is_image, is_answer = scored(8)
    chosen = token_set(scores, is_image, "modality", Weighting(text="answer"), TokenBudget(40), 0, is_answer)
    with pytest.raises(ValueError, match="nothing tells which tokens are"):
        token_set(scores, is_image, "modality", Weighting(text="answer"), TokenBudget(40), 0)
    for per_sample in chosen.values():
        for sample, values in per_sample.items():
            assert not values[~is_image[sample] & ~is_answer[sample]].any()
        assert any(values[is_answer[sample]].any() for sample, values in per_sample.items())


@pytest.mark.parametrize("selection", ["top", "sample"])
def test_no_sample_supplies_more_of_a_set_than_its_cap(selection: str) -> None:
    scores, is_image, _ = scored(9)
    for raw in scores.values():
        raw[2] *= 1000
    budgets = [TokenBudget(24, selection, 0.1, cap) for cap in (1.0, 0.34)]  # type: ignore[arg-type]
    free, capped = (token_set(scores, is_image, "token", Weighting(1, 1), budget, 0) for budget in budgets)
    for key in scores:
        free_share, capped_share = (
            supplied[2] / sum(supplied.values())
            for supplied in (
                {sample: (values if selection == "sample" else values > 0).sum() for sample, values in chosen.items()}
                for chosen in (free[key], capped[key])
            )
        )
        assert free_share > 0.5
        assert 0.34 - 2 / 24 < capped_share < 0.34 + 2 / 24


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(60, 120), st.integers(5, 29), st.sampled_from(["top", "sample"]))
def test_a_set_has_the_effective_tokens_asked_for(seed: int, size: int, least: int, selection: str) -> None:
    """Always in a set of the heaviest; on average in draws, here over groups."""
    generator = np.random.default_rng(seed)
    is_image = [np.arange(40) < 25] * 10
    scores = {
        (layer, group): [generator.lognormal(-8, 3, 40).astype(np.float32) for _ in is_image]
        for layer in range(5)
        for group in GROUPS
    }
    budget = TokenBudget(size, selection, 0.0)  # type: ignore[arg-type]
    chosen = token_set(scores, is_image, "token", Weighting(1, 1, 0, least), budget, seed)
    sizes = [
        effective_sample_size(np.concatenate([values[values > 0] for values in per_sample.values()]))
        for per_sample in chosen.values()
    ]
    if selection == "top":
        assert min(sizes) >= least * (1 - 1e-4)
    else:
        assert np.mean(sizes) >= least * 0.97
        assert np.mean(sizes) < 2 * least + 10  # evened out no more than that takes, or not much


def test_asking_for_no_effective_tokens_changes_no_set() -> None:
    scores, is_image, _ = scored(10)
    sets = [
        token_set(scores, is_image, "token", Weighting(1, 1, 0, least), TokenBudget(30, "sample", 0.0), 0)
        for least in (0, 2)
    ]
    for key, per_sample in sets[0].items():
        assert set(per_sample) == set(sets[1][key])
        for sample, values in per_sample.items():
            np.testing.assert_array_equal(values, sets[1][key][sample])


@pytest.mark.parametrize(("selection", "least"), [("sample", 20), ("top", 21)])
def test_more_effective_tokens_than_the_budget_are_refused(selection: str, least: int) -> None:
    scores, is_image, _ = scored(11)
    budget = TokenBudget(20, selection)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"least_effective is {least}, a set of 20 .*tokens_per_layer to {2 * least}"):
        token_set(scores, is_image, "token", Weighting(least_effective=least), budget, 0)
    token_set(scores, is_image, "modality", Weighting(least_effective=least), budget, 0)
