"""W4A8 with a byte for each code: the layout that vLLM's kernels for Arm CPUs read, and no other engine needs.

The checkpoint stays one of compressed-tensors (format ``int-quantized``), at twice the size of its packed form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from compressed_tensors.config import CompressionFormat
from torch import Tensor

from tlq.export.quantized import QuantizedCheckpoint
from tlq.export.shards import index_shards, save_parts
from tlq.models.checkpoint import copy_processor_files
from tlq.models.reading import read_tensor


def check_convertible(checkpoint: QuantizedCheckpoint) -> None:
    """Raise ValueError if a weight has another form than symmetric codes with 8-bit activations."""
    for scheme in checkpoint.schemes.values():
        if scheme.activation_bits is None or not scheme.symmetric:
            raise ValueError(
                f"{scheme.name} keeps activations in 16 bits, for which packed codes are the only layout; convert a "
                "checkpoint of w4a8"
            )


def write_int8(checkpoint: QuantizedCheckpoint, out: Path) -> list[Path]:
    """Write a quantized checkpoint with codes as bytes into the empty folder ``out``.

    Raises:
        ValueError: see ``check_convertible``.
    """
    check_convertible(checkpoint)
    index_shards(out, save_parts(_tensors(checkpoint), out, "part"))
    config = json.loads(json.dumps(checkpoint.config))
    layout = CompressionFormat.int_quantized.value
    config["quantization_config"]["format"] = layout
    for group in config["quantization_config"]["config_groups"].values():
        group["format"] = layout
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_processor_files(checkpoint.folder, out)
    return [out]


def _tensors(checkpoint: QuantizedCheckpoint) -> Iterator[tuple[str, Tensor]]:
    for name in checkpoint.schemes:
        weight = checkpoint.weight(name)
        yield f"{name}.weight", weight.codes
        yield f"{name}.weight_scale", weight.scale
    for key, place in checkpoint.others.items():
        yield key, read_tensor(place)
