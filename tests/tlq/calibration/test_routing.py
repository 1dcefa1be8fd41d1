"""The tokens of an expert: those routed to it, and further ones where these are too few."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.families import batches_of, write_tiny
from torch import Tensor

from tlq.calibration import streams
from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import Calibrated, calibrate
from tlq.calibration.routing import expert_tokens
from tlq.export.loading import load_model
from tlq.importance.gradients import score_tokens
from tlq.importance.pool import Importance, TokenPool
from tlq.importance.token_set import TokenBudget
from tlq.importance.token_weights import all_tokens, to_batches, token_set, uniform_tokens
from tlq.importance.weighting import Weighting
from tlq.models.linear_groups import EXPERTS, is_expert
from tlq.models.streaming import ResidentModel
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import RECIPES

VALID = [torch.tensor([[True, True, True, True], [True, True, False, False]]), torch.ones(1, 40, dtype=torch.bool)]


def effective(weights: list[Tensor]) -> float:
    flat = torch.cat([part.flatten() for part in weights]).double()
    return float(flat.sum() ** 2 / flat.square().sum())


def weighed(count: int) -> list[Tensor]:
    """The first tokens of the second micro-batch, with rising weights."""
    weights = [torch.zeros(part.shape) for part in VALID]
    weights[1][0, :count] = torch.arange(1, count + 1).float()
    return weights


@pytest.mark.parametrize(("count", "least"), [(0, 8), (1, 8), (6, 12), (12, 14)])
def test_an_expert_with_few_tokens_gets_as_many_as_it_needs(count: int, least: int) -> None:
    found = expert_tokens(weighed(count), VALID, least)
    assert found.further > 0
    assert effective(list(found.weights)) >= min(least, (46 - count) / 2) - 1e-3
    assert not any(bool(part[~mask].any()) for part, mask in zip(found.weights, VALID, strict=True))
    for part, own in zip(found.weights, weighed(count), strict=True):
        assert torch.equal(part[own > 0], own[own > 0])
    added = torch.cat([part[own == 0] for part, own in zip(found.weights, weighed(count), strict=True)])
    assert len(added[added > 0].unique()) == 1
    if count:  # they count as little as possible
        assert float(added.max()) < max(1.0, count / 2)


def test_an_expert_with_enough_tokens_gets_none() -> None:
    weights = weighed(20)
    found = expert_tokens(weights, VALID, 10)
    assert found.further == 0
    assert found.weights is weights
    assert found.effective == pytest.approx(effective(weights))


# -- a model with experts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("qwen3_vl_moe", tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def scores(folder: Path) -> Importance:
    return score_tokens(ResidentModel(load_model(folder)), batches_of("qwen3_vl_moe"))


def test_a_token_is_scored_at_the_experts_it_is_routed_to(scores: Importance) -> None:
    """Two of four experts for each token; all matter in the first layer, and an expert's share in all of them."""
    routed = torch.stack([torch.from_numpy(scores[0, f"{EXPERTS}.{number}.down"]) for number in range(4)]) > 0
    together = torch.from_numpy(scores[0, EXPERTS]) > 0
    assert bool((routed.sum(0)[together] == 2).all())
    assert bool((routed.sum(0)[~together] == 0).all())
    assert float(together.float().mean()) > 0.9


def test_experts_weigh_tokens_by_their_own_importance_or_share_one_set(scores: Importance) -> None:
    pool = TokenPool.of(batches_of("qwen3_vl_moe"))
    budget = TokenBudget(40, sample_cap=0.3)
    own = token_set(scores, pool, "token", Weighting(), budget, 0)
    assert (0, EXPERTS) not in own.groups
    for key, tokens in own.groups.items():
        if is_expert(key[1]):
            assert set(tokens.indices) <= set(scores[key].nonzero()[0])
    shared = token_set(scores, pool, "uniform", Weighting(), budget, 0)
    assert (0, EXPERTS) in shared.groups
    assert not any(is_expert(group) for _, group in shared.groups)
    assert all_tokens(scores, pool, "modality", Weighting()).groups.keys() == shared.groups.keys()


def test_an_expert_without_tokens_has_no_weights_and_modalities_are_mixed_among_its_own_tokens() -> None:
    pool = TokenPool(np.array([0, 10]), np.zeros(10, np.int32), np.arange(10) < 8, np.arange(10) == 9)
    raw = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 0], np.float32)  # half of the image tokens and of the text tokens
    scores = {(0, "experts"): np.ones(10, np.float32), (0, "experts.0.down"): raw}
    scores[0, "experts.1.down"] = np.zeros(10, np.float32)
    weights = all_tokens(scores, pool, "token", Weighting(modality_mix=1.0)).groups
    assert len(weights[0, "experts.1.down"].indices) == 0
    assert weights[0, "experts.0.down"].indices.tolist() == [0, 1, 2, 3, 8]
    assert weights[0, "experts.0.down"].weights == pytest.approx(1.0)


def quantized(folder: Path, scores: Importance, recipe: str) -> Calibrated:
    batches = batches_of("qwen3_vl_moe")
    pool = TokenPool.of(batches)
    row = RECIPES[recipe]
    if row.tokens == "set":
        weights = token_set(scores, pool, row.importance, Weighting(), TokenBudget(24), 0)
    else:
        weights = uniform_tokens(scores, pool)
    quantizer = WeightQuantizer(get_scheme("w4a16"), torch.bfloat16)
    return calibrate(load_model(folder), CalibrationJob(row, quantizer, batches, to_batches(weights, batches)))


@pytest.mark.parametrize("recipe", ["gptq", "tlq-c"])
def test_no_expert_is_rounded_without_data(
    folder: Path, scores: Importance, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The width of an expert's input is 128: half of it are 64 tokens, of 102 in the pool."""
    reports = {(report.layer, report.group): report for report in quantized(folder, scores, recipe).reports}
    for (_, group), report in reports.items():
        assert (report.routed_effective_tokens is not None) == is_expert(group)
        if report.routed_effective_tokens is not None and report.effective_tokens is not None:
            assert report.effective_tokens >= min(report.routed_effective_tokens, 64)
            assert (report.further_tokens > 0) == (report.effective_tokens > report.routed_effective_tokens)
    if recipe == "tlq-c":
        assert all(report.further_tokens for (_, group), report in reports.items() if is_expert(group))
    monkeypatch.setattr(streams, "LEAST_TOKENS", 0.0)
    for report in quantized(folder, scores, recipe).reports:
        assert report.further_tokens == 0


def test_uniform_weights_of_experts_follow_the_routing_of_the_quantized_model(folder: Path, scores: Importance) -> None:
    """Every token counts in two experts: the tokens of the four add up to twice the pool."""
    reports = quantized(folder, scores, "gptq").reports
    routed = [report.tokens - report.further_tokens for report in reports if is_expert(report.group)]
    assert sum(routed) == 2 * 2 * 102
