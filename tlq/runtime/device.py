"""Devices and dtypes by name."""

from __future__ import annotations

import torch

#: Dtypes that a model computes in.
DTYPES = ("float32", "bfloat16", "float16")


def device_named(name: str | torch.device, where: str) -> torch.device:
    """The device called ``name``.

    Args:
        where: the parameter or variable that names it, for the message.

    Raises:
        ValueError: no such device, or this machine has none of its kind.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{where}: {name!r} is no device; use cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"{where} is {name}, this machine has {count} usable GPUs; use cpu, or check `nvidia-smi`")
    return device


def check_dtype(dtype: str | torch.dtype) -> None:
    """Raises ValueError if a model cannot compute in ``dtype``; `auto` is the checkpoint's."""
    if isinstance(dtype, str) and dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype {dtype!r}: choose one of auto, {', '.join(DTYPES)}")
