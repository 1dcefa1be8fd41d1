"""Carrying a checkpoint over to GGUF and MLX: the same weights to the bit, or a reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.processors import write_tiny_with_processor
from support.quick_project import ROOT
from transformers import AutoModelForImageTextToText

import tlq.export.convert
from tlq import cli, quantize
from tlq.export.containers import CONTAINERS, GGUF_FAMILIES
from tlq.export.convert import convert
from tlq.export.gguf import MAPPINGS, blocks, interleaved_sections
from tlq.export.mlx import affine, packed
from tlq.export.quantized import QuantizedCheckpoint, hub_name
from tlq.models.reading import read_tensor
from tlq.quantization.formats import QuantizedWeight, get_scheme

DEMO = ROOT / "data/demo/model"

Exported = Callable[[str], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The demo model, rounded to a scheme."""

    @cache
    def export(scheme: str) -> Path:
        out = tmp_path_factory.mktemp("exported") / scheme
        quantize(DEMO, out, recipe="rtn", scheme=scheme)
        return out

    return export


def gguf_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a GGUF file as float32, dequantized by the package ``gguf``."""
    return {
        tensor.name: torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        for tensor in gguf.GGUFReader(file).tensors
    }


def mlx_weight(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """A weight of MLX: scale q + bias, with q read bit by bit from the words."""
    words = tensors[f"{name}.weight"].numpy()
    flags = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").reshape(len(words), -1, bits)
    codes = torch.from_numpy(flags @ (1 << np.arange(bits)).astype(np.float32)).float()
    scales, biases = (tensors[f"{name}.{part}"] for part in ("scales", "biases"))
    groups = codes.unflatten(1, (scales.shape[1], -1))
    return (groups * scales[..., None] + biases[..., None]).flatten(1)


@pytest.mark.parametrize("scheme", ["q4_0", "q4_1", "q8_0", "w4a16s", "w4a8", "w8a8"])
def test_gguf_holds_the_same_weights(exported: Exported, scheme: str, tmp_path: Path) -> None:
    decoder, vision = convert(exported(scheme), "gguf", tmp_path / "out")
    found, source = gguf_tensors(decoder), QuantizedCheckpoint.open(exported(scheme))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2VL, 6)
    for name in source.schemes:
        weight = found.pop(f"{names.get_name(hub_name(name))}.weight")
        torch.testing.assert_close(weight, source.weight(name).dequantize(), rtol=0, atol=0)
    tower = gguf_tensors(vision)
    plain = {key: read_tensor(place).float() for key, place in source.others.items()}
    patches = tower.pop("v.patch_embd.weight"), tower.pop("v.patch_embd.weight.1")
    torch.testing.assert_close(torch.stack(patches, 2), plain.pop("visual.patch_embed.proj.weight"), rtol=0, atol=1e-7)
    assert sum(value.numel() for value in found.values()) + sum(value.numel() for value in tower.values()) == sum(
        value.numel() for value in plain.values()
    )
    assert torch.equal(found["output_norm.weight"], plain["model.norm.weight"])
    torch.testing.assert_close(tower["mm.2.bias"], plain["visual.merger.mlp.2.bias"], rtol=0, atol=0)
    third = plain["visual.blocks.1.attn.qkv.weight"].chunk(3)
    for letter, expected in zip("qkv", third, strict=True):
        torch.testing.assert_close(tower[f"v.blk.1.attn_{letter}.weight"], expected, rtol=0, atol=1e-7)


def test_gguf_knows_the_tokens_and_the_images(exported: Exported, tmp_path: Path) -> None:
    decoder, vision = convert(exported("q4_0"), "gguf", tmp_path / "out")
    fields = gguf.GGUFReader(decoder).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    stated = json.loads((DEMO / "tokenizer.json").read_text())
    assert len(tokens) == 512
    assert all(tokens[index] == token for token, index in stated["model"]["vocab"].items())
    assert all(tokens[added["id"]] == added["content"] for added in stated["added_tokens"])
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 505
    assert fields["tokenizer.chat_template"].contents() == (DEMO / "chat_template.jinja").read_text()
    assert fields["qwen2vl.rope.dimension_sections"].contents() == [3, 5, 24, 0]
    images = gguf.GGUFReader(vision).fields
    assert images["clip.vision.image_max_pixels"].contents() == 65536
    assert images["clip.vision.feed_forward_length"].contents() == 768


@pytest.mark.parametrize(("family", "decoder"), [("qwen2_5_vl", "qwen2vl"), ("qwen3_vl", "qwen3vl")])
def test_gguf_has_a_name_for_every_tensor_of_a_family(family: str, decoder: str, tmp_path: Path) -> None:
    source = write_tiny_with_processor(family, tmp_path / "source")
    quantize(source, tmp_path / "quantized", recipe="rtn", scheme="q4_0")
    shutil.copyfile(DEMO / "tokenizer.json", tmp_path / "quantized/tokenizer.json")
    config = tmp_path / "quantized/config.json"
    if family == "qwen2_5_vl":
        with pytest.raises(ValueError, match="window_size is 16; llama.cpp attends in windows of 112 pixels only"):
            convert(tmp_path / "quantized", "gguf", tmp_path / "out")
        config.write_text(config.read_text().replace('"window_size": 16', '"window_size": 112'))
    files = convert(tmp_path / "quantized", "gguf", tmp_path / "out")
    fields = gguf.GGUFReader(files[0]).fields
    assert fields["general.architecture"].contents() == decoder
    sections = {"qwen2_5_vl": [4, 6, 6, 0], "qwen3_vl": [12, 11, 10, 0]}
    assert fields[f"{decoder}.rope.dimension_sections"].contents() == sections[family]
    opened = QuantizedCheckpoint.open(tmp_path / "quantized")
    values = sum(opened.shape(name)[0] * opened.shape(name)[1] for name in opened.schemes)
    values += sum(int(np.prod(place.shape)) for place in opened.others.values())
    assert sum(tensor.numel() for file in files for tensor in gguf_tensors(file).values()) == values


def llama_cpp_axes(sections: list[int], pairs: int) -> list[int]:
    """The axis of every pair of channels in ggml's interleaved rotary embeddings; 3 has position 0 (`4th dim is 0`)."""
    return [
        axis if pair < 3 * sections[axis] else 3
        for pair, axis in ((pair, pair % sum(sections) % 3) for pair in range(pairs))
    ]


@pytest.mark.parametrize(
    ("stated", "pairs", "written"), [([24, 20, 20], 64, [24, 21, 21]), ([12, 10, 10], 32, [12, 11, 10])]
)
def test_every_pair_of_channels_has_a_position_in_llama_cpp(stated: list[int], pairs: int, written: list[int]) -> None:
    assert 3 in llama_cpp_axes(stated, pairs)
    assert interleaved_sections(stated, pairs) == written
    assert 3 not in llama_cpp_axes(written, pairs)
    axes = torch.zeros(pairs, dtype=torch.long)  # as transformers' `apply_interleaved_mrope`: what remains is time
    for axis in (1, 2):
        axes[axis : 3 * stated[axis] : 3] = axis
    differing = [pair for pair, axis in enumerate(llama_cpp_axes(written, pairs)) if axis != axes[pair]]
    assert all(pair >= 3 * min(stated[1:]) for pair in differing)  # the lowest frequencies alone
    assert len(differing) <= 2


def test_sections_that_an_image_would_show_are_refused() -> None:
    assert interleaved_sections([11, 11, 10], 32) == [11, 11, 10]
    with pytest.raises(ValueError, match=r"mrope_section is \[28, 18, 18\] for 64 pairs of channels"):
        interleaved_sections([28, 18, 18], 64)


@pytest.mark.parametrize("scheme", ["w2a16", "w3a16", "w3a16s", "w4a16", "w4a8", "w8a8", "q4_1"])
def test_mlx_holds_the_same_weights(exported: Exported, scheme: str, tmp_path: Path) -> None:
    (folder,) = convert(exported(scheme), "mlx", tmp_path / "out")
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    stated = json.loads((folder / "config.json").read_text())["quantization"]
    source = QuantizedCheckpoint.open(exported(scheme))
    for name in source.schemes:
        found = mlx_weight(tensors, name, stated["bits"])
        torch.testing.assert_close(found, source.weight(name).dequantize(), rtol=0, atol=1e-6)
        assert tensors[f"{name}.scales"].shape[1] * stated["group_size"] == found.shape[1]
    for key, place in source.others.items():
        assert torch.equal(tensors[key], read_tensor(place))


def test_mlx_itself_reads_the_words() -> None:
    mlx = pytest.importorskip("mlx.core", reason="MLX is not installed: pip install 'mlx[cpu]'")
    generator = torch.Generator().manual_seed(0)
    for bits in (2, 3, 4, 8):
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (64, 128), generator=generator, dtype=torch.int8)
        weight = QuantizedWeight(codes, torch.rand(64, 2, generator=generator), codes[:, :2].clone())
        parts = [mlx.array(each.numpy()) for each in (packed(weight, bits), *affine(weight, bits))]
        found = np.array(mlx.dequantize(*parts, group_size=64, bits=bits))
        torch.testing.assert_close(torch.from_numpy(found), weight.dequantize(), rtol=1e-6, atol=1e-6)


def test_mixed_schemes_keep_their_own_types(tmp_path: Path) -> None:
    mixed = replace(get_scheme("q4_0"), overrides=(("*.layers.0.mlp.*", "q8_0"), ("*.layers.1.*", "full_precision")))
    quantize(DEMO, tmp_path / "quantized", recipe="rtn", scheme=mixed)
    (folder,) = convert(tmp_path / "quantized", "mlx", tmp_path / "mlx")
    stated = json.loads((folder / "config.json").read_text())["quantization"]
    assert (stated["bits"], stated["group_size"]) == (4, 32)
    assert stated["language_model.model.layers.0.mlp.up_proj"] == {"bits": 8, "group_size": 32}
    assert not any(".layers.1." in key for key in stated)
    decoder, _ = convert(tmp_path / "quantized", "gguf", tmp_path / "gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(decoder).tensors}
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["blk.1.attn_q.weight"] == "F16"


@torch.no_grad()
def test_int8_computes_the_same_at_a_byte_for_each_code(exported: Exported, tmp_path: Path) -> None:
    (folder,) = convert(exported("w4a8"), "int8", tmp_path / "out")
    ids = torch.arange(40).view(2, 20)
    logits = [
        AutoModelForImageTextToText.from_pretrained(each, dtype=torch.float32)(input_ids=ids).logits
        for each in (exported("w4a8"), folder)
    ]
    assert torch.equal(*logits)
    weights = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    with pytest.raises(ValueError, match="w4a16s keeps activations in 16 bits"):
        convert(exported("w4a16s"), "int8", tmp_path / "other")


def test_what_a_block_cannot_hold_is_refused(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no block that holds the codes of w3a16 \(3 bits, asymmetric\).*q4_1$"):
        convert(exported("w3a16"), "gguf", tmp_path / "out")
    with pytest.raises(ValueError, match=r"does not hold that of w4a16 exactly; the nearest scheme is q4_1$"):
        convert(exported("w4a16"), "gguf", tmp_path / "out")
    full_digits = replace(get_scheme("q4_1"), scale_digits=None)  # a checkpoint of somebody else
    quantize(DEMO, tmp_path / "foreign", recipe="rtn", scheme=full_digits)
    with pytest.raises(ValueError, match=r"of \d+ groups have a scale or an offset .* with the scheme q4_1"):
        convert(tmp_path / "foreign", "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_group_that_is_no_block_is_refused(tmp_path: Path) -> None:
    for container, reason in (("gguf", "a block of GGUF has 32 weights"), ("mlx", "those of MLX have 32, 64, 128")):
        out = tmp_path / container
        quantize(DEMO, out, recipe="rtn", scheme=get_scheme("w4a16s", 16))
        with pytest.raises(ValueError, match=f"has groups of 16, but {reason}"):
            convert(out, container, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "container", "reason"),
    [
        ("llava_onevision", "gguf", "no projector that puts its image tiles together"),
        ("llava", "gguf", "no mapping to GGUF is known here"),
        ("mllama", "mlx", "mlx-vlm does not load its conversion"),
    ],
)
def test_a_family_without_a_mapping_is_refused(
    exported: Exported, family: str, container: str, reason: str, tmp_path: Path
) -> None:
    shutil.copytree(exported("q4_0"), tmp_path / "quantized")
    config = tmp_path / "quantized/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": family}))
    with pytest.raises(ValueError, match=f"model_type {family}: .*{reason}"):
        convert(tmp_path / "quantized", container, tmp_path / "out")


def test_another_tokenizer_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "quantized", recipe="rtn", scheme="q4_0")
    with pytest.raises(ValueError, match=r"tokenizer.json: splits a text in another way"):
        convert(tmp_path / "quantized", "gguf", tmp_path / "out")


def test_a_missing_package_is_named(exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tlq.export.convert.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'tlq\[gguf\]'"):
        convert(exported("q4_0"), "gguf", tmp_path / "out")


def test_other_bad_input_of_the_command(exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(cli.CONTAINERS) == set(CONTAINERS)
    assert set(MAPPINGS) == set(GGUF_FAMILIES)
    with pytest.raises(ValueError, match="unknown container 'onnx'; choose one of gguf, mlx, int8"):
        convert(exported("q4_0"), "onnx", tmp_path / "out")

    def message(*words: str) -> str:
        assert cli.main(["convert", *words]) == 1
        return capsys.readouterr().err

    assert "names no quantization" in message(str(DEMO), "--to", "gguf", "--out", str(tmp_path / "out"))
    assert "config.json: not found" in message(str(tmp_path), "--to", "mlx", "--out", str(tmp_path / "out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert "not empty" in message(str(exported("q4_0")), "--to", "gguf", "--out", str(tmp_path / "full"))
    assert cli.main(["convert", str(exported("q4_0")), "--to", "gguf", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out/model.gguf"), str(tmp_path / "out/mmproj.gguf")]


def test_the_codes_of_extremes_fit_a_block() -> None:
    for bits, kind in ((4, gguf.GGMLQuantizationType.Q4_0), (8, gguf.GGMLQuantizationType.Q8_0)):
        low = -(2 ** (bits - 1))
        codes = torch.tensor([[low, -low - 1] * 16], dtype=torch.int8)
        weight = QuantizedWeight(codes, torch.tensor([[0.5]]), torch.zeros(1, 1, dtype=torch.int8))
        found: Any = gguf.dequantize(blocks(weight, kind), kind)
        assert torch.equal(torch.from_numpy(found), weight.dequantize())
