"""Per-channel scales: candidates, and folds that leave the model's function unchanged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlq.calibration.install import QuantizedLayer
from tlq.models.architectures import architecture_of, get_linear, head_dim_of
from tlq.models.decoder import enter_decoder, run_layer
from tlq.models.linear_groups import LinearGroup
from tlq.models.text_decoders import LLAMA
from tlq.quantization.equalization import Candidate, Equalization, Fold, candidates, weight_magnitude
from tlq.quantization.formats import QuantizedWeight, WeightQuantizer, get_scheme
from tlq.recipes import get_recipe
from tlq.samples import Batch

HEAD = 4


def norm_fold(width: int, dtype: torch.dtype = torch.bfloat16) -> Fold:
    norm = nn.RMSNorm(width)
    norm.weight.data = torch.rand(width, generator=torch.Generator().manual_seed(0)) + 0.1
    return Fold.into(norm, width, HEAD, dtype)


def tried(method: Equalization, fold: Fold, width: int = 16) -> tuple[list[Candidate], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    magnitude = torch.randn(width, generator=generator).exp()
    weight = torch.randn(6, width, generator=generator)
    return list(candidates(method, magnitude, weight, 8, fold)), magnitude, weight


def test_grid_tries_the_neutral_scale_first_and_every_exponent_once() -> None:
    found, _, _ = tried(Equalization("grid"), norm_fold(16))
    assert [candidate.alpha for candidate in found] == pytest.approx([point / 20 for point in range(20)])
    assert torch.equal(found[0].s, torch.ones(16))
    assert not any(candidate.duo for candidate in found)


def test_duo_doubles_the_grid() -> None:
    found, _, _ = tried(Equalization("grid", duo=True), norm_fold(16))
    assert len(found) == 40
    assert torch.equal(found[0].s, torch.ones(16))
    assert sum(candidate.duo for candidate in found) == 20


def test_candidates_follow_the_published_formulas() -> None:
    """AWQ: s = x^a, or x^a / w^(1 - a), over sqrt(max s min s); w relative to its group's maximum."""
    fold = norm_fold(16, torch.float32)
    found, magnitude, weight = tried(Equalization("grid", duo=True), fold)
    relative = torch.stack([row.view(2, 8).abs() / row.view(2, 8).abs().amax(1, keepdim=True) for row in weight])
    w = relative.flatten(1).mean(0)
    torch.testing.assert_close(weight_magnitude(weight, 8, "mean"), w)
    for candidate in found[1:]:
        s = magnitude**candidate.alpha / (w ** (1 - candidate.alpha) if candidate.duo else 1)
        torch.testing.assert_close(candidate.s, s / (s.max() * s.min()).sqrt(), rtol=1e-4, atol=0)


def test_smoothquant_scales_follow_equation_four() -> None:
    """max|x|^a / max|w|^(1 - a) up to a common factor."""
    method = get_recipe("smoothquant").equalization
    found, magnitude, weight = tried(method, norm_fold(16, torch.float32))
    expected = magnitude**0.5 / weight.abs().amax(0) ** 0.5
    ratio = found[-1].s / expected
    torch.testing.assert_close(ratio, ratio[0].expand(16), rtol=1e-4, atol=0)
    assert found[-1].alpha == 0.5


def test_scales_are_centred_and_positive_even_for_silent_channels() -> None:
    fold = Fold.into(nn.Linear(3, 16, bias=False), 16, HEAD, torch.float32)
    magnitude = torch.cat([torch.zeros(4), torch.logspace(-3, 3, 12)])
    for candidate in candidates(Equalization("grid", duo=True), magnitude, torch.randn(5, 16), None, fold):
        assert bool(torch.isfinite(candidate.s).all())
        assert float(candidate.s.min()) > 0
        assert float(candidate.s.max() * candidate.s.min()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("folds", ["norms", "matching", "all"])
def test_folds_decide_which_groups_are_scaled(folds: str) -> None:
    method = Equalization("grid", folds=folds)  # type: ignore[arg-type]
    matching = Fold.into(nn.Linear(3, 16), 16, HEAD, torch.float32)
    grouped = Fold.into(nn.Linear(3, 8), 16, HEAD, torch.float32)
    assert len(tried(method, norm_fold(16))[0]) == 20
    assert len(tried(method, matching)[0]) == (1 if folds == "norms" else 20)
    assert len(tried(method, grouped)[0]) == (20 if folds == "all" else 1)


def test_grouped_query_attention_ties_the_scales_of_a_value_channel() -> None:
    """Two value heads of four channels, each read by two query heads: 16 input channels, 8 rows."""
    fold = Fold.into(nn.Linear(3, 8), 16, HEAD, torch.float32)
    found, magnitude, _ = tried(Equalization("grid"), fold)
    s = found[10].s.view(2, 2, HEAD)  # value head, query head, channel
    assert torch.equal(s[:, 0], s[:, 1])
    assert torch.equal(fold.per_row(found[10].s), s[:, 0].flatten())
    assert torch.equal(fold.expand(fold.per_row(found[10].s)), found[10].s)
    mean = magnitude.view(2, 2, HEAD).mean(1).flatten()
    root = mean**0.5
    torch.testing.assert_close(fold.per_row(found[10].s), root / (root.max() * root.min()).sqrt())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norm_scales_are_exact_in_storage(dtype: torch.dtype) -> None:
    """The folded gain is exact in its dtype, so the search uses the saved norm."""
    fold = norm_fold(64, dtype)
    fold.weight.data = fold.weight.to(dtype).float()
    fold.weight.data[3] = 0
    wished = torch.rand(64, generator=torch.Generator().manual_seed(2)) * 4 + 0.1
    s = fold.realizable(wished)
    stored = (fold.weight / s).to(dtype).float()
    torch.testing.assert_close(stored * s, fold.weight.detach(), rtol=3e-7, atol=0)
    torch.testing.assert_close(s[4:], wished[4:], rtol=2 ** -{"torch.bfloat16": 8}.get(str(dtype), 10), atol=0)
    assert s[3].item() == 1  # a dead gain takes no scale


def test_an_impossible_fold_is_refused() -> None:
    with pytest.raises(ValueError, match="scales of 16 channels into a module of 6 outputs"):
        Fold.into(nn.Linear(3, 6), 16, HEAD, torch.float32)


def unquantized(weight: Tensor) -> QuantizedWeight:
    """A QuantizedWeight whose dequantize returns the exact weight, to test folding without rounding."""
    return QuantizedWeight(weight, torch.ones(len(weight), 1), torch.zeros(len(weight), 1))


@pytest.mark.parametrize("group", [*LLAMA.attention, *LLAMA.mlp], ids=lambda group: group.name)
def test_folding_leaves_the_layer_function_unchanged(
    tiny_model: PreTrainedModel, batches: list[Batch], group: LinearGroup
) -> None:
    """W diag(s) after a norm or linear divided by s computes the same as W: norms, linears with bias, shared heads."""
    model = copy.deepcopy(tiny_model)
    architecture = architecture_of(model.config)
    layer = architecture.decoder_layers(model)[0]
    for path in ("self_attn.v_proj", "mlp.up_proj"):  # a bias where the real model may have none
        bias = get_linear(layer, path).out_features
        get_linear(layer, path).bias = nn.Parameter(0.3 * torch.randn(bias, generator=torch.Generator().manual_seed(0)))
    (calls, *_) = enter_decoder(model, architecture, batches)
    with torch.no_grad():
        before = run_layer(layer, calls.hidden_states, calls.kwargs[0])
        # no activation quantization, weights kept in float32
        quantizer = WeightQuantizer(get_scheme("w3a16"), torch.float32)
        quantized = QuantizedLayer(0, layer, architecture, quantizer)
        linears = [get_linear(layer, path) for path in group.linears]
        weight = torch.cat([linear.weight for linear in linears])
        fold = Fold.into(layer.get_submodule(group.fold), weight.shape[1], head_dim_of(model.config), torch.float32)
        if not fold.is_norm:
            quantized.weights[f"{architecture.layers}.0.{group.fold}"] = unquantized(fold.weight.clone())
        per_row = torch.rand(len(fold.weight), generator=torch.Generator().manual_seed(1)) + 0.5
        s = fold.expand(fold.realizable(per_row))
        quantized.install(group, unquantized(weight * s), fold, s)
        after = run_layer(layer, calls.hidden_states, calls.kwargs[0])
    assert not torch.equal(linears[0].weight, weight[: len(linears[0].weight)])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
