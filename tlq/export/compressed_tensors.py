"""Write a quantized checkpoint shard by shard in the compressed-tensors format.

Each decoder layer is one shard, written as soon as the layer is calibrated. The tensors outside the decoder layers
(embeddings, vision tower, connector, output embeddings) are written last. Tensors keep the names of the source
checkpoint, so a program that loads the source also loads the result.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
)
from safetensors import safe_open
from torch import Tensor

from tlq.export.quantized import PARTS, unpacked
from tlq.export.shards import index_shards, save_parts, save_shard
from tlq.models.architectures import Architecture, linear_paths
from tlq.models.checkpoint import copy_processor_files, without_custom_code
from tlq.models.reading import read_tensor
from tlq.models.streaming import StreamedModel
from tlq.quantization.formats import QuantizedWeight, Scheme, get_scheme
from tlq.runtime.files import link_or_copy

_TARGETS = "Linear"
#: Rows that are packed together: packing needs several times the memory of the codes.
_PACKED_ROWS = 1024


def write_layer(
    path: Path, model: StreamedModel, weights: dict[str, QuantizedWeight], others: dict[str, Tensor], scheme: Scheme
) -> None:
    """Write one decoder layer as a shard.

    Args:
        weights: quantized weights by module path.
        others: every other tensor of the layer, by its name in the module tree.

    Raises:
        ValueError: the dtype of the scales is not the checkpoint's.
    """
    if any(weight.scale.dtype != model.checkpoint_dtype for weight in weights.values()):
        raise ValueError(
            f"{model.folder!s} is stored in {model.checkpoint_dtype}, but the scales have another dtype; quantize with "
            "the dtype from checkpoint_dtype_of"
        )
    tensors: dict[str, Tensor] = {}
    for key, names in _by_key(model, others).items():
        first, *more = (_as_stored(model, name, others[name]) for name in names)
        joined, place = torch.cat([first, *more]) if more else first, model.weight_map[names[0]]
        tensors[key] = joined.t().contiguous() if place.is_joined and place.is_transposed else joined
    for key, names in _by_key(model, [f"{name}.weight" for name in weights]).items():
        linears = [name.removesuffix(".weight") for name in names]
        own = scheme.of(linears[0])
        assert own is not None
        for local, tensor in _packed(QuantizedWeight.stacked([weights[name] for name in linears]), own).items():
            tensors[f"{key.removesuffix('.weight')}.{local}"] = tensor
    save_shard(tensors, path)


def _by_key(model: StreamedModel, names: Iterable[str]) -> dict[str, list[str]]:
    """Names of tensors of the module tree by the key under which an export stores them, in the order of its rows."""
    by_key: dict[str, list[str]] = {}
    for name in names:
        by_key.setdefault(model.weight_map[name].name, []).append(name)
    return {key: sorted(parts, key=lambda name: model.weight_map[name].rows) for key, parts in by_key.items()}


def _as_stored(model: StreamedModel, name: str, tensor: Tensor) -> Tensor:
    """A tensor in host memory; one that has not changed is as wide as in the source checkpoint."""
    place, tensor = model.weight_map[name], tensor.cpu().contiguous()
    if place.dtype == "F32" and tensor.dtype != torch.float32:
        original = read_tensor(place)
        return original if torch.equal(original.to(tensor.dtype), tensor) else tensor
    return tensor


def read_layer(
    path: Path, model: StreamedModel, index: int, scheme: Scheme
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """Read the shard of decoder layer ``index``; returns ``weights`` and ``others`` of ``write_layer``."""
    weights, others = {}, {}
    linears = {f"{name}.weight": name for name in linear_paths(model.architecture, index)}
    with safe_open(path, "pt") as file:
        held = set(file.keys())
        for name in model.layer_names(index):
            own, place = scheme.of(linears[name]) if name in linears else None, model.weight_map[name]
            if own is None:
                tensor = file.get_tensor(place.name)
                others[name] = (place.part_of(tensor) if place.is_joined else tensor).clone()
                continue
            base = place.name.removesuffix(".weight")
            stored = {part: f"{base}.{part}" for part in PARTS if f"{base}.{part}" in held}
            weight = unpacked({part: file.get_tensor(key).clone() for part, key in stored.items()}, own)
            if place.is_joined:
                start, end = place.rows
                _, weight, _ = weight.split([start, end - start, len(weight.codes) - end])
            weights[linears[name]] = weight
    return weights, others


def _packed(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
    """Tensors of a linear in compressed-tensors format, by name within the linear.

    Its own compressor takes weights, computes their codes once more, and needs seven times the memory of a linear.
    """
    bits = scheme.weight_bits
    if _format(scheme) is CompressionFormat.int_quantized:
        tensors = {"weight": weight.codes, "weight_scale": weight.scale}
    else:
        packed = torch.cat([pack_to_int32(rows, bits) for rows in weight.codes.split(_PACKED_ROWS)])
        shape = torch.tensor(weight.codes.shape)
        tensors = {"weight_packed": packed, "weight_scale": weight.scale, "weight_shape": shape}
    if not scheme.symmetric:
        tensors["weight_zero_point"] = pack_to_int32(weight.zero_point, bits, packed_dim=0)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def finish_checkpoint(out: Path, layers: Iterable[Path], model: StreamedModel, scheme: Scheme) -> None:
    """Assemble a complete checkpoint in the empty directory ``out`` from the shards of all decoder layers.

    Args:
        layers: shards from ``write_layer``; they are linked, not moved.
    """
    shards = []
    for number, path in enumerate(layers):
        shards.append(out / f"layer-{number:05}.safetensors")
        link_or_copy(path, shards[-1])
    index_shards(out, [*shards, *save_parts(_outside_tensors(model), out, "outside")])
    config = without_custom_code(json.loads((model.folder / "config.json").read_text()))
    config.pop("torch_dtype", None)
    config["dtype"] = str(model.checkpoint_dtype).removeprefix("torch.")
    if model.untied:  # engines believe the config, transformers the weights
        for section in (config, *(each for each in config.values() if isinstance(each, dict))):
            if section is config or "tie_word_embeddings" in section:
                section["tie_word_embeddings"] = False
    elif any(name.endswith("lm_head.weight") for name in model.skeleton.all_tied_weights_keys):
        text = config.get("text_config", config)  # engines ask it where transformers asks the whole config
        if "tie_word_embeddings" in text:
            text["tie_word_embeddings"] = True
    (out / "config.json").write_text(json.dumps(config))
    copy_processor_files(model.folder, out)
    _write_quantization(out, model, scheme)


def _outside_tensors(model: StreamedModel) -> Iterator[tuple[str, Tensor]]:
    """Tensors of no decoder layer under their stored names.

    Tensors that the module tree does not name, or holds in another form, are carried over byte for byte, in the dtype
    in which they are stored.
    """
    places = {name: model.weight_map[name] for name in model.outside_names}
    as_they_are = {name: place for name, place in places.items() if place.originals != (place,)}
    by_key = {place.key: name for name, place in places.items() if name not in as_they_are}  # tied ones are stored once
    for key, name in by_key.items():
        yield key, model.read([name], model.checkpoint_dtype)[name].cpu()
    originals = [original for place in as_they_are.values() for original in place.originals]
    for key, place in {place.key: place for place in (*originals, *model.unnamed.values())}.items():
        yield key, read_tensor(place)


def _write_quantization(out: Path, model: StreamedModel, scheme: Scheme) -> None:
    """Write the quantization into config.json, with two corrections of what compressed-tensors 0.20 writes.

    The ignore list must hold module names. Asymmetric weights load only with ``dequantize``; symmetric ones are rounded
    to the checkpoint's dtype with it, as engines do. Schemes that quantize activations do not set it, because it drops
    that quantization.
    """
    layers = len(model.architecture.decoder_layers(model.skeleton))
    quantization = quantization_config(scheme, model.architecture, layers)
    quantization.ignore = [*(quantization.ignore or ()), *unnamed_modules(model)]
    ModelCompressor(quantization_config=quantization).update_config(str(out))
    path = out / "config.json"
    config = json.loads(path.read_text())
    if scheme.dequantized:
        config["quantization_config"]["dequantize"] = True
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def unnamed_modules(model: StreamedModel) -> list[str]:
    """Patterns of the modules that hold tensors which the module tree does not name: `re:.*mtp\\..*` for `mtp.*`.

    A pattern names the first module of a tensor's path that the tree lacks, with its parent if it is a number.
    """
    modules = {name for name, _ in model.skeleton.named_modules()}
    lacking = set()
    for name in model.unnamed:
        parts = name.split(".")
        depth = next((n for n in range(1, len(parts)) if ".".join(parts[:n]) not in modules), len(parts))
        first = 2 if depth > 1 and parts[depth - 1].isdigit() else 1
        lacking.add(".".join(parts[depth - first : depth]))
    return sorted(f"re:(.*\\.)?{re.escape(tail)}(\\..*)?$" for tail in lacking)


def quantization_config(scheme: Scheme, architecture: Architecture, layers: int) -> QuantizationConfig:
    """Translate the scheme into a compressed-tensors config, for a decoder of ``layers`` layers.

    Each scheme of an override becomes one config group, which lists its linears one by one, by the end of their paths,
    because inference engines put other prefixes before ``layers``. Without overrides the only group has all linears.
    The aliases of a linear group are listed with its linears.
    """
    kept = {f"re:.*{re.escape(path)}$": None for path in architecture.kept}
    own_patterns: dict[str, None] = {}
    others: dict[str, dict[str, None]] = {}
    for path, present in (pair for index in range(layers) for pair in _listed_paths(architecture, index)):
        own = scheme.of(present)
        pattern = _pattern(path.removeprefix(architecture.layers.removesuffix("layers")))
        if own is None:
            kept[pattern] = None
        elif replace(own, name=scheme.name) != replace(scheme, overrides=()):
            others.setdefault(own.name, {})[pattern] = None
        else:
            own_patterns[pattern] = None
    rows = {scheme: [_TARGETS]} if not others else {scheme: [*own_patterns]} if own_patterns else {}
    rows |= {get_scheme(name): [*patterns] for name, patterns in others.items()}
    groups = {f"group_{number}": _config_group(row, targets) for number, (row, targets) in enumerate(rows.items())}
    formats = {CompressionFormat(group.format) for group in groups.values()}
    return QuantizationConfig(
        config_groups=groups,
        ignore=[*architecture.ignore, *kept],
        format=formats.pop().value if len(formats) == 1 else CompressionFormat.mixed_precision.value,
        quantization_status=QuantizationStatus.COMPRESSED,
    )


def _listed_paths(architecture: Architecture, index: int) -> Iterator[tuple[str, str]]:
    """Paths of the linears of a decoder layer and of their aliases, each with the linear whose scheme it has."""
    prefix = f"{architecture.layers}.{index}."
    for group in architecture.groups[index]:
        yield from ((f"{prefix}{path}", f"{prefix}{path}") for path in group.linears)
        yield from ((f"{prefix}{path}", f"{prefix}{group.linears[0]}") for path in group.aliases)


def _pattern(path: str) -> str:
    """The pattern of a linear, or of the same linear of all experts of a layer, which have one scheme."""
    return "re:.*" + re.sub(r"(experts\\\.)[0-9]+", r"\1[0-9]+", re.escape(path)) + "$"


def _config_group(scheme: Scheme, targets: list[str]) -> QuantizationScheme:
    strategy = QuantizationStrategy.CHANNEL if scheme.group_size is None else QuantizationStrategy.GROUP
    weights = QuantizationArgs(
        num_bits=scheme.weight_bits,
        type=QuantizationType.INT,
        symmetric=scheme.symmetric,
        strategy=strategy,
        group_size=scheme.group_size,
    )
    activations = None
    if scheme.activation_bits is not None:
        activations = QuantizationArgs(
            num_bits=scheme.activation_bits,
            type=QuantizationType.INT,
            symmetric=True,
            strategy=QuantizationStrategy.TOKEN,
            dynamic=True,
        )
    group = QuantizationScheme(targets=targets, weights=weights, input_activations=activations)
    group.format = _format(scheme)
    return group


def _format(scheme: Scheme) -> CompressionFormat:
    """The layout of codes: bytes for W8A8, packed into 32-bit words for the others.

    compressed-tensors would choose bytes for W4A8 as well: twice the size, and vLLM 0.33 has no kernel for it on a GPU
    (https://github.com/vllm-project/vllm/issues/38064). Packed, vLLM runs it on its 4-bit kernels.
    """
    integer_kernels = scheme.weight_bits == 8 and scheme.activation_bits is not None
    return CompressionFormat.int_quantized if integer_kernels else CompressionFormat.pack_quantized
