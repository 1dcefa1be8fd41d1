"""Checkpoints with random weights for measurements, written layer by layer, and demo samples for their calibration.

The architecture is Qwen2-VL's or another family's, and the processor is the demo model's: time and memory depend on
shapes, not on the values of weights.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2VLConfig

from demo.make import calibration_rows
from tlq.inputs.chat import IMAGE_MARK
from tlq.models.architectures import architecture_of
from tlq.models.checkpoint import copy_processor_files
from tlq.samples import Sample

MODEL = Path("data/demo/model")

_DEVIATION = 0.02
_ROTARY_SECTIONS = {64: [3, 5, 24], 128: [16, 24, 24]}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2-VL: of its decoder, its vocabulary, and its vision tower.

    Attributes:
        heads, key_value_heads: number of attention heads; a head has 64 or 128 channels.
        pixels: largest area of a picture; larger pictures are scaled down.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int = 512
    vision_depth: int = 3
    vision_width: int = 192
    vision_heads: int = 4
    patch: int = 8
    pixels: int = 256 * 256

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def __str__(self) -> str:
        return f"Qwen2-VL's architecture, hidden size {self.hidden} and intermediate size {self.intermediate}"

    def config(self) -> Any:
        """The config of the model."""
        config: Any = Qwen2VLConfig.from_pretrained(MODEL)
        text, vision = config.text_config, config.vision_config
        text.vocab_size = self.vocabulary
        text.hidden_size, text.intermediate_size, text.num_hidden_layers = self.hidden, self.intermediate, self.layers
        text.num_attention_heads, text.num_key_value_heads = self.heads, self.key_value_heads
        text.layer_types = ["full_attention"] * self.layers
        text.rope_parameters = {**text.rope_parameters, "mrope_section": _ROTARY_SECTIONS[self.head_dim]}
        text.max_position_embeddings = 32768
        vision.depth, vision.embed_dim, vision.num_heads = self.vision_depth, self.vision_width, self.vision_heads
        vision.patch_size, vision.hidden_size = self.patch, self.hidden
        return config


@dataclass(frozen=True)
class FamilyShape:
    """A model of another family: its config in the words of transformers, with the demo's tokens and picture size.

    Attributes:
        name: of the published model with these sizes.
        text: fields of the text config; ``layer_types`` repeats.
        vision: fields of the vision config.
    """

    name: str
    model_type: str
    layers: int
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    patch: int = 8
    pixels: int = 256 * 256

    def __str__(self) -> str:
        return f"the architecture and sizes of {self.name}"

    def config(self) -> Any:
        """The config of the model."""
        demo: Any = Qwen2VLConfig.from_pretrained(MODEL)
        kinds = self.text.get("layer_types")
        own = {} if kinds is None else {"layer_types": [kinds[number % len(kinds)] for number in range(self.layers)]}
        special = {
            name: getattr(demo, name)
            for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        }
        return AutoConfig.for_model(
            self.model_type,
            text_config={**self.text, **own, "num_hidden_layers": self.layers},
            vision_config={**self.vision, "patch_size": self.patch},
            **special,
        )


_REAL = {"vocabulary": 152064, "vision_depth": 32, "vision_width": 1280, "vision_heads": 16, "patch": 14}

_QWEN3_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
}

SHAPES: dict[str, Shape | FamilyShape] = {
    "tiny": Shape(128, 256, 2, heads=2, key_value_heads=1),
    "middle": Shape(1024, 4096, 8, heads=16, key_value_heads=4),
    "qwen2-vl-2b": Shape(1536, 8960, 28, heads=12, key_value_heads=2, pixels=12845056, **_REAL),
    "qwen2-vl-7b": Shape(3584, 18944, 28, heads=28, key_value_heads=4, pixels=12845056, **_REAL),
    "qwen2.5-vl-32b": Shape(5120, 27648, 64, heads=40, key_value_heads=8, pixels=12845056, **_REAL),
    "qwen2-vl-72b": Shape(8192, 29568, 80, heads=64, key_value_heads=8, pixels=12845056, **_REAL),
    "qwen3-vl-30b-a3b": FamilyShape(
        "Qwen3-VL-30B-A3B",
        "qwen3_vl_moe",
        48,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        {**_QWEN3_VISION, "out_hidden_size": 2048, "deepstack_visual_indexes": [8, 16, 24]},
    ),
    "qwen3.5-27b": FamilyShape(
        "Qwen3.5-27B",
        "qwen3_5",
        64,
        {
            "vocab_size": 248320,
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "num_attention_heads": 24,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 48,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "layer_types": [*["linear_attention"] * 3, "full_attention"],
        },
        {**_QWEN3_VISION, "out_hidden_size": 5120},
    ),
}


def write_random_model(folder: Path, shape: Shape | FamilyShape, seed: int = 0) -> Path:
    """Write a checkpoint with one safetensors file per decoder layer; at most one layer is in memory.

    A layer's experts are stored together, as transformers keeps them.
    """
    model = _skeleton(folder, shape)
    generator = torch.Generator().manual_seed(seed)
    by_file = _by_file(model)
    for file, names in by_file.items():
        tensors = {name: _random(name, model.get_parameter(name).shape, generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    _write_index(folder, by_file)
    return folder


def write_empty_model(folder: Path, shape: Shape | FamilyShape) -> Path:
    """Write a checkpoint of zeros that takes no space on the disk: a plan reads no weight."""
    model = _skeleton(folder, shape)
    by_file = _by_file(model)
    for file, names in by_file.items():
        header: dict[str, Any] = {}
        end = 0
        for name in names:
            size = model.get_parameter(name).shape
            start, end = end, end + size.numel() * torch.bfloat16.itemsize
            header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(opened.tell() + end)
    _write_index(folder, by_file)
    return folder


def _by_file(model: Any) -> dict[str, list[str]]:
    """Names of a model's tensors by file: one file for every decoder layer, one for all others."""
    prefix = f"{architecture_of(model.config).layers}."
    by_file: dict[str, list[str]] = {}
    for name in model.state_dict():
        layer = name.removeprefix(prefix).split(".")[0] if name.startswith(prefix) else "outside"
        by_file.setdefault(f"model-{layer}.safetensors", []).append(name)
    return by_file


def _write_index(folder: Path, by_file: Mapping[str, list[str]]) -> None:
    weight_map = {name: file for file, names in by_file.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _skeleton(folder: Path, shape: Shape | FamilyShape) -> Any:
    """Write config and processor of a model, and return the model without weights."""
    folder.mkdir(parents=True)
    config = shape.config()
    with init_empty_weights():
        model: Any = AutoModelForImageTextToText.from_config(config)
    config.dtype, config.architectures = torch.bfloat16, [type(model).__name__]
    config.save_pretrained(folder)
    copy_processor_files(MODEL, folder)
    _set_picture_size(folder / "preprocessor_config.json", shape)
    return model


def _random(name: str, size: torch.Size, generator: torch.Generator) -> Tensor:
    """Initial weights as in transformers: gains are 1, biases are 0, all others are normal."""
    if len(size) == 1:
        return torch.full(size, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    return (_DEVIATION * torch.randn(size, generator=generator)).bfloat16()


def _set_picture_size(path: Path, shape: Shape | FamilyShape) -> None:
    """Set patch size and picture size of the image processor to the model's shape."""
    settings = json.loads(path.read_text())
    settings["patch_size"] = shape.patch
    settings["size"] = {"shortest_edge": 16 * (2 * shape.patch) ** 2, "longest_edge": shape.pixels}
    path.write_text(json.dumps(settings))


def demo_samples(count: int, seed: int = 0) -> list[Sample]:
    """Questions about rendered pictures, each about 50 tokens long."""
    return [
        _sample(row["id"], row["image"]["bytes"], row["question"], row["answer"])
        for row in calibration_rows(seed, count)
    ]


def large_samples(count: int, width: int = 640, height: int = 480, words: int = 100, seed: int = 0) -> Iterator[Sample]:
    """Noise images of the size of a photograph with answers of ``words`` words, as long as samples of LLaVA data."""
    generator = np.random.default_rng(seed)
    vocabulary = [sample.messages[-1]["content"] for sample in demo_samples(64, seed)]
    for index in range(count):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        answer = " ".join(generator.choice(vocabulary, words))
        yield _sample(f"large-{index}", buffer.getvalue(), "Describe the picture.", answer)


def _sample(identifier: str, image: bytes, question: str, answer: str) -> Sample:
    return Sample(
        identifier,
        [image],
        [
            {"role": "user", "content": f"{IMAGE_MARK}{question}"},
            {"role": "assistant", "content": answer},
        ],
    )
