"""Hidden states of every micro-batch: in host memory until a budget is spent, on disk beyond it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

GIB = 2**30


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in the file."""

    offset: int
    size: int
    shape: torch.Size
    dtype: torch.dtype


class HostMemory:
    """A budget of host memory that the activations of a process share, and the file that takes what exceeds it.

    The file has no name: the system takes its space back when the process ends, however it ends.

    Attributes:
        budget, used: bytes.
        spilled: bytes ever written to the file.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        """``folder`` takes the file; the system's folder for temporary files without it."""
        self.budget, self.used, self.spilled = budget, 0, 0
        self.folder = folder
        self._file: Any = None
        self._end = 0
        self._free: dict[int, list[int]] = {}

    def fits(self, size: int) -> bool:
        return self.used + size <= self.budget

    def spill(self, value: Tensor) -> _Slot:
        """Write a tensor to the file.

        Raises:
            OSError: the disk is full.
        """
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        if self._file is None:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
        free = self._free.get(data.nbytes)
        offset = free.pop() if free else self._end
        self._end = max(self._end, offset + data.nbytes)
        self._file.seek(offset)
        rest = data.data
        while rest:
            try:
                rest = rest[self._file.write(rest) :]
            except OSError as error:
                raise OSError(
                    f"{self.folder or tempfile.gettempdir()}: hidden states cannot be written ({error.strerror}); free "
                    "some space, or raise TLQ_HOST_MEMORY, and run the same command again"
                ) from error
        self.spilled += data.nbytes
        return _Slot(offset, data.nbytes, value.shape, value.dtype)

    def read(self, slot: _Slot) -> Tensor:
        data = torch.empty(slot.size, dtype=torch.uint8)
        rest = data.numpy().data
        self._file.seek(slot.offset)
        while rest:
            rest = rest[self._file.readinto(rest) :]
        return data.view(slot.dtype).view(slot.shape)

    def release(self, slot: _Slot) -> None:
        """Let another tensor of the same size take the place."""
        self._free.setdefault(slot.size, []).append(slot.offset)


def host_memory(folder: Path | None = None) -> HostMemory:
    """``TLQ_HOST_MEMORY`` (GiB a process), else half of what is free now, divided among the processes of this host.

    Args:
        folder: takes what exceeds it.
    """
    return HostMemory(host_budget(), folder)


def host_budget() -> int:
    """Bytes of host memory for the hidden states of this process."""
    return gib_of("TLQ_HOST_MEMORY", psutil.virtual_memory().available // 2 // processes_here())


def gib_of(variable: str, default: int) -> int:
    """Bytes that an environment variable states in GiB.

    Raises:
        ValueError: it is no number.
    """
    stated = os.environ.get(variable)
    try:
        return default if stated is None else int(float(stated) * GIB)
    except ValueError as error:
        raise ValueError(f"{variable} is {stated!r}, must be a number of GiB") from error


def processes_here() -> int:
    """How many ranks share this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Activations:
    """A list of tensors. What does not fit the host's budget lies on disk; reading gives it on the compute device."""

    def __init__(self, memory: HostMemory, device: torch.device, values: Iterable[Tensor] = ()) -> None:
        self._memory, self._device = memory, device
        self._places: list[Tensor | _Slot] = []
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Tensor:
        place = self._places[number]
        tensor = self._memory.read(place) if isinstance(place, _Slot) else place
        return tensor.to(self._device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[number] for number in range(len(self)))

    def append(self, value: Tensor) -> None:
        self._places.append(self._put(value))

    def __setitem__(self, number: int, value: Tensor) -> None:
        self._forget(self._places[number])
        self._places[number] = self._put(value)

    def clear(self) -> None:
        """Give back what these activations hold."""
        for place in self._places:
            self._forget(place)
        self._places.clear()

    def _put(self, value: Tensor) -> Tensor | _Slot:
        size = value.numel() * value.element_size()
        if not self._memory.fits(size):
            return self._memory.spill(value)
        self._memory.used += size
        return value.detach().cpu()

    def _forget(self, place: Tensor | _Slot) -> None:
        if isinstance(place, _Slot):
            self._memory.release(place)
        else:
            self._memory.used -= place.numel() * place.element_size()
