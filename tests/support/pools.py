"""Token pools from one array of marks per sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tlq.importance.pool import TokenPool


def pool_of(
    is_image: Sequence[NDArray[np.bool_]],
    is_answer: Sequence[NDArray[np.bool_]] | None = None,
    token_ids: Sequence[NDArray[np.int32]] | None = None,
) -> TokenPool:
    """A pool of samples with these marks; without ``is_answer`` no token is an answer's, without ids all are 0."""
    lengths = [len(marks) for marks in is_image]
    return TokenPool(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.zeros(sum(lengths), np.int32) if token_ids is None else np.concatenate(token_ids),
        np.concatenate(is_image),
        np.zeros(sum(lengths), np.bool_) if is_answer is None else np.concatenate(is_answer),
    )
