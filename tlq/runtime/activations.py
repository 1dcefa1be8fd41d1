"""Hidden states of every micro-batch: in host memory up to a budget, on disk beyond it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlq.runtime.memory import host_budget


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in the file."""

    offset: int
    size: int
    shape: torch.Size
    dtype: torch.dtype


class HostMemory:
    """A budget of host memory that the activations of a process share, and a temporary file for the excess.

    The file has no name: the system frees its space when the process ends, even after a crash.

    Attributes:
        budget, used: bytes.
        spilled: total bytes written to the file.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        """The file is created in ``folder``, or in the system's folder for temporary files if there is none."""
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
        """Free the slot for another tensor of the same size."""
        self._free.setdefault(slot.size, []).append(slot.offset)


def host_memory(folder: Path | None = None) -> HostMemory:
    """The budget of ``tlq.runtime.memory.host_budget``.

    Args:
        folder: for the temporary file.
    """
    return HostMemory(host_budget(), folder)


class Activations:
    """A list of tensors in host memory or, beyond its budget, on disk; indexing returns them on the compute device."""

    def __init__(self, memory: HostMemory, device: torch.device, values: Iterable[Tensor] = ()) -> None:
        self._memory, self._device = memory, device
        self._places: list[Tensor | _Slot] = []
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        place = self._places[index]
        tensor = self._memory.read(place) if isinstance(place, _Slot) else place
        return tensor.to(self._device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def append(self, value: Tensor) -> None:
        self._places.append(self._put(value))

    def __setitem__(self, index: int, value: Tensor) -> None:
        self._forget(self._places[index])
        self._places[index] = self._put(value)

    def clear(self) -> None:
        """Release the memory and the slots of all tensors."""
        for place in self._places:
            self._forget(place)
        self._places.clear()

    close = clear

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
