"""Stored tensors read in parts: what is mapped from a file counts as memory of the process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from tlq.models.stored import StoredTensor, TensorFile, open_tensors, refuse_non_finite, tensors_of

#: Bytes of a file that are mapped at once, or one row of a tensor.
MAPPED_BYTES = 2**26


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


def row_parts(place: StoredTensor, opened: TensorFile) -> Iterator[tuple[int, Tensor]]:
    """A tensor of an open file whole, or if it is large some rows at a time, each with the number of its first row."""
    if place.originals != (place,) or place.nbytes <= MAPPED_BYTES:  # a part or a stack is put together as a whole
        yield 0, place.read(opened)
        return
    rows = max(1, MAPPED_BYTES * place.shape[0] // place.nbytes)
    for start in range(0, place.shape[0], rows):
        with open_tensors(place.file) as again:  # closed, it is mapped no more
            yield start, place.read(again)[start : start + rows]


def copy_of(place: StoredTensor, opened: TensorFile, device: torch.device, floating: torch.dtype | None) -> Tensor:
    """A copy of a tensor from its open file.

    Args:
        floating: dtype of the copy of floating-point numbers; None keeps theirs, and others always keep their own.
    """
    parts = row_parts(place, opened)
    _, first = next(parts)
    dtype = floating if floating is not None and first.is_floating_point() else first.dtype
    if first.shape == torch.Size(place.shape):
        return first.to(device, dtype, copy=True)
    copy = torch.empty(place.shape, dtype=dtype, device=device)
    copy[: len(first)] = first
    del first
    for start, part in parts:
        copy[start : start + len(part)] = part
    return copy


def read_tensor(place: StoredTensor) -> Tensor:
    """A tensor as it is stored, in memory of its own."""
    with open_tensors(place.file) as opened:
        return copy_of(place, opened, torch.device("cpu"), None)


def check_finite(file: Path) -> None:
    """``refuse_non_finite`` for the tensors of a weight file: an export would contain them as they are."""
    for together in read_together(tensors_of(file).items()):
        with open_tensors(file) as opened:
            parts = ((key, part) for key, place in together for _, part in row_parts(place, opened))
            refuse_non_finite(parts, str(file))
