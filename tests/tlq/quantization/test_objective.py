"""The calibration objective: statistics, the direct sum and the textbook form are one number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tlq.parallel import Ranks
from tlq.quantization import objective
from tlq.quantization.formats import fake_quantize_activations
from tlq.quantization.objective import ChunkInputs, Statistics, Tokens


def problem(seed: int, tokens: int = 40, width: int = 12, out: int = 7) -> tuple[Tensor, ...]:
    """W, V, x, u, w with x and u close, V a perturbed W, and heavy-tailed weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator) * torch.logspace(-1, 1, width)
    u = x + 0.1 * torch.randn(tokens, width, generator=generator)
    weight = torch.randn(out, width, generator=generator)
    quantized = weight + 0.2 * torch.randn(out, width, generator=generator)
    w = torch.randn(tokens, generator=generator).exp()
    return weight, quantized, x, u, w


def plain_error(weight: Tensor, quantized: Tensor, x: Tensor, u: Tensor, w: Tensor) -> float:
    """E(V) from its definition, one token at a time, in float64."""
    total = 0.0
    for token in range(len(w)):
        difference = weight.double() @ x[token].double() - quantized.double() @ u[token].double()
        total += float(w[token]) * float(difference @ difference)
    return total


def error_of(statistics: Statistics, weight: Tensor, quantized: Tensor) -> float:
    return float(statistics.errors([(slice(None), quantized - weight)]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([3, 12, 40]))
def test_all_forms_give_the_same_number(seed: int, tokens: int) -> None:
    weight, quantized, x, u, w = problem(seed, tokens)
    expected = plain_error(weight, quantized, x, u, w)
    a, b, c = (
        torch.einsum("t,ti,tj->ij", w.double(), left.double(), right.double())
        for left, right in ((x, x), (x, u), (u, u))
    )
    full, v = weight.double(), quantized.double()
    textbook = (full @ a @ full.T).trace() - 2 * (full @ b @ v.T).trace() + (v @ c @ v.T).trace()
    assert float(textbook) == pytest.approx(expected, rel=1e-6)
    assert error_of(Statistics.of(weight, x, u, w), weight, quantized) == pytest.approx(expected, rel=1e-4)
    assert float(Tokens([x @ weight.T], u, w).errors([0], quantized).sum()) == pytest.approx(expected, rel=1e-4)


def test_statistics_do_not_cancel_for_a_nearly_exact_weight() -> None:
    """A relative change of 1e-4 in V is measured to a percent, where the textbook form has lost it in float32."""
    weight, _, x, _, w = problem(0)
    quantized = weight * (1 + 1e-4)
    expected = plain_error(weight, quantized, x, x, w)
    assert error_of(Statistics.of(weight, x, x, w), weight, quantized) == pytest.approx(expected, rel=0.01)


def test_statistics_add_up_over_tokens() -> None:
    weight, quantized, x, u, w = problem(1)
    whole = Statistics.of(weight, x, u, w)
    halves = [ChunkInputs(x[:15], u[:15], w[:15]), ChunkInputs(x[15:], u[15:], w[15:])]
    parts = Statistics.added(weight, halves, False, Ranks())
    assert error_of(parts, weight, quantized) == pytest.approx(error_of(whole, weight, quantized), rel=1e-5)
    torch.testing.assert_close(parts.hessian, whole.hessian)
    torch.testing.assert_close(parts.cross, whole.cross)


def test_statistics_wider_than_a_block_are_the_moments_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of rows, and one half mirrored."""
    weight, quantized, x, u, w = problem(10, tokens=60, width=45, out=23)
    monkeypatch.setattr(objective, "_BLOCK_ROWS", 16)
    found = Statistics.of(weight, x, u, w)
    torch.testing.assert_close(found.hessian, torch.einsum("t,ti,tj->ij", w, u, u), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.cross, weight @ torch.einsum("t,ti,tj->ij", w, x - u, u), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        found.exposure, torch.einsum("t,to->o", w, ((x - u) @ weight.T).square()), rtol=1e-4, atol=1e-3
    )
    assert error_of(found, weight, quantized) == pytest.approx(plain_error(weight, quantized, x, u, w), rel=1e-4)


def test_a_weight_of_two_equals_the_token_twice() -> None:
    weight, quantized, x, u, _ = problem(2)
    once = torch.ones(len(x))
    doubled = once.clone()
    doubled[4] = 2
    twice = [torch.cat([part, part[4:5]]) for part in (x, u, once)]
    assert error_of(Statistics.of(weight, x, u, doubled), weight, quantized) == pytest.approx(
        error_of(Statistics.of(weight, *twice), weight, quantized), rel=1e-5
    )


def test_scaling_the_inputs_equals_scaling_the_statistics() -> None:
    weight, _, x, u, w = problem(3)
    s = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(0)) + 0.5
    statistics, direct = Statistics.of(weight, x, u, w), Statistics.of(weight * s, x / s, u / s, w)
    factor, _ = statistics.factor(0.01, s)
    expected, _ = direct.factor(0.01)
    torch.testing.assert_close(factor.upper, expected.upper, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(factor.pivots, expected.pivots, rtol=1e-4, atol=1e-4)
    rows = slice(2, 5)
    target = statistics.shifted_target((weight * s)[rows], factor, rows, s)
    torch.testing.assert_close(target, direct.shifted_target(weight * s, expected)[rows], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_token_error_with_scales_and_quantized_activations(norm: str) -> None:
    weight, quantized, x, u, w = problem(4)
    s = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(0)) + 0.5
    total = 0.0
    for token in range(len(w)):
        seen = fake_quantize_activations((u[token] / s)[None], 8)[0]
        difference = weight @ x[token] - (quantized * s) @ seen
        total += float(w[token]) * float(difference.abs().sum() if norm == "l1" else difference.square().sum())
    y = x @ weight.T
    tokens = Tokens([y[:, 0::2], y[:, 1::2]], u, w).scaled(s, 8)
    stacked = torch.cat([(quantized * s)[part::2] for part in (0, 1)])
    found = tokens.errors([0, 1], stacked, norm)  # type: ignore[arg-type]
    assert float(found.sum()) == pytest.approx(total, rel=1e-4)


def solved(statistics: Statistics, weight: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """W*, the damped Hessian put together from its factors, and the damping."""
    factor, used = statistics.factor(damping)
    hessian = factor.upper * factor.pivots @ factor.upper.T
    return statistics.shifted_target(weight, factor), hessian, used


def test_shifted_target_minimises_the_error() -> None:
    """The target is the weighted least-squares solution on exposed inputs, where the error's gradient is zero."""
    weight, _, x, u, w = problem(5)
    statistics = Statistics.of(weight, x, u, w)
    target, _, damping = solved(statistics, weight, 1e-9)
    root = w.sqrt()[:, None].double()
    expected = torch.linalg.lstsq(root * u.double(), root * (x @ weight.T).double()).solution.T
    torch.testing.assert_close(target.double(), expected, rtol=1e-3, atol=1e-3)
    assert damping == 1e-9

    variable = target.clone().requires_grad_()
    residual = x @ weight.T - u @ variable.T
    (w[:, None] * residual.square()).sum().backward()
    unshifted = 2 * statistics.cross.abs().max()  # type: ignore[union-attr]
    assert float(variable.grad.abs().max()) < 1e-3 * float(unshifted)  # type: ignore[union-attr]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_error_is_a_constant_plus_the_distance_to_the_target(seed: int) -> None:
    """E(V) - E(V') = tr((V - W*) C (V - W*)') - tr((V' - W*) C (V' - W*)'), as compensated rounding assumes."""
    weight, quantized, x, u, w = problem(seed)
    statistics = Statistics.of(weight, x, u, w)
    target, hessian, _ = solved(statistics, weight, 1e-7)

    def distance(v: Tensor) -> float:
        return float(((v - target) @ hessian * (v - target)).sum())

    gap = error_of(statistics, weight, quantized) - error_of(statistics, weight, weight)
    assert distance(quantized) - distance(weight) == pytest.approx(gap, rel=1e-2, abs=1e-2)


def test_target_is_the_weight_itself_without_exposure() -> None:
    weight, _, x, _, w = problem(6)
    target, _, _ = solved(Statistics.of(weight, x, x, w), weight, 0.01)
    assert torch.equal(target, weight)


def test_damping_grows_until_the_factorisation_succeeds() -> None:
    """Three tokens span three of twelve channels, so the Hessian has no inverse without damping."""
    weight, _, x, u, w = problem(7, tokens=3)
    statistics = Statistics.of(weight, x, u, w)
    for start in (0.0, 1e-12):
        target, hessian, damping = solved(statistics, weight, start)
        assert start < damping < 0.01
        assert bool(torch.isfinite(target).all())
        assert bool((torch.linalg.eigvalsh(hessian.double()) > 0).all())


def test_statistics_that_are_not_finite_are_refused() -> None:
    weight, _, x, u, w = problem(8)
    u[3, 2] = math.nan
    with pytest.raises(FloatingPointError, match="cannot be factorised.*not finite"):
        solved(Statistics.of(weight, x, u, w), weight, 0.01)


def test_dead_channels_keep_their_weights() -> None:
    weight, _, x, u, w = problem(9)
    x[:, 4] = u[:, 4] = 0
    target, hessian, damping = solved(Statistics.of(weight, x, u, w), weight, 0.01)
    assert damping == 0.01
    assert torch.equal(target[:, 4], weight[:, 4])
    assert float(hessian[4, 4]) > 0
    alive = [channel for channel in range(x.shape[1]) if channel != 4]
    without, _, _ = solved(
        Statistics.of(weight[:, alive], x[:, alive], u[:, alive], w), weight[:, alive], 0.01 * 11 / 12
    )
    torch.testing.assert_close(target[:, alive], without, rtol=1e-4, atol=1e-4)
