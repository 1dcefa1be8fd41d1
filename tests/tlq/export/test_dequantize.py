"""Checkpoints of FP8 weights become what their numbers and scales represent, in bfloat16."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exporting import read_tensors
from support.families import write_tiny
from torch import Tensor

from tlq.api import quantize
from tlq.cli import main
from tlq.export.dequantize import dequantize
from tlq.models.streaming import StreamedModel

BLOCK = (96, 80)  # divides no width of the tiny model
FINE = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
CHANNEL = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8}}},
}


def by_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers, and a scale for each block."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape[-2:], BLOCK, strict=True))
    scale = torch.rand(*weight.shape[:-2], rows, columns, generator=torch.Generator().manual_seed(1)) + 0.5
    return weight.to(torch.float8_e4m3fn), scale


def by_row(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers, and a scale for each row."""
    scale = torch.rand(len(weight), 1, generator=torch.Generator().manual_seed(1)) + 0.5
    return weight.to(torch.float8_e4m3fn), scale.to(torch.bfloat16)


def written(
    family: str, folder: Path, form: Callable[[Tensor], tuple[Tensor, Tensor]], end: str, quantization: dict[str, Any]
) -> Path:
    """A checkpoint of a family whose decoder's linears, and experts, are FP8."""
    write_tiny(family, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, weight in list(tensors.items()):
        if ".layers." in name and name.endswith(("proj.weight", "_proj")) and weight.dim() > 1:
            tensors[name], tensors[name + end] = form(weight)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def test_blocks_of_weights_are_multiplied_by_their_scales(tmp_path: Path) -> None:
    source = written("qwen2_5_vl", tmp_path / "fp8", by_block, "_scale_inv", FINE)
    before, after = read_tensors(source), read_tensors(dequantize(source, tmp_path / "bf16"))
    assert not any("scale" in name for name in after)
    (name,) = [name for name in before if name.endswith("layers.0.mlp.down_proj.weight")]
    numbers, scale = before[name].float(), before[f"{name}_scale_inv"]
    for row, column in ((0, 0), (95, 79), (96, 79), (127, 255), (0, 80)):
        expected = numbers[row, column] * scale[row // BLOCK[0], column // BLOCK[1]]
        assert after[name][row, column] == expected.bfloat16()
    (embeddings,) = [name for name in before if name.endswith("embed_tokens.weight")]
    assert torch.equal(after[embeddings], before[embeddings])
    assert StreamedModel(tmp_path / "bf16").checkpoint_dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())


def test_rows_have_scales_in_compressed_tensors(tmp_path: Path) -> None:
    source = written("llava", tmp_path / "fp8", by_row, "_scale", CHANNEL)
    before, after = read_tensors(source), read_tensors(dequantize(source, tmp_path / "bf16"))
    (name, *_) = [name.removesuffix("_scale") for name in before if name.endswith("_scale")]
    expected = before[name].float() * before[f"{name}_scale"].float()
    assert torch.equal(after[name], expected.bfloat16())


def test_blocks_of_compressed_tensors(tmp_path: Path) -> None:
    weights = {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": list(BLOCK)}
    stated = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    source = written("qwen3_vl", tmp_path / "fp8", by_block, "_scale", stated)
    before, after = read_tensors(source), read_tensors(dequantize(source, tmp_path / "bf16"))
    (name,) = [name for name in before if name.endswith("layers.1.mlp.up_proj.weight")]
    assert after[name][97, 81] == (before[name].float()[97, 81] * before[f"{name}_scale"][1, 1]).bfloat16()


def test_experts_of_a_layer_have_scales_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the command that the refusal names, and what comes out of it can be quantized."""
    source = written("qwen3_vl_moe", tmp_path / "fp8", by_block, "_scale_inv", FINE)
    with pytest.raises(ValueError, match=rf"quantized already \(fp8\).*`tlq dequantize {source} --out FOLDER`"):
        StreamedModel(source)
    assert main(["dequantize", str(source), "--out", str(tmp_path / "bf16")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'bf16'}\n"
    before, after = read_tensors(source), read_tensors(tmp_path / "bf16")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    number = before[name][2].float()[100, 90] * before[f"{name}_scale_inv"][2, 1, 1]
    assert after[name][2, 100, 90] == number.bfloat16()
    quantize(tmp_path / "bf16", tmp_path / "out", recipe="rtn", scheme="w8a8")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (None, "states no quantization"),
        ({"quant_method": "awq"}, "is quantized with awq, not in FP8 with plain scales; quantize the original"),
        ({"quant_method": "fp8", "weight_block_size": [0]}, r"weight_block_size is \[0\], must be two whole numbers"),
        ({**FINE, "weight_block_size": [16, 16]}, r"weight_scale_inv has shape .*, which does not fit"),
        (CHANNEL | {"config_groups": {"group_0": {"weights": {"type": "int", "num_bits": 8}}}}, "not in FP8"),
    ],
)
def test_other_forms_are_refused(tmp_path: Path, quantization: dict[str, Any] | None, message: str) -> None:
    source = written("qwen2_5_vl", tmp_path / "fp8", by_block, "_scale_inv", quantization or {})
    if quantization is None:
        config = json.loads((source / "config.json").read_text())
        del config["quantization_config"]
        (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        dequantize(source, tmp_path / "bf16")
    assert not (tmp_path / "bf16").exists()


def test_weights_without_scales_are_refused(tmp_path: Path) -> None:
    source = written("qwen2_5_vl", tmp_path / "fp8", by_block, "_scale_inv", FINE)
    file = source / "model.safetensors"
    tensors = load_file(file)
    (scale,) = [name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight_scale_inv")]
    del tensors[scale]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has no scale"):
        dequantize(source, tmp_path / "bf16")
