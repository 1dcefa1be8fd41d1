"""The calibration objective E(V) = sum_t w_t ||W x_t - V u_t||^2 of a linear group.

W [out, in] is the full-precision weight, x_t the full-precision input, u_t the quantization-exposed input, w_t the
token's importance. Two forms give the same number:

* ``Statistics``: with D = V - W,  E = tr(W F W') - 2 tr(W G D') + tr(D C D'),
  F = sum w (x-u)(x-u)', G = sum w (x-u) u', C = sum w u u'. Three [in, in] matrices, additive over tokens; no search
  step touches a token again. It equals tr(W A W') - 2 tr(W B V') + tr(V C V') with A = sum w x x', B = sum w x u', but
  does not cancel when V is close to W.
* ``Tokens``: the sum itself. For fewer tokens than channels, other norms than L2, and quantized activations, which
  depend on the equalization scales.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tlq.quantizer import fake_quantize_activations
from tlq.ranks import Ranks

Norm = Literal["l1", "l2"]

_LEAST_DAMPING = 1e-6


@dataclass
class Statistics:
    """Weighted second moments of a group's inputs, each [in, in] float32.

    ``shift`` and ``cross`` are None where full-precision and exposed inputs are the same: they would be zero.
    """

    shift: Tensor | None
    cross: Tensor | None
    hessian: Tensor

    @classmethod
    def of(cls, x: Tensor, u: Tensor, w: Tensor) -> Statistics:
        """From full-precision inputs x [tokens, in], exposed inputs u [tokens, in], weights w [tokens]."""
        same = x is u
        u = u.float()
        weighted_u = u * w[:, None]
        hessian = weighted_u.T @ u
        if same:
            return cls(None, None, hessian)
        difference = x.float() - u
        return cls((difference * w[:, None]).T @ difference, difference.T @ weighted_u, hessian)

    @classmethod
    def added(cls, parts: Iterable[Statistics], in_features: int, same: bool, ranks: Ranks) -> Statistics:
        """The sum over all virtual shards, on every rank.

        Args:
            parts: of this rank's shards.
            same: whether full-precision and exposed inputs are the same.
        """
        shape = (1 if same else 3, in_features, in_features)
        total = ranks.ordered_sum((part.stacked() for part in parts), shape)
        return cls(None, None, total[0]) if same else cls(total[0], total[1], total[2])

    def stacked(self) -> Tensor:
        """All matrices as one tensor, [1 or 3, in, in]."""
        if self.shift is None or self.cross is None:
            return self.hessian[None]
        return torch.stack([self.shift, self.cross, self.hessian])

    def scaled(self, s: Tensor) -> Statistics:
        """Statistics of inputs divided by s [in]."""
        outer = 1 / (s[:, None] * s[None, :])
        shift = None if self.shift is None else self.shift * outer
        return Statistics(shift, None if self.cross is None else self.cross * outer, self.hessian * outer)

    def error(self, weight: Tensor, quantized: Tensor) -> float:
        """E(V) for W = ``weight`` and V = ``quantized``, both [out, in]."""
        return self.of_weight(weight).error(slice(None), quantized - weight)

    def of_weight(self, weight: Tensor) -> WeightError:
        """E(V) as a function of the rows of D = V - W, what does not depend on V computed once."""
        if self.shift is None or self.cross is None:
            return WeightError(None, None, self.hessian)
        exposure = (weight @ self.shift).mul_(weight).sum(1, dtype=torch.float64)
        return WeightError(exposure, weight @ self.cross, self.hessian)

    def shifted_target(self, weight: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
        """W* = W B C^-1, the full-precision weight that answers best to exposed inputs, and the damped C.

        E(V) = const + tr((V - W*) C (V - W*)'), so error feedback with target W* and Hessian C solves the exposed
        problem. With B = C + G:  W* = W + W G C^-1. Channels that no token excites get a unit diagonal.
        The damping grows tenfold until the factorisation succeeds.

        Returns:
            W* [out, in], the damped Hessian [in, in], and the damping used (a share of C's mean diagonal).
        """
        diagonal = self.hessian.diagonal()
        dead = diagonal == 0
        mean = float(diagonal.mean()) or 1.0
        while damping < 1e3:
            hessian = self.hessian.clone()
            hessian.diagonal().add_(damping * mean)
            hessian.diagonal()[dead] = mean
            factor, info = torch.linalg.cholesky_ex(hessian)
            if int(info) == 0:
                if self.cross is None:
                    return weight, hessian, damping
                correction = torch.cholesky_solve((weight @ self.cross).T, factor).T
                return weight + correction, hessian, damping
            damping = max(10 * damping, _LEAST_DAMPING)
        raise FloatingPointError(
            "the inputs' second moments cannot be factorised even with strong damping: they are not finite"
        )


@dataclass
class WeightError:
    """E(V) of one weight W by output rows: tr(W F W') [out] and W G [out, in], None where zero, and C [in, in]."""

    exposure: Tensor | None
    cross: Tensor | None
    hessian: Tensor

    def error(self, rows: Tensor | slice, change: Tensor) -> float:
        """The error of ``rows``, whose D = V - W is ``change`` [rows, in]."""
        total = (change @ self.hessian).mul_(change).sum(dtype=torch.float64)
        if self.exposure is not None and self.cross is not None:
            total = total + self.exposure[rows].sum() - 2 * (self.cross[rows] * change).sum(dtype=torch.float64)
        return float(total)


@dataclass
class Tokens:
    """The tokens themselves: reference output y [tokens, out], exposed inputs u [tokens, in], weights w [tokens]."""

    y: Tensor
    u: Tensor
    w: Tensor

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
        inputs = self.u.float() if s is None else self.u / s
        if activation_bits is not None:
            inputs = fake_quantize_activations(inputs, activation_bits)
        difference = self.y - inputs @ quantized.T
        per_token = difference.abs().sum(1) if norm == "l1" else difference.square().sum(1)
        return float((self.w.double() * per_token).sum())
