"""Compensated rounding against GPTQ written out from its paper, one column at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tlq.quantization.formats import (
    QuantizedWeight,
    Scheme,
    WeightQuantizer,
    dequantize,
    quantize,
    weight_qparams,
)
from tlq.quantization.objective import Factor, Statistics
from tlq.quantization.rounding import round_compensated

GROUPED = Scheme("grouped", 3, 16, symmetric=False)
ROWS = Scheme("rows", 4, None, symmetric=True)
both_schemes = pytest.mark.parametrize("scheme", [GROUPED, ROWS], ids=lambda scheme: scheme.name)


def problem(seed: int, width: int = 48, out: int = 6, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight and the second moments of correlated inputs, some channels much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    inputs = torch.randn(tokens, width, generator=generator) @ mixing * torch.logspace(-0.5, 0.5, width)
    hessian = inputs.T @ inputs
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    return torch.randn(out, width, generator=generator), hessian


def slow_gptq(weight: Tensor, hessian: Tensor, scheme: Scheme) -> Tensor:
    """Optimal brain quantization in a fixed order (GPTQ, equations 2 and 3), float64, nothing batched.

    After column q is rounded, every column F that is left moves by -(w_q - quant(w_q)) / [H_F^-1]_qq * [H_F^-1]_q,
    and q is struck from the inverse by Gaussian elimination.
    """
    w = weight.double().clone()
    inverse = torch.linalg.inv(hessian.double())
    result = torch.empty_like(w)
    scale = zero_point = torch.empty(0)
    for column in range(w.shape[1]):
        if scheme.group_size is None and column == 0:
            scale, zero_point = weight_qparams(weight, scheme, torch.bfloat16)
        elif scheme.group_size is not None and column % scheme.group_size == 0:
            ahead = w[:, column : column + scheme.group_size].float()
            scale, zero_point = weight_qparams(ahead, scheme, torch.bfloat16)
        codes = quantize(w[:, column : column + 1].float(), scale, zero_point, scheme.weight_bits)
        result[:, column] = dequantize(codes, scale, zero_point)[:, 0].double()
        error = (w[:, column] - result[:, column]) / inverse[column, column]
        w -= error[:, None] * inverse[column][None, :]
        inverse -= inverse[:, column : column + 1] @ inverse[column : column + 1] / inverse[column, column]
    return result


def factor(hessian: Tensor) -> Factor:
    found = Factor.of(hessian)
    assert found is not None
    return found


def rounded(target: Tensor, factor: Factor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Codes of a single target."""
    (found,) = round_compensated([target], factor, WeightQuantizer(scheme, scale_dtype))
    return found


def quadratic(change: Tensor, hessian: Tensor) -> float:
    change = change.double()
    return float((change @ hessian.double() * change).sum())


@both_schemes
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_column_by_column_algorithm(scheme: Scheme, seed: int) -> None:
    """Same codes; where float32 and float64 fall on two sides of a rounding edge, the same error."""
    weight, hessian = problem(seed)
    fast = rounded(weight, factor(hessian), scheme, torch.bfloat16).dequantize()
    slow = slow_gptq(weight, hessian, scheme).float()
    assert float((fast == slow).float().mean()) > 0.99
    assert quadratic(fast - weight, hessian) == pytest.approx(quadratic(slow - weight, hessian), rel=0.02)


def test_equals_the_column_by_column_algorithm_over_several_blocks() -> None:
    """With one scale per row and more columns than a block, the lazy update must reach the columns after the block."""
    weight, hessian = problem(0, width=300, out=3, tokens=1500)
    fast = rounded(weight, factor(hessian), ROWS, torch.bfloat16).dequantize()
    slow = slow_gptq(weight, hessian, ROWS).float()
    assert float((fast == slow).float().mean()) > 0.98
    assert quadratic(fast - weight, hessian) == pytest.approx(quadratic(slow - weight, hessian), rel=0.02)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([GROUPED, ROWS]))
def test_compensated_rounding_is_never_worse_than_nearest(seed: int, scheme: Scheme) -> None:
    """This holds on correlated inputs over many rows; the greedy algorithm may lose single rows."""
    weight, hessian = problem(seed, out=64)
    compensated = rounded(weight, factor(hessian), scheme, torch.bfloat16).dequantize()
    nearest = WeightQuantizer(scheme, torch.bfloat16).round_nearest(weight).dequantize()
    assert quadratic(compensated - weight, hessian) < quadratic(nearest - weight, hessian)


@both_schemes
def test_uncorrelated_inputs_leave_nearest_rounding(scheme: Scheme) -> None:
    weight, _ = problem(1)
    hessian = torch.diag(torch.logspace(-1, 1, weight.shape[1]))
    compensated = rounded(weight, factor(hessian), scheme, torch.bfloat16)
    nearest = WeightQuantizer(scheme, torch.bfloat16).round_nearest(weight)
    assert torch.equal(compensated.codes, nearest.codes)
    assert torch.equal(compensated.scale, nearest.scale)
    assert torch.equal(compensated.zero_point, nearest.zero_point)


def test_shifted_target_beats_plain_gptq_on_exposed_inputs() -> None:
    """Rounding towards W* lowers the real error E(V) more than rounding towards W."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(600, 48, generator=generator)
    u = x + 0.3 * torch.randn(600, 48, generator=generator)
    u[:, :8] *= 0.7
    weight = torch.randn(6, 48, generator=generator)
    statistics = Statistics.of(weight, x, u, torch.ones(600))
    found, _ = statistics.factor(0.01)
    target = statistics.shifted_target(weight, found)
    shifted, plain = (rounded(wanted, found, GROUPED, torch.bfloat16).dequantize() for wanted in (target, weight))
    errors = [statistics.errors([(slice(None), found - weight)])[0] for found in (shifted, plain)]
    assert errors[0] < 0.9 * errors[1]


@both_schemes
def test_codes_do_not_depend_on_other_targets(scheme: Scheme) -> None:
    """One rank and eight ranks round different parts together; the codes must have the same bits."""
    weight, hessian = problem(6, out=111, width=192)
    found = factor(hessian)
    parts = weight.split(37)
    alone = [rounded(part, found, scheme, torch.bfloat16) for part in parts]
    for numbers in ([0, 1, 2], [1, 2], [2, 0]):
        beside = round_compensated(
            [parts[number] for number in numbers], found, WeightQuantizer(scheme, torch.bfloat16)
        )
        for number, part in zip(numbers, beside, strict=True):
            assert torch.equal(part.codes, alone[number].codes)
            assert torch.equal(part.scale, alone[number].scale)
            assert torch.equal(part.zero_point, alone[number].zero_point)


@both_schemes
def test_shapes_and_ranges(scheme: Scheme) -> None:
    weight, hessian = problem(3)
    result = rounded(weight, factor(hessian), scheme, torch.bfloat16)
    low, high = scheme.code_range
    groups = 1 if scheme.group_size is None else weight.shape[1] // scheme.group_size
    assert result.codes.shape == weight.shape
    assert result.scale.shape == result.zero_point.shape == (len(weight), groups)
    assert low <= int(result.codes.min()) <= int(result.codes.max()) <= high


def test_rounding_does_not_change_its_inputs() -> None:
    weight, hessian = problem(4)
    copies = weight.clone(), hessian.clone()
    rounded(weight, factor(hessian), GROUPED, torch.bfloat16)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])


def test_factors_give_the_hessian_and_solve_with_it() -> None:
    _, hessian = problem(5)
    found = factor(hessian)
    assert torch.equal(found.upper, found.upper.triu())
    assert torch.equal(found.upper.diagonal(), torch.ones(len(hessian)))
    torch.testing.assert_close(found.upper * found.pivots @ found.upper.T, hessian, rtol=1e-4, atol=1e-3)
    rows = torch.randn(5, len(hessian), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.solve(rows) @ hessian, rows, rtol=0, atol=1e-3)
    assert Factor.of(hessian - 2 * hessian.diagonal().diag()) is None
