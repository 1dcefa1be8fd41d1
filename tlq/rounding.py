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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from tlq.quantizer import QuantizedWeight, Scheme, code_range, weight_qparams

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

    Rows do not depend on each other. Columns of all targets are rounded together, matrix products are taken for each
    target alone: so a target's codes are the same bits whichever others it is rounded with.

    Args:
        targets: [rows, in] each; turned on their side, so that the values of an input channel lie side by side.
        factor: of H [in, in] (see ``Statistics.factor``).
    """
    turned = [target.float().T for target in targets]
    lengths = [target.shape[1] for target in turned]
    wanted = torch.cat(turned, 1)
    del turned
    feedback = wanted.clone()
    rows = _slices(lengths)
    block_size = scheme.group_size or _BLOCK
    whole_row = weight_qparams(wanted.T, scheme, scale_dtype) if scheme.group_size is None else None
    qparams = []
    blocks = []
    for start in range(0, len(wanted), block_size):
        columns = slice(start, min(start + block_size, len(wanted)))
        upper = factor.upper[columns]
        inside = (feedback[columns], wanted[columns], upper[:, columns], rows)
        qparams.append(whole_row or weight_qparams(_ahead(*inside).T, scheme, scale_dtype))
        codes, errors = _round_block(*inside, *qparams[-1], scheme.weight_bits)
        _give_back(feedback[columns.stop :], upper[:, columns.stop :], errors, rows)
        blocks.append(codes.T)
    scales, zero_points = zip(*(qparams[:1] if whole_row else qparams), strict=True)
    together = QuantizedWeight(torch.cat(blocks, 1), torch.cat(scales, 1), torch.cat(zero_points, 1))
    return together.split(lengths)


def _slices(lengths: Sequence[int]) -> list[slice]:
    stops = list(accumulate(lengths))
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def _give_back(later: Tensor, upper: Tensor, errors: Tensor, rows: Sequence[slice]) -> None:
    """Let columns ``later`` make up for ``errors`` [columns, rows] of the columns before them."""
    for part in rows:
        later[:, part].addmm_(upper.T, errors[:, part], alpha=-1)


def _ahead(block: Tensor, wanted: Tensor, upper: Tensor, rows: Sequence[slice]) -> Tensor:
    """What a block would be if its columns could still take any value: the error so far made up for in full.

    The d of those columns that makes their (d U)_k vanish is that of a triangular system.
    """
    gap = block - wanted
    solved = [torch.linalg.solve_triangular(upper.T, gap[:, part], upper=False, unitriangular=True) for part in rows]
    return wanted + torch.cat(solved, 1)


def _round_block(
    block: Tensor,
    wanted: Tensor,
    upper: Tensor,
    rows: Sequence[slice],
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Round ``block`` [columns, rows], ``wanted`` with feedback, column by column; codes and V - W, same shape.

    In units of the rows' steps, from their zero-points: there the nearest code is the value rounded. One column takes
    four operations on few numbers: what they cost is to be started.
    """
    low, high = code_range(bits)
    step, offset = scale[:, 0].float(), zero_point[:, 0].float()
    block, wanted = (values.div(step).add_(offset) for values in (block, wanted))
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    for start in range(0, len(block), _STRIP):
        stop = min(start + _STRIP, len(block))
        for column in range(start, stop):
            code = torch.round(block[column], out=codes[column]).clamp_(low, high)
            error = torch.sub(code, wanted[column], out=errors[column])
            # not addr_: its last bits depend on where in the row a value stands
            block[column + 1 : stop].addcmul_(upper[column, column + 1 : stop, None], error, value=-1)
        _give_back(block[stop:], upper[start:stop, stop:], errors[start:stop], rows)
    return codes.to(torch.int8), errors.mul_(step)
