"""Ranks: the processes that share one calibration, and sums that do not depend on how many there are.

Micro-batches belong to a fixed number of virtual shards. A rank works on whole shards, and what shards contribute is
added in the order of the shards: float addition depends on order, so this is what makes the quantized codes the same
bits for one rank, for eight, and for a group that was formed again after a crash.
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

#: Virtual shards; more ranks than these would have nothing to do.
SHARDS = 16

_TIMEOUT = timedelta(minutes=30)


def shard_ranges(batches: int) -> list[range]:
    """Micro-batches of every virtual shard: contiguous, as even as can be, empty ones left out."""
    shards = min(SHARDS, batches)
    edges = [number * batches // shards for number in range(shards + 1)] if shards else [0]
    return [range(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


@dataclass(frozen=True)
class Ranks:
    """This process's place in the group.

    Attributes:
        rank, size: this process's number, and how many there are.
        device: where this process computes.
        clock: what its time goes into.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    clock: Clock = field(default_factory=Clock)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    def own_shards(self, shards: int) -> range:
        """Numbers of the shards that this rank works on: contiguous, in order of rank."""
        return range(self.rank * shards // self.size, (self.rank + 1) * shards // self.size)

    def ordered_sum(self, parts: Iterable[Tensor], shape: Sequence[int]) -> Tensor:
        """Sum over all shards in their order, on every rank.

        Args:
            parts: contributions of this rank's shards, in order, each ``shape`` float32; taken one by one.
        """
        if self.size == 1:
            return _fold(None, parts, shape, self.device)
        # A rank behind the first computes its parts while it waits; they may be too many for the device.
        own: Iterable[Tensor] = parts if self.rank == 0 else [part.cpu() for part in parts]
        total = None
        if self.rank > 0:
            total = torch.empty(tuple(shape), device=self.device)
            with self.clock.phase("reduce"):
                dist.recv(total, self.rank - 1)
        total = _fold(total, own, shape, self.device)
        with self.clock.phase("reduce"):
            if self.rank < self.size - 1:
                dist.send(total, self.rank + 1)
            dist.broadcast(total, self.size - 1)
        return total

    def table(self, own: Sequence[Sequence[float]], shards: int) -> Tensor:
        """Rows with one value per shard, [rows, shards] float64, from those of this rank's shards."""
        columns = self.own_shards(shards)
        table = torch.zeros(len(own), shards, dtype=torch.float64)
        table[:, columns.start : columns.stop] = torch.tensor(own, dtype=torch.float64).view(len(own), len(columns))
        return self.all_reduce(table)  # one rank has a value, the others zero: exact

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum over ranks in no stated order: for what must be equal on all ranks, but may depend on their number."""
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
        """Which of ``count`` independent pieces of work are this rank's."""
        return iter(range(self.rank, count, self.size))

    def owner(self, number: int) -> int:
        """The rank that piece ``number`` was dealt to."""
        return number % self.size

    def broadcast(self, value: Tensor, owner: int) -> Tensor:
        """``value`` as rank ``owner`` has it, on every rank (in place)."""
        if self.size > 1:
            with self.clock.phase("reduce"):
                dist.broadcast(value, owner)
        return value

    def barrier(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            dist.barrier()


def _fold(total: Tensor | None, parts: Iterable[Tensor], shape: Sequence[int], device: torch.device) -> Tensor:
    for part in parts:
        total = part.to(device) if total is None else total.add_(part.to(device))
    return torch.zeros(tuple(shape), device=device) if total is None else total


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """This process's ranks from the environment that torch elastic sets; one rank alone without it.

    NCCL carries tensors of GPUs, Gloo those of the host.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks(device=device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
