"""A Triton kernel for the columns of a strip in compensated rounding, for NVIDIA GPUs.

Eager, a column takes four small operations, whose launches take longer than their arithmetic. The kernel rounds all
columns of a strip in one launch: a program takes some rows and goes through the columns in order. Its operations and
their order are those of the eager loop, without fused multiply-add, so that codes have the same bits.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's builds for CPUs come without it
    triton = None

logger = logging.getLogger(__name__)

#: Rows of a program: two values of a column for each thread of four warps.
_ROWS = 256


def available(device: torch.device) -> bool:
    """Whether the kernel runs on a device: on GPUs, and anywhere if Triton interprets its kernels."""
    if triton is None or not (device.type == "cuda" or triton.knobs.runtime.interpret):
        return False
    return _launches(device)


@cache
def _launches(device: torch.device) -> bool:
    """Whether a small launch succeeds: Triton needs a C compiler, which not every container has."""
    strip = torch.zeros(1, 2, 16, device=device)
    try:
        round_strip(strip, strip, torch.zeros(2, 2, device=device), strip.clone(), strip.clone(), (0, 1))
    except Exception as error:  # noqa: BLE001 (Triton raises many kinds, for instance where gcc is missing)
        logger.warning("Triton launches no kernel here (%s); rounding takes the slower eager loop", error)
        return False
    return True


def round_strip(
    block: Tensor, original: Tensor, upper: Tensor, codes: Tensor, errors: Tensor, bounds: tuple[int, int]
) -> None:
    """Round the columns of a strip in order, each with the feedback of those before it.

    All values are in units of the scales and relative to the zero-points.

    Args:
        block, original: [targets, columns, rows] float32, with the feedback of earlier strips and without it; the rows
            of a column are contiguous, and its columns lie one after the other.
        upper: U of the strip's columns [columns, columns].
        codes, errors: of the shape of ``block``; they are written.
        bounds: lowest and highest code.
    """
    targets, columns, rows = block.shape
    grid = targets, triton.cdiv(rows, _ROWS)
    with torch.cuda.device(block.device) if block.is_cuda else nullcontext():  # Triton launches on the current device
        _round_strip[grid](
            *(block, original, upper, codes, errors),
            *(block.stride(0), original.stride(0), codes.stride(0), errors.stride(0), *upper.stride()),
            *(rows, *bounds),
            COLUMNS=columns,
            ROWS=_ROWS,
            enable_fp_fusion=False,
        )


def _kernel(
    block: tl.tensor,
    original: tl.tensor,
    upper: tl.tensor,
    codes: tl.tensor,
    errors: tl.tensor,
    block_step: tl.tensor,
    original_step: tl.tensor,
    codes_step: tl.tensor,
    errors_step: tl.tensor,
    upper_row: tl.tensor,
    upper_column: tl.tensor,
    rows: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    target = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    block += target * block_step + row
    original += target * original_step + row
    codes += target * codes_step + row
    errors += target * errors_step + row
    for column in tl.static_range(COLUMNS):
        value = tl.load(block + column * rows, mask=inside, other=0.0)
        for earlier in tl.static_range(column):
            weight = tl.load(upper + earlier * upper_row + column * upper_column)
            value = value - weight * tl.load(errors + earlier * rows, mask=inside, other=0.0)
        # 1.5 * 2**23: adding and subtracting it rounds a smaller float32 to the nearest integer, ties to even.
        nearest = tl.where(tl.abs(value) < 4194304.0, (value + 12582912.0) - 12582912.0, value)
        code = tl.minimum(tl.maximum(nearest, low), high)
        tl.store(codes + column * rows, code, mask=inside)
        tl.store(errors + column * rows, code - tl.load(original + column * rows, mask=inside, other=0.0), mask=inside)
        tl.debug_barrier()  # the next column reads these errors, perhaps in other threads


_round_strip: Any = None if triton is None else triton.jit(_kernel)
