"""The calibration objective E(V) = sum_t w_t ||W x_t - V u_t||^2 of a linear group.

W [out, in] is the full-precision weight, x_t the full-precision input, u_t the quantization-exposed input, w_t the
token's importance. Two forms give the same number:

* ``Statistics``: with D = V - W,  E = sum w ||W (x-u)||^2 - 2 tr(W G D') + tr(D C D'),
  G = sum w (x-u) u', C = sum w u u'. The sums over tokens do not depend on V, so no search step reads a token again.
  E equals tr(W A W') - 2 tr(W B V') + tr(V C V') with A = sum w x x', B = sum w x u', without that form's
  cancellation when V is close to W. W G [out, in] is stored in place of G [in, in]: the error and the target of
  compensated rounding need W G only. This is the asymmetric calibration of GPTAQ (arXiv 2504.02692) with token weights;
  GPTAQ's closed form W* = W + W G C^-1 is in ``Statistics.shifted_target``.
* ``Tokens``: the sum itself. It serves fewer tokens than channels, norms other than L2, and quantized activations,
  which depend on the equalization scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tlq.parallel import Ranks
from tlq.quantization.formats import fake_quantize_activations

Norm = Literal["l1", "l2"]

_LEAST_DAMPING = 1e-6
_BLOCK_ROWS = 512


@dataclass
class ChunkInputs:
    """Inputs of one linear group at the tokens with a weight, from the micro-batches of one reduction chunk.

    Attributes:
        x: [tokens, in], inputs that the target is computed from.
        u: [tokens, in], inputs of the quantized linear; the same tensor as ``x`` if one stream serves both.
        w: [tokens] float32, weights.
    """

    x: Tensor
    u: Tensor
    w: Tensor


@dataclass(frozen=True)
class Factor:
    """H = U diag(p) U'.

    Attributes:
        upper: U [in, in], unit upper triangular.
        pivots: p [in], positive.
    """

    upper: Tensor
    pivots: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> Factor | None:
        """Factors of a symmetric matrix [in, in], or None if it is not positive definite."""
        lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        return None if int(info) else cls.of_reversed(lower)

    @classmethod
    def of_reversed(cls, lower: Tensor) -> Factor:
        """Factors of a matrix from the lower Cholesky factor of the same matrix with rows and columns reversed.

        With its own rows and columns reversed, that factor is an upper factor of the matrix itself.
        """
        upper = lower.flip(0, 1)
        diagonal = upper.diagonal().clone()
        return cls(upper.div_(diagonal), diagonal.square())

    def diagonal(self) -> Tensor:
        """The diagonal of H, [in]; a few rows at a time, because U is gigabytes at 72B."""
        blocks = [self.upper[rows].square() @ self.pivots for rows in _row_blocks(len(self.upper))]
        return torch.cat(blocks)

    def solve(self, rows: Tensor) -> Tensor:
        """rows H^-1, for rows [rows, in]."""
        half = torch.linalg.solve_triangular(self.upper.T, rows, upper=False, left=False, unitriangular=True)
        half /= self.pivots
        return torch.linalg.solve_triangular(self.upper, half, upper=True, left=False, unitriangular=True)


@dataclass
class Statistics:
    """E(V) of one weight W by output rows.

    ``exposure`` and ``cross`` would be zero if full-precision and exposed inputs are the same; then they are None.

    Attributes:
        exposure: sum w (W (x-u))^2 [out] float32.
        cross: W G [out, in] float32.
        hessian: C [in, in] float32.
    """

    exposure: Tensor | None
    cross: Tensor | None
    hessian: Tensor

    @classmethod
    def of(cls, weight: Tensor, x: Tensor, u: Tensor, w: Tensor) -> Statistics:
        """Compute from W [out, in], full-precision inputs x, exposed inputs u [tokens, in], and weights w [tokens]."""
        return cls.added(weight, [ChunkInputs(x, u, w)], x is u, Ranks(device=weight.device))

    @classmethod
    def added(cls, weight: Tensor, own: Sequence[ChunkInputs], same: bool, ranks: Ranks) -> Statistics:
        """The sum over all chunks, on every rank.

        A few rows are summed at a time, so that partial sums take little memory in addition to the result.

        Args:
            own: inputs of this rank's chunks.
            same: whether full-precision and exposed inputs are the same.
        """
        hessian = _second_moments(own, weight.shape[1], ranks)
        if same:
            return cls(None, None, hessian)
        exposure, cross = torch.empty(len(weight), device=weight.device), torch.empty_like(weight)
        for rows in _row_blocks(len(weight)):
            block = weight[rows]
            gaps = [(part.x.float() - part.u.float()) @ block.T for part in own]
            squares = (part.w @ gap.square() for part, gap in zip(own, gaps, strict=True))
            exposure[rows] = ranks.ordered_sum(squares, (len(block),))
            products = ((gap * part.w[:, None]).T @ part.u.float() for part, gap in zip(own, gaps, strict=True))
            cross[rows] = ranks.ordered_sum(products, block.shape)
        return cls(exposure, cross, hessian)

    def errors(self, changes: Sequence[tuple[slice, Tensor]]) -> Tensor:
        """The error of the output rows of each pair (rows, their D = V - W [rows, in]), [pairs] float64.

        All pairs are multiplied by C together, because a product of few rows does not use all threads. C is symmetric,
        so blocks above its diagonal count twice and blocks below are skipped.
        """
        stacked = torch.cat([change for _, change in changes])
        products = torch.zeros(len(stacked), dtype=torch.float64, device=stacked.device)
        for block in _row_blocks(len(self.hessian)):
            above = (stacked[:, block] @ self.hessian[block, block.start :]).mul_(stacked[:, block.start :])
            width = block.stop - block.start
            products += above[:, :width].sum(1) + 2 * above[:, width:].sum(1)
        errors = []
        for (rows, change), squares in zip(changes, products.split([len(each) for _, each in changes]), strict=True):
            total = squares.sum()
            if self.exposure is not None and self.cross is not None:
                linear = (self.cross[rows] * change).sum(dtype=torch.float64)
                total = total + self.exposure[rows].sum(dtype=torch.float64) - 2 * linear
            errors.append(total)
        return torch.stack(errors)

    def factor(self, damping: float, s: Tensor | None = None, keep: bool = True) -> tuple[Factor, float]:
        """Factorise the damped C of inputs divided by s [in].

        The damping (GPTQ's ``percdamp``) is a fraction of the mean diagonal; it grows tenfold until the factorisation
        succeeds. A channel that is zero at every token gets the mean diagonal.

        Args:
            keep: whether C is needed afterwards. If not, C is freed, so that no more than two matrices of the group's
                width (gigabytes each at 72B) are in memory at once.

        Returns:
            The factor, and the damping used.

        Raises:
            FloatingPointError: the factorisation fails even with strong damping.
        """
        hessian = self.hessian.flip(0, 1)
        if not keep:
            self.hessian = torch.empty(0)
        if s is not None:
            backwards = s.flip(0)
            hessian.div_(backwards).div_(backwards[:, None])
        diagonal = hessian.diagonal().clone()
        mean = float(diagonal.mean()) or 1.0
        while damping < 1e3:
            hessian.diagonal().copy_(torch.where(diagonal == 0, mean, diagonal + damping * mean))
            lower, info = torch.linalg.cholesky_ex(hessian)
            if not int(info):
                del hessian
                return Factor.of_reversed(lower), damping
            damping = max(10 * damping, _LEAST_DAMPING)
        raise FloatingPointError(
            "the inputs' second moments cannot be factorised even with strong damping: they are not finite"
        )

    def shifted_target(
        self, weight: Tensor, factor: Factor, rows: slice = slice(None), s: Tensor | None = None
    ) -> Tensor:
        """Some rows of W* = W B C^-1, the real-valued weight with the smallest error on exposed inputs.

        E(V) = const + tr((V - W*) C (V - W*)'), so error feedback with target W* and Hessian C solves the exposed
        problem. With B = C + G:  W* = W + W G C^-1, the closed form of GPTAQ (arXiv 2504.02692), here for weighted
        tokens.

        Args:
            weight: rows ``rows`` of W diag(s), [rows, in].
            factor: factor of the damped C of inputs divided by s.
        """
        if self.cross is None:
            return weight
        cross = self.cross[rows]
        return weight + factor.solve(cross if s is None else cross / s)


def _second_moments(own: Sequence[ChunkInputs], in_features: int, ranks: Ranks) -> Tensor:
    """C = sum w u u' [in, in] over all chunks; the lower half mirrors the upper one."""
    total = torch.empty(in_features, in_features, device=ranks.device)
    for rows in _row_blocks(in_features):
        parts = ((part.u[:, rows] * part.w[:, None]).T @ part.u[:, rows.start :].float() for part in own)
        shape = (rows.stop - rows.start, in_features - rows.start)
        total[rows, rows.start :] = ranks.ordered_sum(parts, shape)
        total[rows.stop :, rows] = total[rows, rows.stop :].T
    return total


def computed_elements(width: int) -> int:
    """Elements of a symmetric matrix [width, width] that are computed: blocks below the diagonal are skipped."""
    return sum((block.stop - block.start) * (width - block.start) for block in _row_blocks(width))


def _row_blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK_ROWS, rows)) for start in range(0, rows, _BLOCK_ROWS))


@dataclass
class Tokens:
    """All tokens: reference outputs y [tokens, rows] of every part, exposed inputs u [tokens, in], weights w [tokens].

    A part of the output channels is every n-th of them.
    """

    y: list[Tensor]
    u: Tensor
    w: Tensor

    def scaled(self, s: Tensor, activation_bits: int) -> Tokens:
        """The same tokens with the inputs u / s, quantized to ``activation_bits``."""
        return Tokens(self.y, fake_quantize_activations(self.u.float() / s, activation_bits), self.w)

    def errors(self, parts: Sequence[int], stacked: Tensor, norm: Norm = "l2") -> Tensor:
        """sum_t w_t |y_t - V u_t| of each part, from one product; [parts] float64.

        Args:
            stacked: V of the parts' rows, part after part, [rows, in].
        """
        references = [self.y[part] for part in parts]
        products = (self.u.float() @ stacked.T).split([y.shape[1] for y in references], 1)
        return torch.stack([self._weighted(y - vu, norm) for y, vu in zip(references, products, strict=True)])

    def _weighted(self, difference: Tensor, norm: Norm) -> Tensor:
        per_token = difference.abs().sum(1) if norm == "l1" else difference.square().sum(1)
        return (self.w.double() * per_token).sum()
