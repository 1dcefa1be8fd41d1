"""Carry a quantized checkpoint over into the container of another engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tlq.export.containers import CONTAINERS
from tlq.export.quantized import QuantizedCheckpoint
from tlq.runtime.files import check_new_folder, new_directory


def convert(checkpoint: str | Path, container: str, out: str | Path) -> list[Path]:
    """Write a quantized checkpoint as ``container`` into the folder ``out``; codes and scales are carried over exactly.

    Args:
        checkpoint: folder that ``quantize`` wrote, or another checkpoint of compressed-tensors with integer weights.

    Returns:
        What to give to the engine: ``model.gguf`` and ``mmproj.gguf``, or the folder.

    Raises:
        FileExistsError, NotADirectoryError: ``out`` is not empty, or cannot be a folder.
        ImportError: the package ``gguf`` is missing.
        ValueError: the container is unknown or cannot hold this checkpoint exactly; the message says why.
    """
    if container not in CONTAINERS:
        raise ValueError(f"unknown container {container!r}; choose one of {', '.join(CONTAINERS)}")
    folder = Path(out)
    check_new_folder(folder)
    if container == "gguf" and importlib.util.find_spec("gguf") is None:
        raise ImportError("a GGUF file is written by the package gguf, which is missing; pip install 'tlq[gguf]'")
    return write_container(QuantizedCheckpoint.open(Path(checkpoint)), container, folder)


def write_container(checkpoint: QuantizedCheckpoint, container: str, out: Path) -> list[Path]:
    """As ``convert``, of an open checkpoint."""
    with new_directory(out) as temporary:
        if container == "gguf":
            from tlq.export.gguf import write_gguf

            written = write_gguf(checkpoint, temporary)
        elif container == "mlx":
            from tlq.export.mlx import write_mlx

            written = write_mlx(checkpoint, temporary)
        else:
            from tlq.export.int8 import write_int8

            written = write_int8(checkpoint, temporary)
    return [out / path.relative_to(temporary) for path in written]
