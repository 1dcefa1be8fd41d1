"""Compensated rounding: GPTQ's error feedback (arXiv 2210.17323, algorithm 1), columns in blocks.

Rounding a column leaves an error that the columns not yet rounded can partly make up for. With the upper Cholesky
factor R of the inverse Hessian, rounding column j with error e_j = (w_j - q_j) / R_jj changes every later column k by
-e_j R_jk. Inside a block that is done column by column; the rest of the matrix is updated once per block. A block is
one quantization group, whose range is taken when its turn comes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tlq.quantizer import QuantizedWeight, Scheme, dequantize, quantize, weight_qparams

_BLOCK = 128


def round_compensated(target: Tensor, hessian: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Codes V that make tr((V - target) hessian (V - target)') small.

    Args:
        target: [out, in].
        hessian: [in, in], positive definite (see ``Statistics.shifted_target``).
    """
    return round_rows(target, inverse_factor(hessian), scheme, scale_dtype)


def round_rows(target: Tensor, factor: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Codes of some output rows, which do not depend on the other rows.

    Works on the transposed target: the values of one input channel then lie side by side in memory.

    Args:
        target: [rows, in].
        factor: [in, in], from ``inverse_factor``.
    """
    remaining = target.float().T.contiguous()
    block_size = scheme.group_size or _BLOCK
    whole_row = weight_qparams(target, scheme, scale_dtype) if scheme.group_size is None else None
    qparams = []
    blocks = []
    for start in range(0, len(remaining), block_size):
        columns = slice(start, min(start + block_size, len(remaining)))
        block = remaining[columns]
        scale, zero_point = whole_row or weight_qparams(block.T, scheme, scale_dtype)
        codes, errors = _round_block(block, factor[columns, columns], scale, zero_point, scheme.weight_bits)
        remaining[columns.stop :].addmm_(factor[columns, columns.stop :].T, errors, alpha=-1)
        blocks.append(codes.T)
        qparams.append((scale, zero_point))
    scales, zero_points = zip(*(qparams[:1] if whole_row else qparams), strict=True)
    return QuantizedWeight(torch.cat(blocks, 1), torch.cat(scales, 1), torch.cat(zero_points, 1))


def _round_block(block: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round ``block`` [columns, rows] column by column; returns its codes and the scaled errors, same shape."""
    codes = torch.empty(block.shape, dtype=torch.int8, device=block.device)
    errors = torch.empty_like(block)
    for column in range(len(block)):
        wanted = block[column][:, None]
        code = quantize(wanted, scale, zero_point, bits)
        codes[column] = code[:, 0]
        torch.div((wanted - dequantize(code, scale, zero_point))[:, 0], factor[column, column], out=errors[column])
        block[column + 1 :].addr_(factor[column, column + 1 :], errors[column], alpha=-1)
    return codes, errors


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular R with R' R = hessian^-1."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    return torch.linalg.cholesky(inverse, upper=True).float()
