"""The calibration objective E(V) = sum_t w_t ||W x_t - V u_t||^2 of a linear group.

W [out, in] is the full-precision weight, x_t the full-precision input, u_t the quantization-exposed input, w_t the
token's importance. Two forms give the same number:

* ``Statistics``: with D = V - W,  E = sum w ||W (x-u)||^2 - 2 tr(W G D') + tr(D C D'),
  G = sum w (x-u) u', C = sum w u u'. What does not depend on V is additive over tokens; no search step touches a token
  again. It equals tr(W A W') - 2 tr(W B V') + tr(V C V') with A = sum w x x', B = sum w x u', but does not cancel when
  V is close to W. W G is kept in G's place: the error and the target of compensated rounding need no more.
* ``Tokens``: the sum itself. For fewer tokens than channels, other norms than L2, and quantized activations, which
  depend on the equalization scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tlq.parallel import Ranks
from tlq.quantization.formats import fake_quantize_activations
from tlq.quantization.rounding import Factor

Norm = Literal["l1", "l2"]

_LEAST_DAMPING = 1e-6
_BLOCK_ROWS = 512


@dataclass
class ShardInputs:
    """Inputs of one linear group at the tokens that count, from one virtual shard.

    Attributes:
        x: [tokens, in], inputs that the target is computed from.
        u: [tokens, in], inputs of the quantized linear; the same tensor as ``x`` where the paths are one.
        w: [tokens] float32, weights.
    """

    x: Tensor
    u: Tensor
    w: Tensor


@dataclass
class Statistics:
    """E(V) of one weight W by output rows.

    ``exposure`` and ``cross`` are None where full-precision and exposed inputs are the same: they would be zero.

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
        """From W [out, in], full-precision inputs x [tokens, in], exposed inputs u [tokens, in], weights w [tokens]."""
        return cls.added(weight, [ShardInputs(x, u, w)], x is u, Ranks(device=weight.device))

    @classmethod
    def added(cls, weight: Tensor, own: Sequence[ShardInputs], same: bool, ranks: Ranks) -> Statistics:
        """The sum over all virtual shards, on every rank.

        A few rows at a time, so that what shards contribute never takes much memory beside the sum.

        Args:
            own: inputs of this rank's shards.
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

    def errors(self, changes: Sequence[tuple[slice, Tensor]]) -> list[float]:
        """Errors of some output rows, of each pair (rows, their D = V - W [rows, in]).

        All go through C together: a few rows alone do not keep a processor busy. Of C, which is symmetric, the blocks
        above the diagonal count twice and those below are left out.
        """
        stacked = torch.cat([change for _, change in changes])
        products = torch.zeros(len(stacked), dtype=torch.float64, device=stacked.device)
        for block in _row_blocks(len(self.hessian)):
            above = (stacked[:, block] @ self.hessian[block, block.start :]).mul_(stacked[:, block.start :])
            width = block.stop - block.start
            products += above[:, :width].sum(1) + 2 * above[:, width:].sum(1)
        found = []
        for (rows, change), squares in zip(changes, products.split([len(each) for _, each in changes]), strict=True):
            total = squares.sum()
            if self.exposure is not None and self.cross is not None:
                linear = (self.cross[rows] * change).sum(dtype=torch.float64)
                total = total + self.exposure[rows].sum(dtype=torch.float64) - 2 * linear
            found.append(float(total))
        return found

    def factor(self, damping: float, s: Tensor | None = None, keep: bool = True) -> tuple[Factor, float]:
        """The damped C of inputs divided by s [in] in factors; the damping used, a share of its mean diagonal.

        Channels that no token excites get a unit diagonal. The damping grows tenfold until the factorisation succeeds.

        Args:
            keep: whether C is needed after this. If not it is given up, so that of the widest group's matrices, of
                gigabytes each at 72B, no more than two are in memory.

        Raises:
            FloatingPointError: it never does.
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
        """W* = W B C^-1, the full-precision weight that answers best to exposed inputs; rows of it.

        E(V) = const + tr((V - W*) C (V - W*)'), so error feedback with target W* and Hessian C solves the exposed
        problem. With B = C + G:  W* = W + W G C^-1.

        Args:
            weight: W diag(s) [rows, in], its rows ``rows``.
            factor: of the damped C of inputs divided by s.
        """
        if self.cross is None:
            return weight
        cross = self.cross[rows]
        return weight + factor.solve(cross if s is None else cross / s)


def _second_moments(own: Sequence[ShardInputs], in_features: int, ranks: Ranks) -> Tensor:
    """C = sum w u u' [in, in] over all shards; its lower half is the mirrored upper one."""
    total = torch.empty(in_features, in_features, device=ranks.device)
    for rows in _row_blocks(in_features):
        parts = ((part.u[:, rows] * part.w[:, None]).T @ part.u[:, rows.start :].float() for part in own)
        shape = (rows.stop - rows.start, in_features - rows.start)
        total[rows, rows.start :] = ranks.ordered_sum(parts, shape)
        total[rows.stop :, rows] = total[rows, rows.stop :].T
    return total


def _row_blocks(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK_ROWS, rows)) for start in range(0, rows, _BLOCK_ROWS))


@dataclass
class Tokens:
    """The tokens themselves: reference output y [tokens, out], exposed inputs u [tokens, in], weights w [tokens]."""

    y: Tensor
    u: Tensor
    w: Tensor

    def of_rows(self, rows: slice) -> Tokens:
        """The same tokens for a part of the output channels."""
        return Tokens(self.y[:, rows], self.u, self.w)

    def error(
        self,
        quantized: Tensor,
        s: Tensor | None = None,
        activation_bits: int | None = None,
        norm: Norm = "l2",
    ) -> float:
        """sum_t w_t |y_t - V u_t| in the given norm.

        Args:
            quantized: V [out, in], or V diag(s) when ``s`` [in] is given, whose inputs are then u / s, quantized to
                ``activation_bits``.
        """
        inputs = self.u.float()
        if activation_bits is not None:
            inputs = fake_quantize_activations(inputs if s is None else inputs / s, activation_bits)
        elif s is not None:
            quantized = quantized / s  # the same product, and the smaller of the two
        return self._weighted(self.y - inputs @ quantized.T, norm)

    def errors(self, parts: Sequence[tuple[slice, Tensor]], norm: Norm = "l2") -> list[float]:
        """The error of some output rows alone, of each pair (rows, their V [rows, in]), all in one product."""
        products = self.u.float() @ torch.cat([quantized for _, quantized in parts]).T
        by_part = products.split([len(quantized) for _, quantized in parts], 1)
        return [
            self._weighted(self.y[:, rows] - product, norm) for (rows, _), product in zip(parts, by_part, strict=True)
        ]

    def _weighted(self, difference: Tensor, norm: Norm) -> float:
        per_token = difference.abs().sum(1) if norm == "l1" else difference.square().sum(1)
        return float((self.w.double() * per_token).sum())
