"""Ranks: the processes that share one calibration, and sums that do not depend on the number of ranks.

Micro-batches are divided into a fixed number of reduction chunks. A rank works on whole chunks, and partial sums are
added in the order of the chunks. Float addition depends on order, so this fixed order makes the quantized codes
bit-identical for one rank, for eight ranks, and for a group of ranks that formed again after a crash.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tlq.runtime.clock import Clock

#: Number of chunks, in whose order partial sums are added; additional ranks would have no work.
REDUCTION_CHUNKS = 16

_TIMEOUT = timedelta(minutes=30)


def chunk_ranges(batches: int) -> list[range]:
    """Micro-batches of every reduction chunk: contiguous, not empty, with sizes that differ by at most one."""
    chunks = min(REDUCTION_CHUNKS, batches)
    edges = [chunk * batches // chunks for chunk in range(chunks + 1)] if chunks else [0]
    return [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


@dataclass(frozen=True)
class Ranks:
    """This process's place in the group.

    Attributes:
        rank, size: index of this process, and number of processes.
        device: compute device of this process.
        clock: seconds that this process spends in each phase.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    clock: Clock = field(default_factory=Clock)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def own_chunks(self, chunks: int) -> range:
        """Indices of the chunks that this rank works on: contiguous, in order of rank."""
        return range(self.rank * chunks // self.size, (self.rank + 1) * chunks // self.size)

    def ordered_sum(self, parts: Iterable[Tensor], shape: Sequence[int]) -> Tensor:
        """Sum over all chunks in their order, on every rank.

        Args:
            parts: partial sums of this rank's chunks, in order, each ``shape`` float32; consumed one by one.
        """
        if self.size == 1:
            return _add_up(None, parts, shape, self.device)
        # A rank after the first computes its parts while it waits; all of them at once may not fit on the device.
        own: Iterable[Tensor] = parts if self.rank == 0 else [part.cpu() for part in parts]
        total = None
        if self.rank > 0:
            total = torch.empty(tuple(shape), device=self.device)
            with self.clock.phase("reduce"):
                dist.recv(total, self.rank - 1)
        total = _add_up(total, own, shape, self.device)
        with self.clock.phase("reduce"):
            if self.rank < self.size - 1:
                dist.send(total, self.rank + 1)
            dist.broadcast(total, self.size - 1)
        return total

    def table(self, own: Sequence[Tensor], chunks: int) -> Tensor:
        """Rows with one value per chunk, [rows, chunks] float64 in host memory.

        Args:
            own: some rows each, float64, with the values of this rank's chunks; none if nothing was measured.
        """
        columns = self.own_chunks(chunks)
        values = torch.cat(list(own)).cpu() if own else torch.zeros(0, len(columns), dtype=torch.float64)
        table = torch.zeros(len(values), chunks, dtype=torch.float64)
        table[:, columns.start : columns.stop] = values
        return self.all_reduce(table)  # exact, because all ranks except one add zero

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum over ranks in no fixed order: equal on all ranks, but the last bits may depend on the number of ranks."""
        if self.size > 1:
            with self.clock.phase("reduce"):
                dist.all_reduce(value)
        return value

    def all_reduce_max(self, value: Tensor) -> Tensor:
        """Largest value over ranks, elementwise."""
        if self.size > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def assigned(self, count: int) -> Iterator[int]:
        """Indices of the work items, out of ``count`` independent ones, that this rank computes."""
        return iter(range(self.rank, count, self.size))

    def owner(self, number: int) -> int:
        """The rank that computes work item ``number``."""
        return number % self.size

    def broadcast(self, value: Tensor, owner: int) -> Tensor:
        """Broadcast ``value`` of rank ``owner`` to every rank, in place."""
        if self.size > 1:
            with self.clock.phase("reduce"):
                dist.broadcast(value, owner)
        return value

    def barrier(self) -> None:
        """Wait until every rank has reached the barrier."""
        if self.size > 1:
            dist.barrier()


def _add_up(total: Tensor | None, parts: Iterable[Tensor], shape: Sequence[int], device: torch.device) -> Tensor:
    for part in parts:
        total = part.to(device) if total is None else total.add_(part.to(device))
    return torch.zeros(tuple(shape), device=device) if total is None else total


@contextmanager
def joined_ranks(device: torch.device, store: dist.Store | None = None) -> Iterator[Ranks]:
    """Join the process group that torch elastic's environment describes; without that environment, be the only rank.

    The backend is NCCL for GPU tensors and Gloo for host tensors.

    Args:
        store: where the ranks of this group find each other; by default the store of rank 0, as torchrun sets it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks(device=device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if store is None:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, timeout=_TIMEOUT, store=store, rank=rank, world_size=size)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
