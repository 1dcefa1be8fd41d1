"""Write a checkpoint of 8-bit floating-point weights with 16 bits, so that it can be quantized.

Several models are published in FP8 only. Their format is plain: a weight is its 8-bit numbers times a scale for each
block of rows and columns (DeepSeek's and Qwen's, ``weight_scale_inv``), or for each row or the whole weight
(compressed-tensors, ``weight_scale``). The product in bfloat16 is what engines without FP8 kernels compute with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tlq.export.shards import index_shards, save_parts
from tlq.models.checkpoint import copy_processor_files, local_folder, without_custom_code
from tlq.models.reading import read_tensor
from tlq.models.stored import StoredTensor, read_json, stored_tensors
from tlq.runtime.files import check_new_folder, new_directory

#: Ends of the names of scales, after the name of the weight.
_SCALES = ("_scale_inv", "_scale")
_FLOAT8 = "F8_E4M3"


def dequantize(checkpoint: str | Path, out: str | Path) -> Path:
    """Write a checkpoint of 8-bit floating-point weights in bfloat16 into the folder ``out``.

    Args:
        checkpoint: directory or hub id.

    Raises:
        FileExistsError, NotADirectoryError: ``out`` is not empty, or cannot be a folder.
        FileNotFoundError: a file is missing.
        ValueError: the weights are in another form, or a scale is missing.
    """
    target = Path(out)
    check_new_folder(target)
    folder = local_folder(checkpoint)
    config = without_custom_code(read_json(folder / "config.json"))
    block = _block_of(folder, config.pop("quantization_config", None))
    stored = stored_tensors(folder)
    scales = _scales_of(stored)
    config.pop("torch_dtype", None)
    config["dtype"] = "bfloat16"
    with new_directory(target) as temporary:
        index_shards(temporary, save_parts(_tensors(stored, scales, block), temporary, "part"))
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_processor_files(folder, temporary)
    return target


def _block_of(folder: Path, quantization: object) -> tuple[int, int] | None:
    """Rows and columns of a block that shares a scale; None if the scales' own shapes say it.

    Raises:
        ValueError: the config states another form than floating-point numbers of 8 bits.
    """
    file = folder / "config.json"
    if not isinstance(quantization, dict):
        raise ValueError(f"{file}: states no quantization; give a checkpoint of FP8 weights, or quantize this one")
    method = quantization.get("quant_method")
    if method == "fp8":
        size = quantization.get("weight_block_size")
        if size is None:
            return None
        if isinstance(size, list) and len(size) == 2 and all(isinstance(each, int) and each > 0 for each in size):
            return size[0], size[1]
        raise ValueError(f"{file}: weight_block_size is {size!r}, must be two whole numbers; download it again")
    groups = quantization.get("config_groups")
    if method == "compressed-tensors" and isinstance(groups, dict) and groups:
        weights = [group["weights"] for group in groups.values() if isinstance(group, dict) and group.get("weights")]
        sizes = {tuple(each.get("block_structure") or ()) for each in weights}
        if len(sizes) == 1 and all((each.get("type"), each.get("num_bits")) == ("float", 8) for each in weights):
            size = sizes.pop()
            return (size[0], size[1]) if len(size) == 2 else None
    raise ValueError(
        f"{file}: is quantized with {method}, not in FP8 with plain scales; quantize the original, whose weights have "
        "16 or 32 bits"
    )


def _scales_of(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The scale of every 8-bit weight, by the weight's key.

    Raises:
        ValueError: a weight has no scale, or has 8 bits in another form.
    """
    scales = {}
    for key, place in stored.items():
        if not place.dtype.startswith(("F8", "I8", "U8")):
            continue
        names = [key + end for end in _SCALES if key + end in stored]
        if place.dtype != _FLOAT8 or not names:
            reason = f"is stored as {place.dtype}" if place.dtype != _FLOAT8 else "has no scale"
            raise ValueError(f"{place.file}: {key} {reason}; download the checkpoint again, or quantize the original")
        scales[key] = stored[names[0]]
    return scales


def _tensors(
    stored: Mapping[str, StoredTensor], scales: Mapping[str, StoredTensor], block: tuple[int, int] | None
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the result by its key: without scales, neither those of weights nor of activations."""
    dropped = {place.key for place in scales.values()}
    dropped |= {f"{key.removesuffix('.weight')}.input_scale" for key in scales}
    for key, place in stored.items():
        if key in scales:
            yield key, _product(place, scales[key], block)
        elif key not in dropped:
            yield key, read_tensor(place)


def _product(weight: StoredTensor, scale: StoredTensor, block: tuple[int, int] | None) -> Tensor:
    """A weight [..., out, in] in bfloat16; the product is computed in float32."""
    values, factor = read_tensor(weight).float(), read_tensor(scale).float()
    rows, columns = values.shape[-2:]
    if block is not None and factor.dim() == values.dim():
        factor = factor.repeat_interleave(block[0], -2)[..., :rows, :]
        factor = factor.repeat_interleave(block[1], -1)[..., :columns]
    try:
        product = values * factor
    except RuntimeError as error:
        raise _mismatch(weight, scale) from error
    if product.shape != values.shape:
        raise _mismatch(weight, scale)
    return product.to(torch.bfloat16)


def _mismatch(weight: StoredTensor, scale: StoredTensor) -> ValueError:
    return ValueError(
        f"{scale.file}: {scale.key} has shape {list(scale.shape)}, which does not fit {list(weight.shape)} of "
        f"{weight.key}; download the checkpoint again"
    )
