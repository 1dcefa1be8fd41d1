"""A damaged or quantized checkpoint is refused by name before any work, when it is quantized and when it is scored."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.tiny import write_tiny_qwen2_vl
from torch import Tensor

from tlq import quantize
from tlq.export.loading import load_model
from tlq.models.stored import stored_tensors
from tlq.models.streaming import StreamedModel
from tlq.runtime.digest import kept_digests
from tlq.samples import Sample

WEIGHT = "model.language_model.layers.1.mlp.up_proj.weight"
BOTH = pytest.mark.parametrize("read", [load_model, StreamedModel])
Read = Callable[[Path], object]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_tiny_qwen2_vl(tmp_path / "model")
    return tmp_path / "model"


def weights_of(checkpoint: Path) -> Path:
    (file,) = checkpoint.glob("*.safetensors")
    return file


def stored_name(tensors: dict[str, Tensor]) -> str:
    (name,) = [name for name in tensors if name.endswith(WEIGHT.removeprefix("model.language_model."))]
    return name


def change(checkpoint: Path, how: Callable[[Tensor], Tensor | None]) -> str:
    """Replace one weight by ``how`` of it, or leave it out; its name in the file."""
    file = weights_of(checkpoint)
    tensors = load_file(file)
    name = stored_name(tensors)
    changed = how(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed}), file, metadata={"format": "pt"})
    return name


@BOTH
def test_a_missing_weight_is_refused(checkpoint: Path, read: Read) -> None:
    change(checkpoint, lambda _: None)
    with pytest.raises(ValueError, match=rf"1 weights are missing, the first is {WEIGHT}; .* download it again"):
        read(checkpoint)


@BOTH
def test_a_weight_of_another_shape_is_refused(checkpoint: Path, read: Read) -> None:
    change(checkpoint, lambda weight: weight[:-1].contiguous())
    with pytest.raises(ValueError, match=r"up_proj\.weight has shape \[\d+, \d+\], the model of .* needs \["):
        read(checkpoint)


def test_a_weight_that_is_not_finite_is_refused_before_it_is_scored(checkpoint: Path) -> None:
    def damaged(weight: Tensor) -> Tensor:
        weight[0, 0] = float("nan")
        return weight

    change(checkpoint, damaged)
    with pytest.raises(FloatingPointError, match=rf"{WEIGHT} is not finite; the checkpoint is damaged"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "ending", ["embed_tokens.weight", "visual.patch_embed.proj.weight", "layers.1.input_layernorm.weight", WEIGHT[-22:]]
)
def test_a_weight_that_is_not_finite_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, samples: list[Sample], ending: str
) -> None:
    """Wherever it is, and whatever was known of the file before; an export would contain it as it is."""
    file = weights_of(checkpoint)
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith(ending)]
    tensors[name].view(-1)[3] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    kept_digests([file], tmp_path / ".model.sha256.json")
    for recipe in ("rtn", "tlq"):
        for _ in range(2):
            with pytest.raises(FloatingPointError, match=rf"{file}: {name} is not finite; the checkpoint is damaged"):
                quantize(checkpoint, tmp_path / "out", samples if recipe == "tlq" else [], recipe, "w4a16")
            assert not (tmp_path / "out").exists()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantized_weights_are_refused(checkpoint: Path, read: Read, dtype: torch.dtype) -> None:
    name = change(checkpoint, lambda weight: weight.to(dtype))
    with pytest.raises(ValueError, match=f"{name} .(F8_E4M3|I8). is a part of a quantized weight"):
        read(checkpoint)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "something"])
def test_a_quantization_of_another_form_is_not_scored(checkpoint: Path, method: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=rf"it is quantized \({method}\); this program loads only"):
        load_model(checkpoint)


@pytest.mark.parametrize("method", ["fp8", "gptq", "compressed-tensors"])
def test_a_config_that_states_a_quantization_is_refused(checkpoint: Path, method: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(ValueError, match=rf"it is quantized already \({method}\); quantize the original"):
        StreamedModel(checkpoint)


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def absurd_header(data: bytes) -> bytes:
    return struct.pack("<Q", 1 << 60) + data[8:]


def no_json(data: bytes) -> bytes:
    return data[:8] + b"x" * 40 + data[48:]


@BOTH
@pytest.mark.parametrize("damage", [truncated, absurd_header, no_json, lambda _: b"", lambda _: b"not tensors"])
def test_a_damaged_file_is_refused_by_name(checkpoint: Path, read: Read, damage: Callable[[bytes], bytes]) -> None:
    file = weights_of(checkpoint)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors: not readable \(.*\); download it again"):
        read(checkpoint)


@BOTH
@pytest.mark.parametrize("damage", [truncated, lambda _: b"", lambda _: b"not tensors"])
def test_a_damaged_pytorch_file_is_refused_by_name(
    checkpoint: Path, read: Read, damage: Callable[[bytes], bytes]
) -> None:
    tensors: dict[str, Any] = load_file(weights_of(checkpoint))
    weights_of(checkpoint).unlink()
    file = checkpoint / "pytorch_model.bin"
    torch.save(tensors, file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: not readable \(.*\); download it again"):
        read(checkpoint)


@BOTH
def test_a_whole_checkpoint_is_read(checkpoint: Path, read: Read) -> None:
    read(checkpoint)


forms = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F8_E4M3", "F9", "", 3]),
        "shape": st.lists(st.integers(-1, 2**63), max_size=3) | st.none(),
        "data_offsets": st.lists(st.integers(-1, 2**63), max_size=3) | st.just([0, 8]),
    }
)
headers = st.dictionaries(st.text(max_size=3), forms | st.integers() | st.none(), max_size=2) | st.lists(st.integers())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers, st.integers(0, 64), st.integers(-9, 2**63))
def test_any_header_is_read_or_refused_by_name(tmp_path: Path, header: object, size: int, more: int) -> None:
    """``more`` makes the stated length of the header wrong, in either direction."""
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", max(0, len(text) + more) % 2**64) + text + bytes(size))
    try:
        found = stored_tensors(tmp_path)
    except ValueError as error:
        message = str(error)
    else:
        message = "model.safetensors: read"
        assert all(place.file == file for place in found.values())
    assert "model.safetensors: " in message
    assert "\n" not in message
