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
    remaining = target.float().clone()
    factor = inverse_factor(hessian)
    block_size = scheme.group_size or _BLOCK
    whole_row = weight_qparams(remaining, scheme, scale_dtype) if scheme.group_size is None else None
    qparams = []
    blocks = []
    for start in range(0, target.shape[1], block_size):
        columns = slice(start, min(start + block_size, target.shape[1]))
        block = remaining[:, columns]
        scale, zero_point = whole_row or weight_qparams(block, scheme, scale_dtype)
        codes, errors = _round_block(block, factor[columns, columns], scale, zero_point, scheme.weight_bits)
        remaining[:, columns.stop :] -= errors @ factor[columns, columns.stop :]
        blocks.append(codes)
        qparams.append((scale, zero_point))
    scales, zero_points = zip(*(qparams[:1] if whole_row else qparams), strict=True)
    return QuantizedWeight(torch.cat(blocks, 1), torch.cat(scales, 1), torch.cat(zero_points, 1))


def _round_block(block: Tensor, factor: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round ``block`` [out, columns] from left to right; returns its codes and the scaled errors, same shape."""
    block = block.clone()
    codes = torch.empty(block.shape, dtype=torch.int8, device=block.device)
    errors = torch.empty_like(block)
    for column in range(block.shape[1]):
        here = slice(column, column + 1)
        codes[:, here] = quantize(block[:, here], scale, zero_point, bits)
        error = (block[:, here] - dequantize(codes[:, here], scale, zero_point)) / factor[column, column]
        errors[:, here] = error
        block[:, column + 1 :] -= error @ factor[here, column + 1 :]
    return codes, errors


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular R with R' R = hessian^-1."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    return torch.linalg.cholesky(inverse, upper=True).float()
