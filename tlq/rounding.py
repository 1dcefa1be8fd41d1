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

from dataclasses import dataclass

import torch
from torch import Tensor

from tlq.quantizer import QuantizedWeight, Scheme, nearest_codes, values_of, weight_qparams

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


def round_compensated(target: Tensor, factor: Factor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Codes V that make tr((V - target) H (V - target)') small; rows do not depend on each other.

    Works on the transposed target: the values of one input channel then lie side by side in memory.

    Args:
        target: [rows, in].
        factor: of H [in, in] (see ``Statistics.factor``).
    """
    wanted = target.float().T.contiguous()
    feedback = wanted.clone()
    block_size = scheme.group_size or _BLOCK
    whole_row = weight_qparams(target, scheme, scale_dtype) if scheme.group_size is None else None
    qparams = []
    blocks = []
    for start in range(0, len(wanted), block_size):
        columns = slice(start, min(start + block_size, len(wanted)))
        block, upper = feedback[columns], factor.upper[columns]
        inside = (block, wanted[columns], upper[:, columns])
        qparams.append(whole_row or weight_qparams(_ahead(*inside).T, scheme, scale_dtype))
        codes, errors = _round_block(*inside, *qparams[-1], scheme.weight_bits)
        feedback[columns.stop :].addmm_(upper[:, columns.stop :].T, errors, alpha=-1)
        blocks.append(codes.T)
    scales, zero_points = zip(*(qparams[:1] if whole_row else qparams), strict=True)
    return QuantizedWeight(torch.cat(blocks, 1), torch.cat(scales, 1), torch.cat(zero_points, 1))


def _ahead(block: Tensor, wanted: Tensor, upper: Tensor) -> Tensor:
    """What a block would be if its columns could still take any value: the error so far made up for in full.

    The d of those columns that makes their (d U)_k vanish is that of a triangular system.
    """
    return wanted + torch.linalg.solve_triangular(upper.T, block - wanted, upper=False, unitriangular=True)


def _round_block(
    block: Tensor, wanted: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """Round ``block`` [columns, rows], ``wanted`` with feedback, column by column; codes and V - W, same shape."""
    codes, errors = torch.empty_like(block), torch.empty_like(block)
    step, offset = scale[:, 0].float(), zero_point[:, 0].float()
    for start in range(0, len(block), _STRIP):
        stop = min(start + _STRIP, len(block))
        for column in range(start, stop):
            codes[column] = nearest_codes(block[column], step, offset, bits)
            torch.sub(values_of(codes[column], step, offset), wanted[column], out=errors[column])
            block[column + 1 : stop].addr_(upper[column, column + 1 : stop], errors[column], alpha=-1)
        block[stop:].addmm_(upper[start:stop, stop:].T, errors[start:stop], alpha=-1)
    return codes.to(torch.int8), errors
