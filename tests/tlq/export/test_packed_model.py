"""A quantized checkpoint that is read layer by layer has the weights of the whole model, one layer at a time."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.families import write_tiny

from tlq import quantize
from tlq.export.loading import load_model
from tlq.export.streamed import PackedModel, open_model
from tlq.models.streaming import StreamedModel
from tlq.quantization.formats import get_scheme


@pytest.mark.parametrize("scheme", ["w3a16", "w3a16s", "w4a16", "w4a8", "w8a8", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_whole_model(tiny_checkpoint: Path, tmp_path: Path, scheme: str, dtype: str) -> None:
    chosen = get_scheme("w4a16s" if scheme == "mixed" else scheme)
    if scheme == "mixed":
        chosen = replace(chosen, overrides=(("*.mlp.*", "w8a16s"), ("*.0.self_attn.o_proj", "full_precision")))
    quantize(tiny_checkpoint, tmp_path / "out", recipe="rtn", scheme=chosen)
    whole, streamed = load_model(tmp_path / "out", dtype).state_dict(), open_model(tmp_path / "out", dtype)
    assert isinstance(streamed, PackedModel)
    read = streamed.read(streamed.weight_map)
    lacking = {name for name in whole.keys() - read.keys() if not name.endswith((".weight_scale", ".weight_shape"))}
    assert lacking <= {"lm_head.weight"}
    for name, tensor in read.items():
        assert torch.equal(tensor, whole[name]), name


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_logits_of_experts_are_those_in_memory(tmp_path: Path, scheme: str) -> None:
    folder = write_tiny("qwen3_vl_moe", tmp_path / "source")
    quantize(folder, tmp_path / "out", recipe="rtn", scheme=scheme)
    model, ids = load_model(tmp_path / "out"), torch.arange(20)[None]
    streamed = open_model(tmp_path / "out")
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with streamed._with_weights(streamed.weight_map):
            assert torch.equal(streamed.skeleton(input_ids=ids).logits, expected)


def test_a_layer_has_its_weights_until_the_next_one_comes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "out", recipe="rtn", scheme="w3a16")
    model = open_model(tmp_path / "out")
    layers = model.architecture.decoder_layers(model.skeleton)
    for index, layer in model.layers(range(len(layers))):
        assert not any(parameter.is_meta for parameter in layer.parameters())
        others = [each for number, each in enumerate(layers) if number != index]
        assert all(parameter.is_meta for each in others for parameter in each.parameters())


def test_an_original_is_opened_as_it_is(tiny_checkpoint: Path) -> None:
    assert type(open_model(tiny_checkpoint)) is StreamedModel
    assert open_model(tiny_checkpoint, "auto").dtype == torch.bfloat16
