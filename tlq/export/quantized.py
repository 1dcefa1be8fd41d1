"""Read a quantized checkpoint in the compressed-tensors format back into codes, scales and zero-points."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from torch import Tensor

from tlq.models.reading import read_tensor
from tlq.models.stored import StoredTensor, TensorFile, read_json, stored_tensors
from tlq.quantization.formats import SCHEMES, QuantizedWeight, Scheme, WeightQuantizer

#: Ends of the names of a quantized weight's tensors. ``weight`` belongs to one only if a scale has the same base name.
PARTS = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
_GRID = ("weight_scale", "weight_zero_point")


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """A checkpoint whose linears are codes.

    Attributes:
        config: content of config.json.
        schemes: the number format of each quantized linear, by its stored name (without ``.weight``).
        others: every other tensor, by its stored name.
    """

    folder: Path
    config: dict[str, Any]
    schemes: dict[str, Scheme]
    others: dict[str, StoredTensor]
    _parts: dict[str, dict[str, StoredTensor]]

    @classmethod
    def open(cls, folder: Path) -> QuantizedCheckpoint:
        """Read the config and the forms of all tensors; codes stay on disk.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: it is not quantized with integers in the form of compressed-tensors, or is damaged.
        """
        groups = config_groups(folder)
        stored = stored_tensors(folder)
        bases = [key.removesuffix(".weight_scale") for key in stored if key.endswith(".weight_scale")]
        parts = {
            base: {part: stored[f"{base}.{part}"] for part in PARTS if f"{base}.{part}" in stored} for base in bases
        }
        ordered = next((key for key in stored if key.endswith(".weight_g_idx")), None)
        if ordered is not None:
            raise ValueError(
                f"{stored[ordered].file}: {ordered} reorders input channels (act-order), which is not supported; "
                "quantize again without it"
            )
        taken = {place.key for each in parts.values() for place in each.values()}
        return cls(
            folder,
            read_json(folder / "config.json"),
            {base: _scheme_of_linear(folder, base, groups) for base in bases},
            {key: place for key, place in stored.items() if key not in taken},
            parts,
        )

    @classmethod
    def in_full_precision(cls, folder: Path) -> QuantizedCheckpoint:
        """A checkpoint that is not quantized, to measure the others against in the same engine."""
        return cls(folder, read_json(folder / "config.json"), {}, stored_tensors(folder), {})

    def packed(self, name: str) -> PackedTensor:
        """The weight of a quantized linear as a tensor that is read from its codes."""
        parts = self._parts[name]
        place = parts["weight_scale"]
        scheme = self.schemes[name]
        return PackedTensor(place.file, f"{name}.weight", self.shape(name), place.dtype, scheme=scheme, parts=parts)

    def shape(self, name: str) -> tuple[int, int]:
        """Output and input channels of a quantized linear."""
        parts = self._parts[name]
        shape = parts["weight"].shape if "weight" in parts else read_tensor(parts["weight_shape"]).tolist()
        rows, columns = (int(size) for size in shape)
        return rows, columns

    def grid(self, name: str) -> tuple[Tensor, Tensor]:
        """Scale and zero-point [out, groups] of a quantized linear."""
        return unpacked_grid(self._read(name, _GRID), self.schemes[name])

    def weight(self, name: str) -> QuantizedWeight:
        """Codes, scale and zero-point of a quantized linear."""
        return unpacked(self._read(name, PARTS), self.schemes[name])

    def _read(self, name: str, wanted: Sequence[str]) -> dict[str, Tensor]:
        return {part: read_tensor(place) for part, place in self._parts[name].items() if part in wanted}


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A quantized weight [out, in] on disk, which is read as the weight that its codes represent.

    Attributes:
        dtype: of its scales.
        parts: places of its stored tensors, by ``PARTS``.
    """

    scheme: Scheme = field(kw_only=True)
    parts: Mapping[str, StoredTensor] = field(kw_only=True, compare=False)

    def read(self, opened: TensorFile) -> Tensor:
        """In the dtype in which engines compute: the scales' or, if activations are quantized too, float32."""
        tensors = {
            part: place.read(opened) if place.file == self.file else read_tensor(place)
            for part, place in self.parts.items()
        }
        weight = unpacked(tensors, self.scheme)
        dequantized = weight.dequantize(WeightQuantizer(self.scheme, weight.scale.dtype).compute_dtype)
        return dequantized if self.part is None else self.part_of(dequantized)

    @property
    def nbytes(self) -> int:
        return sum(place.nbytes for place in self.parts.values())


def unpacked(parts: Mapping[str, Tensor], scheme: Scheme) -> QuantizedWeight:
    """A weight from its stored tensors, by ``PARTS``."""
    codes = parts.get("weight")
    if codes is None:
        shape = torch.Size(parts["weight_shape"].tolist())
        codes = unpack_from_int32(parts["weight_packed"], scheme.weight_bits, shape)
    return QuantizedWeight(codes, *unpacked_grid(parts, scheme))


def unpacked_grid(parts: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero-point [out, groups] from the stored tensors of a weight."""
    scale = parts["weight_scale"]
    if scheme.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    return scale, unpack_from_int32(parts["weight_zero_point"], scheme.weight_bits, scale.shape, packed_dim=0)


def config_groups(checkpoint: Path) -> dict[str, Any]:
    """The groups of the quantization that a checkpoint's config states: what they target, and how.

    Raises:
        FileNotFoundError: it has no config.json.
        ValueError: it is not quantized in the form of compressed-tensors.
    """
    file = checkpoint / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not found; give the folder of a quantized checkpoint")
    stated = read_json(file).get("quantization_config")
    if not isinstance(stated, dict) or stated.get("quant_method") != "compressed-tensors":
        raise ValueError(
            f"{file}: names no quantization by compressed-tensors; give the folder of a quantized checkpoint"
        )
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"{file}: quantization_config has no config_groups; download it again")
    return groups


def schemes_of(checkpoint: Path) -> list[Scheme]:
    """The number formats of a compressed-tensors checkpoint, read from its config.

    Raises:
        FileNotFoundError, ValueError: see ``config_groups``, and where weights are no integers.
    """
    return list(dict.fromkeys(_scheme_of(checkpoint, group) for group in config_groups(checkpoint).values()))


def _scheme_of(checkpoint: Path, group: Any) -> Scheme:
    file = checkpoint / "config.json"
    try:
        weights, inputs = group["weights"], group.get("input_activations")
        if weights["type"] != "int":
            raise ValueError(f"{file}: has weights of type {weights['type']}; integers are known only")
        bits = inputs and inputs["num_bits"]
        own = Scheme("", weights["num_bits"], weights["group_size"], weights["symmetric"], bits)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: its config_groups cannot be read ({error!r}); download it again") from error
    known = sorted(
        (each for each in SCHEMES.values() if _form(each) == _form(own)),
        key=lambda each: each.group_size != own.group_size,
    )
    if known and known[0].group_size == own.group_size:
        return known[0]
    return replace(own, name=known[0].name if known else own.kind)


def _form(scheme: Scheme) -> tuple[int, bool, int | None]:
    return scheme.weight_bits, scheme.symmetric, scheme.activation_bits


def _scheme_of_linear(checkpoint: Path, name: str, groups: Mapping[str, Any]) -> Scheme:
    """The scheme of the group that names a linear; a group of the class ``Linear`` comes last."""

    def named(target: str) -> bool:
        return bool(re.match(target[3:], name)) if target.startswith("re:") else name.endswith(target)

    by_name = [group for group in groups.values() if any(named(target) for target in group.get("targets", ()))]
    by_class = [group for group in groups.values() if "Linear" in group.get("targets", ())]
    for group in (*by_name, *by_class):
        return _scheme_of(checkpoint, group)
    raise ValueError(f"{checkpoint / 'config.json'}: no config group names {name}; download it again")


def hub_name(name: str) -> str:
    """A stored name as the first checkpoints of the families have it: ``model.layers...`` and ``visual...``."""
    for prefix, short in (
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.", ""),
        ("model.visual.", "visual."),
    ):
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name
