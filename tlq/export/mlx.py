"""Carry a quantized checkpoint over into the form of MLX, for Apple devices: the same codes, in MLX's affine groups.

MLX computes w = scale q + bias with q in 0..2**bits - 1, so bias = -scale (zero-point + 2**(bits - 1)). Its dtype is
float32 here, because 16 bits do not hold that product exactly; MLX then computes activations in float32 as well.
Codes lie one after the other from the lowest bit of a row of 32-bit words. Names and the other tensors stay as they
are: mlx-vlm reads the names of the hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlq.export.containers import MLX_FAMILIES, mlx_group
from tlq.export.quantized import QuantizedCheckpoint, hub_name
from tlq.export.shards import index_shards, save_parts
from tlq.models.checkpoint import copy_processor_files
from tlq.models.reading import read_tensor
from tlq.quantization.formats import QuantizedWeight

_PIECE = 2**26


def check_convertible(checkpoint: QuantizedCheckpoint) -> None:
    """Raise ValueError if mlx-vlm does not know the family, or MLX has no group for a weight. No weight is read."""
    family = str(checkpoint.config.get("model_type"))
    if family not in MLX_FAMILIES:
        raise ValueError(
            f"{checkpoint.folder}: model_type {family}: mlx-vlm does not load its conversion; convert one of "
            f"{', '.join(MLX_FAMILIES)}"
        )
    for name, scheme in checkpoint.schemes.items():
        mlx_group(scheme, checkpoint.shape(name)[1])


def write_mlx(checkpoint: QuantizedCheckpoint, out: Path) -> list[Path]:
    """Write a quantized checkpoint as mlx-vlm loads it into the empty folder ``out``.

    Raises:
        ValueError: see ``check_convertible``.
    """
    check_convertible(checkpoint)
    index_shards(out, save_parts(_tensors(checkpoint), out, "part"))
    config = _hub_config(checkpoint.config)
    if checkpoint.schemes:
        config["quantization"] = _quantization(checkpoint)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_processor_files(checkpoint.folder, out)
    return [out]


def _tensors(checkpoint: QuantizedCheckpoint) -> Iterator[tuple[str, Tensor]]:
    for name, scheme in checkpoint.schemes.items():
        weight = checkpoint.weight(name)
        per_group = weight.codes.shape[1] // mlx_group(scheme, weight.codes.shape[1]) // weight.scale.shape[1]
        yield f"{name}.weight", packed(weight, scheme.weight_bits)
        for local, values in zip(("scales", "biases"), affine(weight, scheme.weight_bits), strict=True):
            yield f"{name}.{local}", values.repeat_interleave(per_group, 1)
    for key, place in checkpoint.others.items():
        yield key, read_tensor(place)


def packed(weight: QuantizedWeight, bits: int) -> Tensor:
    """Codes [out, in] as MLX packs them: uint32 [out, in * bits / 32]."""
    rows, columns = weight.codes.shape
    words = []
    for piece in (weight.codes.int() + 2 ** (bits - 1)).to(torch.uint8).split(max(1, _PIECE // columns)):
        planes = np.unpackbits(piece.numpy()[..., None], axis=-1, count=bits, bitorder="little")
        words.append(np.packbits(planes.reshape(len(piece), -1), axis=-1, bitorder="little").view(np.uint32))
    return torch.from_numpy(np.concatenate(words).reshape(rows, -1))


def affine(weight: QuantizedWeight, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and bias [out, groups] in float32, exact."""
    scale = weight.scale.float()
    return scale, -scale * (weight.zero_point.float() + 2 ** (bits - 1))


def _hub_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config as mlx-vlm reads it: the decoder of Qwen2-VL at its top level, rotary embeddings as transformers 4."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    text = dict(config.get("text_config", config))
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope:
        text["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.get("rope_type", "default")
        if "mrope_section" in rope or rope["type"] != "default":
            text["rope_scaling"] = rope
    if "vision_config" in config and "qwen" in config["model_type"]:
        config["vision_config"] = {**config["vision_config"], "model_type": config["model_type"]}
    if config["model_type"] in ("qwen2_vl", "qwen2_5_vl"):
        return {**text, **config}
    return {**config, "text_config": text}


def _quantization(checkpoint: QuantizedCheckpoint) -> dict[str, Any]:
    """What most linears have, and the linears that have something else by their path in mlx-vlm's modules."""
    rows = {
        name: {"group_size": mlx_group(scheme, checkpoint.shape(name)[1]), "bits": scheme.weight_bits}
        for name, scheme in checkpoint.schemes.items()
    }
    counted = list(rows.values())
    most = max(counted, key=counted.count)
    others = {f"language_model.{hub_name(name)}": row for name, row in rows.items() if row != most}
    return {**most, "mode": "affine", **others}
