"""A size budget: how large the quantized linears may be, and the schemes that share it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

_NAME = re.compile(r"mix(\d+(?:\.\d+)?)(gb)?")
_GIGABYTE = 10**9


@dataclass(frozen=True)
class Budget:
    """A limit on the size of a checkpoint.

    Attributes:
        amount: bits per weight of the quantized linears with their scales, or gigabytes (10^9 bytes) of all tensors.
        unit: unit of ``amount``.
    """

    amount: float
    unit: Literal["bits", "GB"] = "bits"

    @classmethod
    def of_name(cls, name: str) -> Budget | None:
        """The budget of a scheme's name: 3.5 bits of ``mix3.5``, 4.2 GB of ``mix4.2gb``; None for other names."""
        found = _NAME.fullmatch(name)
        return None if found is None else cls(float(found[1]), "GB" if found[2] else "bits")

    @property
    def name(self) -> str:
        """Name of the scheme."""
        return f"mix{self.amount:g}{'gb' if self.unit == 'GB' else ''}"

    def __str__(self) -> str:
        return f"{self.amount:g} {'GB' if self.unit == 'GB' else 'bits a weight'}"

    def bytes_for(self, weights: int, outside: int) -> int:
        """Bytes for the linears.

        Args:
            weights: number of weights of the linears.
            outside: bytes of all other tensors of the checkpoint.
        """
        if self.unit == "GB":
            return int(self.amount * _GIGABYTE) - outside
        return int(self.amount * weights / 8)

    def enlarged(self, size: int, weights: int, outside: int) -> Budget:
        """The smallest budget of two decimals in this unit that leaves ``size`` bytes for the linears."""
        hundredths = 800 * size / weights if self.unit == "bits" else (size + outside) / (_GIGABYTE / 100)
        return Budget(math.ceil(hundredths) / 100, self.unit)
