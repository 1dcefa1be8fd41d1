"""Carry a quantized checkpoint over into GGUF, the container of llama.cpp: the same codes, in GGUF's blocks.

A block is 32 weights with a float16 scale d (ggml's block_q4_0, block_q4_1, block_q8_0):

- Q4_0: w = d (q - 8), q in 0..15: symmetric 4 bits;
- Q4_1: w = d q + m, m a float16: asymmetric 4 bits, m = -d (zero-point + 8);
- Q8_0: w = d q, q in -127..127: symmetric 8 bits.

A group of 64 or 128 weights is two or four blocks with one scale. What a block cannot hold exactly is refused. Other
tensors become float16, vectors and position embeddings float32. The decoder is one file, the vision tower another
(``mmproj``), as llama.cpp loads them; names of tensors and keys come from the package ``gguf``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_TENSOR, TENSOR_NAMES, GGMLQuantizationType, GGUFWriter, VisionProjectorType
from torch import Tensor

from tlq.export.containers import BLOCK, NO_GGUF, gguf_block
from tlq.export.quantized import QuantizedCheckpoint, hub_name
from tlq.models.checkpoint import load_config
from tlq.models.processor import load_processor
from tlq.models.reading import read_tensor
from tlq.models.stored import StoredTensor, read_json
from tlq.quantization.formats import QuantizedWeight, Scheme

logger = logging.getLogger(__name__)

#: Pixels of an attention window of Qwen2.5-VL's vision tower, whatever the file says.
_WINDOW = 112
DECODER = "model.gguf"
VISION = "mmproj.gguf"


@dataclass(frozen=True)
class Mapping:
    """How llama.cpp knows a family.

    Attributes:
        fused_qkv: whether its vision tower keeps q, k and v in one tensor.
        interleaved: whether the axes of its rotary embeddings alternate from pair to pair of channels.
    """

    decoder: MODEL_ARCH
    projector: str
    fused_qkv: bool = False
    interleaved: bool = False


#: By the ``model_type`` of config.json: ``GGUF_FAMILIES``.
MAPPINGS: dict[str, Mapping] = {
    "qwen2_vl": Mapping(MODEL_ARCH.QWEN2VL, VisionProjectorType.QWEN2VL),
    "qwen2_5_vl": Mapping(MODEL_ARCH.QWEN2VL, VisionProjectorType.QWEN25VL),
    "qwen3_vl": Mapping(MODEL_ARCH.QWEN3VL, VisionProjectorType.QWEN3VL, fused_qkv=True, interleaved=True),
}

#: The regular expression by which Qwen's tokenizers split a text, which llama.cpp calls `qwen2`.
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Entry:
    """A tensor of a GGUF file, read when it is written."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of what ``read`` returns: bytes for blocks."""
        if self.type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            return self.shape
        return gguf.quant_shape_to_byte_shape(self.shape, self.type)

    @property
    def dtype(self) -> np.dtype[Any]:
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        return np.dtype(plain.get(self.type, np.uint8))


def block_type(scheme: Scheme) -> GGMLQuantizationType:
    """The type of block that holds the weights of a scheme. Raises ValueError as ``gguf_block``."""
    return GGMLQuantizationType[gguf_block(scheme)]


def blocks(weight: QuantizedWeight, type_: GGMLQuantizationType) -> np.ndarray:
    """The bytes of a weight [out, in] in blocks, uint8 [out, bytes of a row]."""
    rows, columns = weight.codes.shape
    per_group = columns // BLOCK // weight.scale.shape[1]
    codes = weight.codes.numpy().reshape(rows, -1, BLOCK)
    scale, offset = (
        values.repeat_interleave(per_group, 1).numpy() for values in _halves(weight.scale, weight.zero_point)
    )
    heads = [scale[..., None].view(np.uint8)]
    if type_ == GGMLQuantizationType.Q8_0:
        return np.concatenate([*heads, codes.view(np.uint8)], 2).reshape(rows, -1)
    if type_ == GGMLQuantizationType.Q4_1:
        heads.append(offset[..., None].view(np.uint8))
    low, high = np.split((codes + 8).astype(np.uint8), 2, 2)
    return np.concatenate([*heads, low | high << 4], 2).reshape(rows, -1)


def _halves(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """d and m of ``Q4_1`` as float16."""
    return scale.half(), (-scale.float() * (zero_point.float() + 8)).half()


def check_grid(name: str, scale: Tensor, zero_point: Tensor, type_: GGMLQuantizationType) -> None:
    """Raise ValueError if a float16 does not hold a scale, or the offset of an asymmetric group, exactly."""
    d, m = _halves(scale, zero_point)
    wrong = d.float() != scale.float()
    if type_ == GGMLQuantizationType.Q4_1:
        wrong |= m.float() != -scale.float() * (zero_point.float() + 8)
    if bool(wrong.any()):
        value = float(scale[wrong][0])
        raise ValueError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} groups have a scale or an offset that a float16, as GGUF "
            f"stores it, does not hold exactly (scale {value:.6g} is one); quantize with the scheme "
            f"{type_.name.lower()}, whose scales it holds"
        )


def check_convertible(checkpoint: QuantizedCheckpoint) -> Mapping:
    """How llama.cpp knows the checkpoint's family. No weight is read.

    Raises:
        ValueError: it does not, or GGUF has no block for one of its weights.
    """
    family = str(checkpoint.config.get("model_type"))
    if family not in MAPPINGS:
        reason = NO_GGUF.get(family, "no mapping to GGUF is known here")
        raise ValueError(
            f"{checkpoint.folder}: model_type {family}: {reason}; convert one of {', '.join(MAPPINGS)}, or serve the "
            "checkpoint as it is (`tlq engines` says where)"
        )
    for scheme in dict.fromkeys(checkpoint.schemes.values()):
        block_type(scheme)
    for name in checkpoint.schemes:
        _, columns = checkpoint.shape(name)
        if columns % BLOCK:
            raise ValueError(f"{name}: has {columns} input channels, no multiple of GGUF's {BLOCK}")
    return MAPPINGS[family]


def write_gguf(checkpoint: QuantizedCheckpoint, out: Path) -> list[Path]:
    """Write a quantized checkpoint as two files of llama.cpp into the empty folder ``out``: decoder and vision tower.

    Memory is that of the largest tensor.

    Raises:
        ValueError: see ``check_convertible``; a scale that float16 does not hold; a tokenizer that llama.cpp does not
            know; a tensor without a name in GGUF.
    """
    mapping = check_convertible(checkpoint)
    for name, scheme in checkpoint.schemes.items():
        check_grid(name, *checkpoint.grid(name), block_type(scheme))
    config = load_config(checkpoint.folder)
    decoder = GGUFWriter(out / DECODER, gguf.MODEL_ARCH_NAMES[mapping.decoder])
    _describe_decoder(decoder, mapping, config, checkpoint)
    _add_tokenizer(decoder, checkpoint.folder, config.get_text_config().vocab_size)
    vision = GGUFWriter(out / VISION, gguf.MODEL_ARCH_NAMES[MODEL_ARCH.MMPROJ])
    _describe_vision(vision, mapping, config, checkpoint.folder)
    _write(decoder, list(_decoder_entries(checkpoint, mapping, config)))
    _write(vision, list(_vision_entries(checkpoint, mapping, config.vision_config)))
    return [out / DECODER, out / VISION]


def _write(writer: GGUFWriter, entries: list[_Entry]) -> None:
    for entry in entries:
        size = int(np.prod(entry.stored_shape)) * entry.dtype.itemsize
        writer.add_tensor_info(entry.name, entry.stored_shape, entry.dtype, size, entry.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(entry.read())
    writer.close()


def _describe_decoder(writer: GGUFWriter, mapping: Mapping, config: Any, checkpoint: QuantizedCheckpoint) -> None:
    text = config.get_text_config()
    rope = text.rope_parameters
    writer.add_name(checkpoint.folder.resolve().name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(checkpoint))
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    if getattr(text, "head_dim", None):
        writer.add_key_length(text.head_dim)
        writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    sections = [int(each) for each in rope["mrope_section"]]
    if mapping.interleaved:
        sections = interleaved_sections(sections, text.head_dim // 2)
    writer.add_rope_dimension_sections([*sections, *[0] * (4 - len(sections))])
    deepstack = getattr(config.vision_config, "deepstack_visual_indexes", None)
    if deepstack is not None:
        writer.add_num_deepstack_layers(len(deepstack))


def interleaved_sections(sections: list[int], pairs: int) -> list[int]:
    """Rotary sections (time, height, width) that leave no pair of channels without a position in llama.cpp.

    Pair k belongs to axis k % 3 up to the end of the axis' section. transformers gives the pairs after the end to time;
    llama.cpp gives them to a fourth axis, whose position is always 0. Sections that reach the last pair are exact for
    text, whose three positions are equal; in an image such a pair, of the lowest frequencies, rotates by row or column.

    Args:
        pairs: half the width of a head.

    Raises:
        ValueError: an axis has more than one such pair, which an image would show.
    """
    reaching = [max(section, len(range(axis, pairs, 3))) for axis, section in enumerate(sections)]
    if any(new > old + 1 for new, old in zip(reaching[1:], sections[1:], strict=True)):
        raise ValueError(
            f"mrope_section is {sections} for {pairs} pairs of channels; llama.cpp has sections of about a third each"
        )
    return reaching


def _file_type(checkpoint: QuantizedCheckpoint) -> int:
    """What the file says that most of its weights are."""
    types = [block_type(scheme) for scheme in checkpoint.schemes.values()] or [GGMLQuantizationType.F16]
    return int(gguf.LlamaFileType[f"MOSTLY_{max(types, key=types.count).name}"])


def _add_tokenizer(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Tokens, merges, special tokens and the chat template.

    Raises:
        ValueError: the tokenizer does not split a text as Qwen's do.
    """
    file = folder / "tokenizer.json"
    stated = read_json(file)
    if stated.get("model", {}).get("type") != "BPE" or _QWEN2_SPLIT not in _splits(stated):
        raise ValueError(
            f"{file}: splits a text in another way than Qwen's tokenizers; llama.cpp would read other tokens"
        )
    tokens = {index: (token, gguf.TokenType.NORMAL) for token, index in stated["model"]["vocab"].items()}
    for added in stated.get("added_tokens", []):
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]] = (added["content"], kind)
    unused = [(f"[PAD{index}]", gguf.TokenType.UNUSED) for index in range(size)]
    listed = [tokens.get(index, unused[index]) for index in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([kind for _, kind in listed])
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=size)
    special.add_to_gguf(writer, quiet=True)
    writer.add_add_bos_token(False)


def _splits(tokenizer: dict[str, Any]) -> list[str]:
    """The regular expressions by which a tokenizer splits a text."""
    before = tokenizer.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers", [before])
    return [part["pattern"]["Regex"] for part in parts if "Regex" in (part.get("pattern") or {})]


def _decoder_entries(checkpoint: QuantizedCheckpoint, mapping: Mapping, config: Any) -> Iterator[_Entry]:
    names = gguf.get_tensor_name_map(mapping.decoder, config.get_text_config().num_hidden_layers)
    for base, scheme in checkpoint.schemes.items():
        name = _mapped(names, f"{hub_name(base)}.weight")
        type_ = block_type(scheme)
        yield _Entry(name, type_, checkpoint.shape(base), _blocks_reader(checkpoint, base, type_))
    for key, place in checkpoint.others.items():
        name = hub_name(key)
        if not name.startswith(("visual.", "mtp.")):
            yield _plain(_mapped(names, name), place)


def _blocks_reader(checkpoint: QuantizedCheckpoint, base: str, type_: GGMLQuantizationType) -> Callable[[], np.ndarray]:
    return lambda: blocks(checkpoint.weight(base), type_)


def _mapped(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ValueError(f"{name}: GGUF has no name for this tensor in this family")
    return str(found)


def _plain(name: str, place: StoredTensor, part: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> _Entry:
    """An unquantized tensor, or a part of one: float32 for vectors and positions, float16 for the others."""
    shape = tuple(part(torch.empty(place.shape, device="meta")).shape)
    whole = len(shape) == 1 or ".position_embd." in name
    dtype = torch.float32 if whole else torch.float16

    def read() -> np.ndarray:
        value = part(read_tensor(place)).to(dtype).contiguous()
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"{place.file}: {place.key} has values beyond the range of float16, which GGUF would store"
            )
        return value.numpy()

    return _Entry(name, GGMLQuantizationType.F32 if whole else GGMLQuantizationType.F16, shape, read)


def _describe_vision(writer: GGUFWriter, mapping: Mapping, config: Any, folder: Path) -> None:
    vision, text = config.vision_config, config.get_text_config()
    images = load_processor(folder).image_processor
    writer.add_name(folder.resolve().name)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16))
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(mapping.projector)
    writer.add_vision_projection_dim(text.hidden_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_spatial_merge_size(vision.spatial_merge_size)
    writer.add_vision_block_count(vision.depth)
    writer.add_vision_head_count(vision.num_heads)
    writer.add_vision_attention_layernorm_eps(1e-6)  # transformers has it in the code of all three families
    writer.add_vision_image_mean(images.image_mean)
    writer.add_vision_image_std(images.image_std)
    writer.add_vision_min_pixels(images.size["shortest_edge"])
    writer.add_vision_max_pixels(images.size["longest_edge"])
    if hasattr(vision, "embed_dim"):  # Qwen2-VL: hidden_size is the width after the projector
        width, inner = vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio)
    else:
        width, inner = vision.hidden_size, vision.intermediate_size
    writer.add_vision_embedding_length(width)
    writer.add_vision_feed_forward_length(inner)
    positions = getattr(vision, "num_position_embeddings", None)
    writer.add_vision_image_size(560 if positions is None else int(positions**0.5) * vision.patch_size)
    if mapping.projector == VisionProjectorType.QWEN25VL:
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(_full_attention_period(vision.fullatt_block_indexes))
        if vision.window_size != _WINDOW:
            raise ValueError(
                f"window_size is {vision.window_size}; llama.cpp attends in windows of {_WINDOW} pixels only"
            )
        writer.add_vision_window_size(vision.window_size)
    if mapping.projector == VisionProjectorType.QWEN3VL:
        writer.add_vision_use_gelu(True)
        deep = set(vision.deepstack_visual_indexes)
        writer.add_vision_is_deepstack_layers([index in deep for index in range(vision.depth)])


def _full_attention_period(full: list[int]) -> int:
    """Every how many blocks of the vision tower attend to the whole image, the only pattern that llama.cpp knows."""
    period = full[0] + 1
    if any(index != (number + 1) * period - 1 for number, index in enumerate(full)):
        raise ValueError(f"fullatt_block_indexes are {full}; llama.cpp knows evenly spaced ones only")
    return int(period)


def _vision_entries(checkpoint: QuantizedCheckpoint, mapping: Mapping, vision: Any) -> Iterator[_Entry]:
    names = gguf.get_tensor_name_map(MODEL_ARCH.MMPROJ, max(vision.depth, 3))  # the merger has a part 2
    for key, place in checkpoint.others.items():
        name = hub_name(key)
        if not name.startswith("visual."):
            continue
        if name == "visual.patch_embed.proj.weight":  # a convolution over two frames as two over one
            first = TENSOR_NAMES[MODEL_TENSOR.V_ENC_EMBD_PATCH] + ".weight"
            yield _plain(first, place, lambda kernel: kernel[:, :, 0])
            yield _plain(f"{first}.1", place, lambda kernel: kernel[:, :, 1])
        elif ".attn.qkv." in name and not mapping.fused_qkv:
            for number, letter in enumerate("qkv"):
                yield _plain(_mapped(names, name.replace("qkv", letter)), place, _third(number))
        else:
            yield _plain(_mapped(names, _qwen3_name(name, vision)), place)


def _third(number: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.chunk(3)[number]


def _qwen3_name(name: str, vision: Any) -> str:
    """The name of a tensor of Qwen3-VL's mergers as ``gguf`` knows it; other names as they are."""
    if name.startswith("visual.deepstack_merger_list."):
        number, rest = name.removeprefix("visual.deepstack_merger_list.").split(".", 1)
        return f"model.visual.deepstack_merger_list.{vision.deepstack_visual_indexes[int(number)]}.{rest}"
    for stated, known in (
        ("visual.merger.norm.", "visual.merger.ln_q."),
        ("visual.merger.linear_fc1.", "visual.merger.mlp.0."),
        ("visual.merger.linear_fc2.", "visual.merger.mlp.2."),
    ):
        name = name.replace(stated, known)
    return name
