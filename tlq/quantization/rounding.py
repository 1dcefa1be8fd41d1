"""Rounding: nearest, or compensated by GPTQ's error feedback (arXiv 2210.17323) with lazy batch updates.

With the Hessian factorised as H = U diag(p) U', U unit upper triangular, the error of rows d = V - W is the sum over
columns k of p_k ((d U)_k)^2, and (d U)_k depends on columns up to k only. So column k, after the columns before it, is
best rounded from w_k - sum_{j<k} d_j U_jk. This is GPTQ's error feedback with the same codes: its ``Hinv`` (the upper
Cholesky factor of H^-1) is diag(p)^-1/2 U^-1, and its ``Err`` of column k is -p_k^1/2 (d U)_k. No matrix is inverted
here.

Error feedback reaches later columns in three steps: column by column inside a strip of a few columns, once per strip
inside a block, and once per block for the rest of the matrix. These are GPTQ's lazy batch updates: one matrix product
in place of many small updates, which do not parallelise. A block is one quantization group, whose scale and zero-point
are computed from the columns with the feedback so far.

A new rounding is one class with the methods of ``Rounding`` and one row in ``ROUNDINGS``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tlq.parallel import Ranks
from tlq.quantization import kernels
from tlq.quantization.errors import LinearsError
from tlq.quantization.formats import QuantizedWeight, WeightQuantizer, code_range
from tlq.quantization.objective import Factor
from tlq.quantization.ranges import MINMAX, Ranges

logger = logging.getLogger(__name__)

_BLOCK = 128
_STRIP = 16
_LEAST_ROWS = 512
_ROW_PARTS = 8
_FLOAT = 4


@dataclass(frozen=True)
class Rounded:
    """Codes of V diag(s), and the damping used (None without a factorisation)."""

    weight: QuantizedWeight
    damping: float | None = None


class Rounding(Protocol):
    """A way to choose the codes of a linear group.

    Attributes:
        needs_data: whether the codes depend on calibration data.
        needs_statistics: whether the rounding needs the second moments of the group's inputs.
    """

    needs_data: bool
    needs_statistics: bool

    def bytes_needed(self, rows: int, in_features: int) -> int:
        """Memory in addition to the weight [rows, in_features], its inputs and the statistics."""
        ...

    def solve(self, error: LinearsError, s: Tensor, ranges: Ranges, damping: float) -> Rounded:
        """Codes of W diag(s), for the group whose weight and inputs ``error`` holds."""
        ...


class Nearest:
    """Round to nearest."""

    needs_data = False
    needs_statistics = False

    def bytes_needed(self, rows: int, in_features: int) -> int:
        return 0

    def solve(self, error: LinearsError, s: Tensor, ranges: Ranges, damping: float) -> Rounded:
        weight, quantizer = error.weight * s, error.quantizer
        moments = ranges.needs_data(quantizer.scheme)
        channels = error.inputs.second_moments() / s.square() if moments else None
        scale, zero_point = ranges.qparams(weight, quantizer, channels)
        return Rounded(QuantizedWeight(quantizer.quantize(weight, scale, zero_point), scale, zero_point))


class Compensated:
    """Error feedback towards W* (see ``Statistics.shifted_target``): GPTQ, and GPTAQ on exposed inputs."""

    needs_data = True
    needs_statistics = True

    def bytes_needed(self, rows: int, in_features: int) -> int:
        """The damped Hessian and its Cholesky factor."""
        return 2 * in_features * in_features * _FLOAT

    def solve(self, error: LinearsError, s: Tensor, ranges: Ranges, damping: float) -> Rounded:
        statistics, scales = error.statistics_for(s)
        factor, used = statistics.factor(damping, scales, keep=error.uses(statistics))
        if used > damping and error.inputs.ranks.leads:
            logger.warning("damping raised from %g to %g: the second moments are close to singular", damping, used)

        def target(rows: slice) -> Tensor:
            return statistics.shifted_target(error.weight[rows] * s, factor, rows, scales)

        rounded = round_on_ranks(target, error.weight.shape, factor, error.quantizer, ranges, error.inputs.ranks)
        return Rounded(rounded, used)


def round_on_ranks(
    target: Callable[[slice], Tensor],
    shape: torch.Size,
    factor: Factor,
    quantizer: WeightQuantizer,
    ranges: Ranges,
    ranks: Ranks,
) -> QuantizedWeight:
    """Round all output rows of a target [out, in] with error feedback; each rank rounds some of the rows.

    The rows are divided into equal parts whose number depends on ``shape`` alone. A rank rounds several of its parts
    together, up to as many rows as there are columns and at least one part; it holds two copies of them.

    Args:
        target: computes some rows of the target.
    """
    count = 1
    while count < _ROW_PARTS and shape[0] >= 2 * count * _LEAST_ROWS and shape[0] % (2 * count) == 0:
        count *= 2
    rows = shape[0] // count
    own = list(ranks.assigned(count))
    together = max(1, shape[1] // rows)
    rounded: dict[int, QuantizedWeight] = {}
    for start in range(0, len(own), together):
        numbers = own[start : start + together]
        targets = (target(slice(number * rows, (number + 1) * rows)) for number in numbers)
        rounded |= zip(numbers, round_compensated(targets, factor, quantizer, ranges), strict=True)
    parts = [rounded.get(number) or quantizer.empty(rows, shape[1], factor.upper.device) for number in range(count)]
    for number, part in enumerate(parts):
        for tensor in (part.codes, part.scale, part.zero_point):
            ranks.broadcast(tensor, ranks.owner(number))
    return QuantizedWeight.stacked(parts)


def round_compensated(
    targets: Iterable[Tensor], factor: Factor, quantizer: WeightQuantizer, ranges: Ranges = MINMAX
) -> list[QuantizedWeight]:
    """Round every target to codes V that make tr((V - target) H (V - target)') small.

    Rows do not depend on each other. A column of all targets is rounded at once, but matrix products are computed for
    each target separately, on its own memory, so a target's codes do not depend on the other targets, bit for bit.

    Args:
        targets: [rows, in] each, all of one shape; they are transposed here, so that the values of an input channel
            are contiguous.
        factor: factor of H [in, in] (see ``Statistics.factor``).
    """
    scheme = quantizer.scheme
    original = torch.stack([target.float().T for target in targets])
    updated = original.clone()
    count, width, rows = original.shape
    block_size = scheme.group_size or _BLOCK
    channels = _channel_weights(factor, ranges) if ranges.searched(scheme) else factor.pivots  # pivots are not read
    whole_row = ranges.qparams(_stacked(original), quantizer, channels) if scheme.group_size is None else None
    qparams = []
    blocks = []
    for start in range(0, width, block_size):
        columns = slice(start, min(start + block_size, width))
        upper = factor.upper[columns]
        block = (updated[:, columns], original[:, columns], upper[:, columns])
        qparams.append(
            whole_row or ranges.qparams(_stacked(_with_pending_feedback(*block)), quantizer, channels[columns])
        )
        codes, errors = _round_block(*block, *qparams[-1], scheme.weight_bits)
        _feed_back(updated[:, columns.stop :], upper[:, columns.stop :], errors)
        blocks.append(_stacked(codes))
    scales, zero_points = zip(*(qparams[:1] if whole_row else qparams), strict=True)
    together = QuantizedWeight(torch.cat(blocks, 1), torch.cat(scales, 1), torch.cat(zero_points, 1))
    return together.split([rows] * count)


def _channel_weights(factor: Factor, ranges: Ranges) -> Tensor:
    """Weights of the input channels [in] in the search for ranges."""
    if ranges.channels == "pivots":
        return factor.pivots
    if ranges.channels == "moments":
        return factor.diagonal()
    return torch.ones_like(factor.pivots)


def _stacked(values: Tensor) -> Tensor:
    """[targets, columns, rows] as [all rows, columns]."""
    return values.transpose(1, 2).flatten(0, 1)


def _feed_back(later: Tensor, upper: Tensor, errors: Tensor) -> None:
    """Lazy batch update: subtract from the columns ``later`` the feedback of ``errors`` [targets, columns, rows]."""
    for own, error in zip(later, errors, strict=True):
        own.addmm_(upper.T, error, alpha=-1)


def _with_pending_feedback(block: Tensor, original: Tensor, upper: Tensor) -> Tensor:
    """The block after all pending error feedback, as if its own columns were not rounded.

    The d of these columns for which (d U)_k = 0 solves a triangular system.
    """
    gaps = block - original
    solved = [torch.linalg.solve_triangular(upper.T, gap, upper=False, unitriangular=True) for gap in gaps]
    return original + torch.stack(solved)


def _round_block(
    block: Tensor, original: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Round ``block`` [targets, columns, rows], which is ``original`` with the feedback of earlier blocks.

    The computation is in units of the scales and relative to the zero-points, where the nearest code is the rounded
    value (a tie may round the other way than in ``nearest_codes``, with the same error).

    Returns:
        codes, and d = V - W, both of the shape of ``block``.
    """
    low, high = code_range(bits)
    step, offset = (values[:, 0].float().view(len(block), 1, -1) for values in (scale, zero_point))
    block, original = (values.div(step).add_(offset) for values in (block, original))
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    width = block.shape[1]
    round_strip = kernels.round_strip if kernels.available(block.device) else _round_strip
    for start in range(0, width, _STRIP):
        strip = slice(start, min(start + _STRIP, width))
        parts = (block[:, strip], original[:, strip], upper[strip, strip], codes[:, strip], errors[:, strip])
        round_strip(*parts, (low, high))
        _feed_back(block[:, strip.stop :], upper[strip, strip.stop :], errors[:, strip])
    return codes.to(torch.int8), errors.mul_(step)


def _round_strip(
    block: Tensor, original: Tensor, upper: Tensor, codes: Tensor, errors: Tensor, bounds: tuple[int, int]
) -> None:
    """``kernels.round_strip`` in eager operations; ``block`` is overwritten."""
    for column in range(block.shape[1]):
        code = torch.round(block[:, column], out=codes[:, column]).clamp_(*bounds)
        error = torch.sub(code, original[:, column], out=errors[:, column])
        # not addr_, whose last bits depend on the position of a value in its row
        block[:, column + 1 :].addcmul_(upper[column, column + 1 :, None], error[:, None], value=-1)


#: Roundings by the name that ``Recipe.rounding`` gives them.
ROUNDINGS: dict[str, Rounding] = {"nearest": Nearest(), "compensated": Compensated()}
