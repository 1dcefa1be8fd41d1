"""The safetensors files of a checkpoint: parts of a bounded size, and the index over them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tlq.runtime.files import new_file

_SHARD_BYTES = 2 * 2**30


def save_shard(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors into one file."""
    with new_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})


def save_parts(tensors: Iterable[tuple[str, Tensor]], out: Path, prefix: str) -> list[Path]:
    """Write named tensors into files of at most 2 GiB (or one tensor) each; returns the files."""
    paths = []
    for number, part in enumerate(_parts(tensors)):
        paths.append(out / f"{prefix}-{number:05}.safetensors")
        save_shard(part, paths[-1])
    return paths


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        needed = tensor.numel() * tensor.element_size()
        if part and size + needed > _SHARD_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += needed
    yield part


def index_shards(out: Path, shards: Sequence[Path]) -> None:
    """Give shards their final names, and write the index from tensor names to shards."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard.rename(out / name)
        with safe_open(out / name, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), name)
        total += (out / name).stat().st_size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
