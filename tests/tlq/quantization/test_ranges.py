"""The search for scale and zero-point finds the best pair of its grid, and every scheme and rounding can use it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from tlq.parallel import Ranks
from tlq.quantization.errors import GroupInputs, LinearsError
from tlq.quantization.formats import WeightQuantizer, dequantize, get_scheme, quantize, stored_scale
from tlq.quantization.objective import ChunkInputs, Factor, Statistics
from tlq.quantization.ranges import Ranges
from tlq.quantization.rounding import ROUNDINGS, round_compensated
from tlq.recipes import get_recipe

SEARCH = Ranges("search")
SCHEMES = ["w2a16", "w3a16", "w4a16s", "w4a8", "q4_1"]


def quantizer(scheme: str) -> WeightQuantizer:
    return WeightQuantizer(get_scheme(scheme), torch.bfloat16)


def weights(rows: int = 6, width: int = 256) -> Tensor:
    """Normal weights of which a few are large, so that the whole range is a poor one."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, width, generator=generator)
    values[:, ::61] *= 4
    return values


def channel_weights(width: int = 256) -> Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(1)) + 0.01


def error_of(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, channels: Tensor) -> Tensor:
    """[out, groups]: weighted squared error under nearest rounding."""
    gap = dequantize(quantize(weight, scale, zero_point, bits), scale, zero_point) - weight
    return (gap.square() * channels).unflatten(1, (scale.shape[1], -1)).sum(2)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_search_finds_the_best_pair_of_its_grid(name: str) -> None:
    """The grid is tried here pair by pair, with the functions that the export uses."""
    rounds, weight, channels = quantizer(name), weights(), channel_weights()
    scheme = rounds.scheme
    widest, middle = rounds.qparams(weight)
    low, high = scheme.code_range
    errors = []
    for point, offset in product(range(SEARCH.points), [0] if scheme.symmetric else [-1, 0, 1]):
        factor = 1 - point * (1 - SEARCH.least) / (SEARCH.points - 1)
        scale = stored_scale(widest.float() * factor, scheme, torch.bfloat16)
        zero_point = (middle.float() + offset).clamp(low, high).to(torch.int8)
        errors.append(error_of(weight, scale, zero_point, scheme.weight_bits, channels))
    found = error_of(weight, *SEARCH.qparams(weight, rounds, channels), scheme.weight_bits, channels)
    torch.testing.assert_close(found, torch.stack(errors).amin(0), rtol=1e-4, atol=0)
    whole = error_of(weight, widest, middle, scheme.weight_bits, channels)
    assert float(found.sum()) < 0.95 * float(whole.sum())


@pytest.mark.parametrize("name", SCHEMES)
def test_scales_are_what_the_checkpoint_stores(name: str) -> None:
    scale, zero_point = SEARCH.qparams(weights(), quantizer(name), channel_weights())
    assert (scale.dtype, zero_point.dtype) == (torch.bfloat16, torch.int8)
    digits = get_scheme(name).scale_digits
    if digits is not None:
        mantissa, _ = torch.frexp(scale.float())
        assert torch.equal(mantissa * 2**digits, (mantissa * 2**digits).round())


def test_minmax_is_the_whole_range() -> None:
    weight, rounds = weights(), quantizer("w3a16")
    for found, expected in zip(Ranges().qparams(weight, rounds, None), rounds.qparams(weight), strict=True):
        assert torch.equal(found, expected)


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 128)
    scale, zero_point = SEARCH.qparams(weight, quantizer("w3a16"), None)
    assert torch.equal(dequantize(quantize(weight, scale, zero_point, 3), scale, zero_point), weight)


def test_channels_that_matter_more_are_clipped_less() -> None:
    """One large weight is kept whole if its channel counts, and clipped if it does not."""
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(2))
    weight[:, 5] = 9.0
    gaps = []
    for importance in (1e-3, 1e3):
        channels = torch.ones(128)
        channels[5] = importance
        scale, zero_point = SEARCH.qparams(weight, quantizer("w3a16"), channels)
        gaps.append((dequantize(quantize(weight, scale, zero_point, 3), scale, zero_point) - weight)[:, 5].abs())
    assert bool((gaps[0] > 2).all())
    assert bool((gaps[1] < 0.7).all())


def problem(name: str, tokens: int = 600) -> LinearsError:
    generator = torch.Generator().manual_seed(3)
    weight = weights(8, 128)
    u = torch.randn(tokens, 128, generator=generator) @ torch.randn(128, 128, generator=generator) / 11
    w = torch.rand(tokens, generator=generator)
    inputs = GroupInputs([ChunkInputs(u, u, w)], 1, w, 128, True, Ranks())
    return LinearsError(weight, inputs, quantizer(name), needs_statistics=True)


@pytest.mark.parametrize("rounding", list(ROUNDINGS))
@pytest.mark.parametrize("name", ["w2a16", "w3a16s", "w4a8"])
def test_the_search_lowers_the_error_of_the_output(rounding: str, name: str) -> None:
    error, s = problem(name), torch.ones(128)
    totals = []
    for ranges in (Ranges(), SEARCH):
        rounded = ROUNDINGS[rounding].solve(error, s, ranges, 0.01)
        totals.append(error.cheapest.total(rounded.weight.dequantize(), s))
    assert totals[1] < 0.9 * totals[0]


def test_the_weights_of_channels_are_those_of_the_factor() -> None:
    error = problem("w3a16")
    statistics = Statistics.of(error.weight, error.inputs.own[0].x, error.inputs.own[0].u, error.inputs.w)
    factor, _ = statistics.factor(1e-6)
    torch.testing.assert_close(factor.diagonal(), statistics.hessian.diagonal(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(error.inputs.second_moments(), statistics.hessian.diagonal(), rtol=1e-4, atol=1e-4)


def test_a_target_has_the_same_codes_alone_and_among_others() -> None:
    width = 256
    moments = torch.randn(width, 500, generator=torch.Generator().manual_seed(4))
    factor = Factor.of(moments @ moments.T + torch.eye(width))
    assert factor is not None
    parts = [weights(16), weights(16).flip(0)]
    together = round_compensated(parts, factor, quantizer("w2a16"), SEARCH)
    for part, beside in zip(parts, together, strict=True):
        (alone,) = round_compensated([part], factor, quantizer("w2a16"), SEARCH)
        assert torch.equal(alone.codes, beside.codes)
        assert torch.equal(alone.scale, beside.scale)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"points": 1}, "ranges.points is 1"),
        ({"least": 1.0}, "ranges.least is 1.0"),
        ({"least": 0.0}, "ranges.least is 0.0"),
        ({"zero_points": 2}, "ranges.zero_points is 2, must be odd"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ranges("search", **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheme", "overrides", "needed"),
    [
        ("w2a16", (), True),
        ("w3a16", (), False),
        ("w4a16s", (("*.layers.0.*", "w2a16s"),), True),
        ("w4a16s", (("*.layers.0.*", "w8a16s"), ("*.layers.1.*", "full_precision")), False),
        ("mix3.5", (), True),
    ],
)
def test_data_are_needed_where_a_linear_has_few_enough_bits_for_the_search(
    scheme: str, overrides: tuple[tuple[str, str], ...], needed: bool
) -> None:
    recipe = replace(get_recipe("rtn"), ranges=Ranges("search", most_bits=2))
    assert recipe.needs_data(replace(get_scheme(scheme), overrides=overrides)) == needed
    assert recipe.needs_data()  # for some scheme
    of_weights = replace(recipe, ranges=Ranges("search", channels="ones"))
    assert not of_weights.needs_data()
    assert not of_weights.needs_data(get_scheme(scheme))
