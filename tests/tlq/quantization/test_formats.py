"""Number formats: the quantize/dequantize pair, ranges, agreement with compressed-tensors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as library_fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tlq.quantization.formats import (
    SCHEMES,
    Scheme,
    WeightQuantizer,
    code_range,
    dequantize,
    fake_quantize_activations,
    get_scheme,
    quantize,
    weight_qparams,
)

GROUP = 16
SMALL = [dataclasses.replace(scheme, group_size=scheme.group_size and GROUP) for scheme in SCHEMES.values()]
schemes = st.sampled_from(SMALL)
storages = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@st.composite
def weights(draw: st.DrawFn, rows: int = 5, groups: int = 3) -> Tensor:
    """Random weights of very different magnitudes per row, some groups constant, one-sided or zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    weight = torch.randn(rows, groups * GROUP, generator=generator)
    weight *= torch.logspace(-3, 1, rows)[:, None]
    kind = draw(st.sampled_from(["normal", "positive", "negative", "zero group", "constant", "outlier"]))
    if kind in ("positive", "negative"):
        weight = weight.abs() * (1 if kind == "positive" else -1)
    elif kind == "zero group":
        weight[:, :GROUP] = 0
    elif kind == "constant":
        weight[:] = weight[:, :1]
    elif kind == "outlier":
        weight[:, 0] *= 100
    return weight


@settings(max_examples=60, deadline=None)
@given(weights(), schemes, storages)
def test_codes_stay_in_range_and_scales_in_storage(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> None:
    result = WeightQuantizer(scheme, dtype).round_nearest(weight)
    low, high = code_range(scheme.weight_bits)
    groups = 1 if scheme.group_size is None else weight.shape[1] // GROUP
    assert result.codes.dtype == torch.int8
    assert result.codes.shape == weight.shape
    assert low <= int(result.codes.min()) <= int(result.codes.max()) <= high
    assert low <= int(result.zero_point.min()) <= int(result.zero_point.max()) <= high
    assert result.scale.shape == result.zero_point.shape == (len(weight), groups)
    assert result.scale.dtype == dtype
    assert bool((result.scale > 0).all())


@settings(max_examples=60, deadline=None)
@given(weights(), schemes, storages)
def test_fake_quantize_equals_round_nearest_and_dequantize(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> None:
    assert torch.equal(
        WeightQuantizer(scheme, dtype).fake_quantize(weight),
        WeightQuantizer(scheme, dtype).round_nearest(weight).dequantize(),
    )


@settings(max_examples=60, deadline=None)
@given(weights(), schemes, storages)
def test_quantize_inverts_dequantize(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> None:
    """Every code of every group survives dequantize and quantize; the export relies on this."""
    scale, zero_point = weight_qparams(weight, scheme, dtype)
    low, high = code_range(scheme.weight_bits)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(low, high + 1, weight.shape, generator=generator).to(torch.int8)
    points = dequantize(codes, scale, zero_point)
    assert torch.equal(quantize(points, scale, zero_point, scheme.weight_bits), codes)


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from([scheme for scheme in SMALL if scheme.scale_digits is None]))
def test_error_is_at_most_half_a_step(weight: Tensor, scheme: Scheme) -> None:
    """With exact scales no error exceeds half a step, except where a symmetric range is clipped."""
    result = WeightQuantizer(scheme, torch.float32).round_nearest(weight)
    step = result.scale.repeat_interleave(weight.shape[1] // result.scale.shape[1], 1)
    # The zero-point's own rounding may clip a group's edge by half a step more.
    allowed = 0.5 if scheme.symmetric else 1.0
    assert bool(((weight - result.dequantize()).abs() <= step * allowed * (1 + 1e-4)).all())


def test_groups_do_not_see_each_other() -> None:
    scheme = Scheme("test", 4, GROUP, symmetric=False)
    weight = torch.randn(3, 2 * GROUP, generator=torch.Generator().manual_seed(0))
    other = weight.clone()
    other[:, GROUP:] *= 1000
    assert torch.equal(
        WeightQuantizer(scheme, torch.bfloat16).fake_quantize(weight)[:, :GROUP],
        WeightQuantizer(scheme, torch.bfloat16).fake_quantize(other)[:, :GROUP],
    )


@pytest.mark.parametrize("scheme", SMALL, ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("size", [0.0, 3e-8], ids=["zero", "too small for float16 scales"])
def test_vanishing_groups_become_exact_zeros(scheme: Scheme, size: float) -> None:
    weight = torch.randn(2, 2 * GROUP, generator=torch.Generator().manual_seed(0))
    weight[:, :GROUP] = size
    if scheme.group_size is None:
        weight[:] = size
    result = WeightQuantizer(scheme, torch.float16).fake_quantize(weight)
    assert bool(torch.isfinite(result).all())
    assert float(result[:, :GROUP].abs().max()) == 0


@settings(max_examples=40, deadline=None)
@given(weights(), schemes)
def test_qparams_are_those_of_compressed_tensors(weight: Tensor, scheme: Scheme) -> None:
    """Same scales and zero-points wherever a group is not all zeros (there the library uses a tiny scale)."""
    groups = weight.unflatten(1, (-1, scheme.group_size or weight.shape[1]))
    args = QuantizationArgs(
        num_bits=scheme.weight_bits,
        symmetric=scheme.symmetric,
        type=QuantizationType.INT,
        strategy=QuantizationStrategy.GROUP if scheme.group_size else QuantizationStrategy.CHANNEL,
        group_size=scheme.group_size,
    )
    theirs_scale, theirs_zero = calculate_qparams(groups.amin(2), groups.amax(2), args)
    scale, zero_point = weight_qparams(weight, dataclasses.replace(scheme, scale_digits=None), torch.float32)
    alive = groups.abs().amax(2) > 0
    torch.testing.assert_close(scale[alive], theirs_scale[alive], rtol=1e-6, atol=0)
    assert torch.equal(zero_point[alive], theirs_zero[alive].to(torch.int8))


@settings(max_examples=40, deadline=None)
@given(weights(), st.sampled_from([4, 8]))
def test_activations_are_quantized_as_compressed_tensors_does(hidden: Tensor, bits: int) -> None:
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=True,
        type=QuantizationType.INT,
        strategy=QuantizationStrategy.TOKEN,
        dynamic=True,
    )
    hidden = hidden[None]
    alive = hidden.abs().amax(-1) > 0
    scale, zero_point = compute_dynamic_scales_and_zp(hidden, args, torch.nn.Linear(1, 1))
    theirs = library_fake_quantize(hidden, scale, zero_point, args)
    ours = fake_quantize_activations(hidden, bits)
    assert torch.equal(ours[alive], theirs[alive])
    assert float(ours[~alive].abs().sum()) == 0


def test_rescaled_rows_keep_their_codes() -> None:
    scheme = Scheme("test", 3, GROUP, symmetric=False)
    weight = torch.randn(4, 2 * GROUP, generator=torch.Generator().manual_seed(0))
    before = WeightQuantizer(scheme, torch.bfloat16).round_nearest(weight)
    factor = torch.tensor([0.5, 1.0, 2.0, 4.0])
    after = before.rescale_rows(factor, scheme)
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.dequantize(), before.dequantize() * factor[:, None])  # powers of two are exact


@settings(max_examples=40, deadline=None)
@given(weights(), st.sampled_from([get_scheme("q4_0"), get_scheme("q4_1"), get_scheme("q8_0")]), storages)
def test_a_float16_holds_the_scales_and_offsets_of_blocks(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> None:
    weight = weight[:, : weight.shape[1] // 32 * 32]
    small = dataclasses.replace(scheme, group_size=weight.shape[1] or None)
    for result in (
        WeightQuantizer(small, dtype).round_nearest(weight),
        WeightQuantizer(small, dtype).round_nearest(weight).rescale_rows(torch.full((len(weight),), 0.3), small),
    ):
        offset = -result.scale.float() * (result.zero_point.float() + 8)
        assert torch.equal(result.scale.half().float(), result.scale.float())
        assert scheme.symmetric or torch.equal(offset.half().float(), offset)


def test_indivisible_group_size_names_layer_and_next_step() -> None:
    with pytest.raises(
        ValueError, match=r"layers\.3\.mlp\.down_proj.*groups of 128.*192.*group_size to one of \[32, 64\]"
    ):
        get_scheme("w3a16").check_width(192, "layers.3.mlp.down_proj")
    get_scheme("w4a8").check_width(191, "any width has one scale per row")


def test_unknown_scheme_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown scheme 'w5a16'; choose one of w2a16, w2a16s"):
        get_scheme("w5a16")


def test_group_size_replaces_the_schemes_own() -> None:
    assert get_scheme("w3a16", 64).group_size == 64
    assert get_scheme("w3a16") is SCHEMES["w3a16"]
    with pytest.raises(ValueError, match="one scale per output channel; remove group_size"):
        get_scheme("w4a8", 64)
