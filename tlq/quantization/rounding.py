"""Compensated rounding: GPTQ's error feedback (arXiv 2210.17323), columns in blocks.

Rounding a column leaves an error that the columns not yet rounded can partly make up for. With the Hessian in the
factors H = U diag(p) U', U unit upper triangular, the error of rows d = V - W is the sum over columns k of
p_k ((d U)_k)^2, and (d U)_k holds columns up to k only. So column k, given the ones before it, is best rounded from
w_k - sum_{j<k} d_j U_jk. These are the codes of GPTQ, which writes the same feedback with the Cholesky factor of the
inverse Hessian; nothing is inverted here.

Feedback is given column by column inside a strip of a few columns, once per strip inside a block, and once per block to
the rest of the matrix: matrix products in place of small updates, of which threads make nothing. A block is one
quantization group, whose range is taken when its turn comes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tlq.quantization.formats import QuantizedWeight, Scheme, code_range, weight_qparams

_BLOCK = 128
_STRIP = 16


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

        Read backwards, that is an upper one of the matrix itself.
        """
        upper = lower.flip(0, 1)
        diagonal = upper.diagonal().clone()
        return cls(upper.div_(diagonal), diagonal.square())

    def solve(self, rows: Tensor) -> Tensor:
        """rows H^-1, for rows [rows, in]."""
        half = torch.linalg.solve_triangular(self.upper.T, rows, upper=False, left=False, unitriangular=True)
        half /= self.pivots
        return torch.linalg.solve_triangular(self.upper, half, upper=True, left=False, unitriangular=True)


def round_compensated(
    targets: Iterable[Tensor], factor: Factor, scheme: Scheme, scale_dtype: torch.dtype
) -> list[QuantizedWeight]:
    """Codes V of every target that make tr((V - target) H (V - target)') small.

    Rows do not depend on each other. A column of all targets is rounded at once, matrix products are taken for each
    target alone, on memory of its own: so a target's codes are the same bits whichever others it is rounded with.

    Args:
        targets: [rows, in] each, all of one shape; they are turned on their side, so that the values of an input
            channel lie side by side.
        factor: of H [in, in] (see ``Statistics.factor``).
    """
    wanted = torch.stack([target.float().T for target in targets])
    feedback = wanted.clone()
    count, width, rows = wanted.shape
    block_size = scheme.group_size or _BLOCK
    whole_row = weight_qparams(_stacked(wanted), scheme, scale_dtype) if scheme.group_size is None else None
    qparams = []
    blocks = []
    for start in range(0, width, block_size):
        columns = slice(start, min(start + block_size, width))
        upper = factor.upper[columns]
        inside = (feedback[:, columns], wanted[:, columns], upper[:, columns])
        qparams.append(whole_row or weight_qparams(_stacked(_ahead(*inside)), scheme, scale_dtype))
        codes, errors = _round_block(*inside, *qparams[-1], scheme.weight_bits)
        _make_up(feedback[:, columns.stop :], upper[:, columns.stop :], errors)
        blocks.append(_stacked(codes))
    scales, zero_points = zip(*(qparams[:1] if whole_row else qparams), strict=True)
    together = QuantizedWeight(torch.cat(blocks, 1), torch.cat(scales, 1), torch.cat(zero_points, 1))
    return together.split([rows] * count)


def _stacked(values: Tensor) -> Tensor:
    """[targets, columns, rows] as [all rows, columns]."""
    return values.transpose(1, 2).flatten(0, 1)


def _make_up(later: Tensor, upper: Tensor, errors: Tensor) -> None:
    """Let the columns ``later`` of every target make up for ``errors`` [targets, columns, rows] before them."""
    for own, error in zip(later, errors, strict=True):
        own.addmm_(upper.T, error, alpha=-1)


def _ahead(block: Tensor, wanted: Tensor, upper: Tensor) -> Tensor:
    """What a block would be if its columns could still take any value: the error so far made up for in full.

    The d of those columns that makes their (d U)_k vanish is that of a triangular system.
    """
    gaps = block - wanted
    solved = [torch.linalg.solve_triangular(upper.T, gap, upper=False, unitriangular=True) for gap in gaps]
    return wanted + torch.stack(solved)


def _round_block(
    block: Tensor, wanted: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Round ``block`` [targets, columns, rows], ``wanted`` with feedback; codes and V - W, same shape.

    In units of the rows' steps, from their zero-points: there the nearest code is the value rounded (a tie may go the
    other way than in ``nearest_codes``, for the same error). A column takes four operations on few numbers, whose time
    is that of launching them.
    """
    low, high = code_range(bits)
    step, offset = (values[:, 0].float().view(len(block), 1, -1) for values in (scale, zero_point))
    block, wanted = (values.div(step).add_(offset) for values in (block, wanted))
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    width = block.shape[1]
    for start in range(0, width, _STRIP):
        stop = min(start + _STRIP, width)
        for column in range(start, stop):
            code = torch.round(block[:, column], out=codes[:, column]).clamp_(low, high)
            error = torch.sub(code, wanted[:, column], out=errors[:, column])
            # not addr_: its last bits depend on where in the row a value stands
            block[:, column + 1 : stop].addcmul_(upper[column, column + 1 : stop, None], error[:, None], value=-1)
        _make_up(block[:, stop:], upper[start:stop, stop:], errors[:, start:stop])
    return codes.to(torch.int8), errors.mul_(step)
