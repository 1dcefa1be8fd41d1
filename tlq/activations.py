"""Hidden states of every micro-batch: in host memory until a budget is spent, on disk beyond it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_GIB = 2**30


class HostMemory:
    """A budget of host memory that the activations of a process share, and the folder that takes what exceeds it."""

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        """``budget`` in bytes; ``folder`` defaults to a temporary one."""
        self.budget, self.used, self.spilled = budget, 0, 0
        self._temporary = tempfile.TemporaryDirectory(prefix="tlq-activations-", dir=folder)
        self._files = 0

    def fits(self, size: int) -> bool:
        return self.used + size <= self.budget

    def new_file(self) -> Path:
        self._files += 1
        return Path(self._temporary.name) / f"{self._files}.safetensors"


def host_memory() -> HostMemory:
    """``TLQ_HOST_MEMORY`` (GiB a process), else half of what is free now, divided among the processes of this host."""
    stated = os.environ.get("TLQ_HOST_MEMORY")
    if stated is not None:
        return HostMemory(int(float(stated) * _GIB))
    return HostMemory(psutil.virtual_memory().available // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class Activations:
    """A list of tensors. What does not fit the host's budget lies on disk; reading gives it on the compute device."""

    def __init__(self, memory: HostMemory, device: torch.device, values: Iterable[Tensor] = ()) -> None:
        self._memory, self._device = memory, device
        self._places: list[Tensor | Path] = []
        for value in values:
            self.append(value)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Tensor:
        place = self._places[number]
        tensor = load_file(place)["tensor"] if isinstance(place, Path) else place
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

    def _put(self, value: Tensor) -> Tensor | Path:
        size = value.numel() * value.element_size()
        if self._memory.fits(size):
            self._memory.used += size
            return value.detach().cpu()
        file = self._memory.new_file()
        save_file({"tensor": value.detach().cpu().contiguous()}, file)
        self._memory.spilled += size
        return file

    def _forget(self, place: Tensor | Path) -> None:
        if isinstance(place, Path):
            place.unlink()
        else:
            self._memory.used -= place.numel() * place.element_size()
