"""Copies of stored tensors, read in parts: what is mapped from a file counts as memory of the process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from tlq.models.stored import StoredTensor, TensorFile, open_tensors

#: Bytes of a file that are mapped at once, or one row of a tensor.
MAPPED_BYTES = 2**28


def read_together(tensors: Iterable[tuple[str, StoredTensor]]) -> Iterator[list[tuple[str, StoredTensor]]]:
    """Tensors of a file in parts of ``MAPPED_BYTES``, or of one tensor."""
    together: list[tuple[str, StoredTensor]] = []
    size = 0
    for name, place in tensors:
        if together and size + place.nbytes > MAPPED_BYTES:
            yield together
            together, size = [], 0
        together.append((name, place))
        size += place.nbytes
    if together:
        yield together


def copy_of(
    place: StoredTensor, opened: TensorFile, device: torch.device, dtype_of: Callable[[Tensor], torch.dtype]
) -> Tensor:
    """A copy of a tensor from its open file, some rows at a time if it is large.

    Args:
        dtype_of: dtype of the copy of the stored tensor.
    """
    stored = place.read(opened)
    dtype = dtype_of(stored)
    if place.part is not None or place.nbytes <= MAPPED_BYTES:
        return stored.to(device, dtype, copy=True)
    copy = torch.empty(stored.shape, dtype=dtype, device=device)
    rows = max(1, MAPPED_BYTES * len(copy) // place.nbytes)
    for start in range(0, len(copy), rows):
        with open_tensors(place.file) as again:  # closed, it is mapped no more
            copy[start : start + rows] = place.read(again)[start : start + rows]
    return copy
