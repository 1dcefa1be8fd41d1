"""Experts as linears of their own: the same numbers as transformers' experts, from every form on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exporting import read_tensors
from support.families import IMAGE, batches_of, write_tiny
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from tlq.api import quantize
from tlq.calibration.install import QuantizedLayer
from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import LayerLoop
from tlq.export.compressed_tensors import read_layer
from tlq.export.loading import load_model
from tlq.importance.gradients import score_tokens
from tlq.importance.losses import answer_loss
from tlq.importance.pool import TokenPool
from tlq.models.architectures import architecture_of
from tlq.models.experts import SeparateExperts
from tlq.models.linear_groups import EXPERTS, is_expert
from tlq.models.streaming import ResidentModel, StreamedModel
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import RECIPES

FAMILIES = ("qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "deepseek_ocr2", "ernie4_5_vl_moe", "llama4")
SHARED = "model.language_model.layers.0.mlp.experts"
LLAMA4 = "language_model.model.layers.0.feed_forward.experts"

Forms = Callable[[str, Tensor], dict[str, Tensor]]


def whole(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """[experts, out, in], as transformers keeps it in memory."""
    return {name: tensor}


def transposed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """[experts, in, out], as the first checkpoints of Qwen3-VL have it."""
    return {name: tensor.transpose(1, 2).contiguous()}


def separate(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A weight per linear, as most checkpoints with experts have it."""
    path, _, leaf = name.rpartition(".")
    if leaf == "down_proj":
        return {f"{path}.{number}.down_proj.weight": weight.clone() for number, weight in enumerate(tensor)}
    parts = {}
    for number, weight in enumerate(tensor):
        gate, up = weight.chunk(2)
        parts |= {f"{path}.{number}.gate_proj.weight": gate.clone(), f"{path}.{number}.up_proj.weight": up.clone()}
    return parts


def written(folder: Path, form: Forms) -> Path:
    """A checkpoint of Qwen3-VL with experts of 96 x 128 channels, stored in a form."""
    return rewritten(write_tiny("qwen3_vl_moe", folder, moe_intermediate_size=96), form)


def rewritten(folder: Path, form: Forms) -> Path:
    """Store the experts of a checkpoint in another form, given what transformers keeps in memory."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        experts = name.rpartition(".")[0] in (SHARED, LLAMA4)
        tensors |= form(name, tensor) if experts else {name: tensor.clone()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_separate_experts_compute_what_transformers_computes(tmp_path: Path, name: str) -> None:
    write_tiny(name, tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    model = load_model(tmp_path)
    path = architecture_of(model.config).experts
    assert path is not None
    layers = architecture_of(model.config).decoder_layers(model)
    assert isinstance(layers[-1 if name in ("glm4v_moe", "deepseek_ocr2") else 0].get_submodule(path), SeparateExperts)
    for batch in batches_of(name):
        expected = plain(**batch.encode()).logits[batch.valid]
        torch.testing.assert_close(model(**batch.encode()).logits[batch.valid], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [whole, transposed, separate])
def test_experts_are_read_from_every_form(tmp_path: Path, form: Forms) -> None:
    expected = load_model(write_tiny("qwen3_vl_moe", tmp_path / "plain", moe_intermediate_size=96)).state_dict()
    model = StreamedModel(written(tmp_path / "stored", form))
    found = model.read([name for index in range(2) for name in model.layer_names(index)])
    assert f"{SHARED}.3.up_proj.weight" in found
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous()
    assert not model.unnamed


@pytest.mark.parametrize(("form", "width"), [(whole, 96), (transposed, 96), (separate, 96), (whole, 128)])
def test_transposed_experts_are_read_from_every_form(tmp_path: Path, form: Forms, width: int) -> None:
    """Llama 4 has [experts, in, out] in memory and on disk; a square weight is taken to be the same way round."""

    def of_llama4(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return form(name, tensor.transpose(1, 2).contiguous()) if form is separate else form(name, tensor)

    folder = write_tiny("llama4", tmp_path, intermediate_size=width)
    expected = load_model(folder).state_dict()
    model = StreamedModel(rewritten(folder, of_llama4))
    names = model.layer_names(0)
    assert f"{LLAMA4}.3.up_proj.weight" in names
    for name, tensor in model.read(names).items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous()


@pytest.mark.parametrize("name", FAMILIES)
def test_importance_of_experts_equals_the_gradients_of_the_whole_model(tmp_path: Path, name: str) -> None:
    model = load_model(write_tiny(name, tmp_path)).requires_grad_(False)
    architecture, batches = architecture_of(model.config), batches_of(name)
    scores = score_tokens(ResidentModel(model), batches)
    layer = next(index for index, groups in enumerate(architecture.groups) if any(group.experts for group in groups))
    found = {key: values for key, values in scores.items() if key[0] == layer and is_expert(key[1])}
    assert any(values.any() for values in found.values())
    expected = {key: [] for key in found}
    for batch in batches:
        outputs = {}

        def keep(_module: nn.Module, _args: object, output: Tensor, *, path: str, outputs: dict = outputs) -> None:
            outputs[path] = output

        decoder = architecture.decoder_layers(model)[layer]
        groups = [group for group in architecture.groups[layer] if group.experts]
        handles = [
            decoder.get_submodule(path).register_forward_hook(partial(keep, path=path))
            for group in groups
            for path in group.linears
        ]
        embeddings = model.get_input_embeddings()
        handles.append(embeddings.register_forward_hook(lambda _module, _args, output: output.requires_grad_()))
        logits = model(**batch.encode(), use_cache=False).logits[:, :-1][batch.is_answer[:, 1:]]
        gradients = dict(
            zip(outputs, torch.autograd.grad(answer_loss(logits, batch), list(outputs.values())), strict=True)
        )
        for handle in handles:
            handle.remove()
        for group in groups:
            of_group = [gradients[path] for path in group.linears if path in gradients]
            values = torch.zeros(batch.valid.numel())
            if of_group:
                values[decoder.get_submodule(group.block).tokens] = torch.cat(of_group, -1).abs().mean(-1)
            expected[layer, group.name].append((batch, values.view(batch.valid.shape)))
    pool = TokenPool.of(batches)
    for key, parts in expected.items():
        split = pool.split(found[key])
        for batch, values in parts:
            for row, sample in enumerate(batch.samples):
                torch.testing.assert_close(
                    torch.from_numpy(split[sample]), values[row, batch.valid[row]], rtol=1e-3, atol=1e-8
                )


@torch.no_grad()
def test_further_tokens_of_an_expert_enter_it_as_the_router_scales_them(tmp_path: Path) -> None:
    """Llama 4: the router has a weight for the tokens that it sends elsewhere too."""
    model, batches = load_model(write_tiny("llama4", tmp_path)), batches_of("llama4")
    architecture = architecture_of(model.config)
    layer, groups = architecture.decoder_layers(model)[0], architecture.groups[0]
    few = [batch.valid * (torch.arange(batch.valid.shape[1]) % 4 == 0).float() for batch in batches]
    names = [(index, group.name) for index, of in enumerate(architecture.groups) for group in of if not group.experts]
    weights = dict.fromkeys([*names, (0, EXPERTS)], few)
    job = CalibrationJob(RECIPES["tlq"], WeightQuantizer(get_scheme("w4a16"), torch.bfloat16), batches, weights)
    loop = LayerLoop(ResidentModel(model), job)
    hidden: list[Tensor] = []
    handle = layer.feed_forward.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))
    reference = loop.streams.full_precision(0, layer)
    handle.remove()
    (group,) = [group for group in groups if group.name == "experts.3.gate_up"]
    problem = loop.solver.problem(0, layer, group, reference)
    assert problem is not None
    assert problem.routed is not None
    assert problem.routed.further > 0
    tokens = torch.cat([states[batch.valid] for states, batch in zip(hidden, batches, strict=True)])
    scales, logits = layer.feed_forward.router(tokens)
    entered = tokens * logits[:, 3, None].sigmoid()
    found = torch.cat([part.x for part in problem.inputs.own])
    assert float(torch.cdist(found, entered, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max()) < 1e-4
    assert len(found) > int((scales[:, 3] > 0).sum())


@torch.no_grad()
def test_experts_of_a_modality_get_further_tokens_of_it(tmp_path: Path) -> None:
    """ERNIE 4.5 VL has one mixture for text and one for images, which also computes the marks around an image."""
    model, batches = load_model(write_tiny("ernie4_5_vl_moe", tmp_path)), batches_of("ernie4_5_vl_moe")
    architecture = architecture_of(model.config)
    few = [batch.valid * (torch.arange(batch.valid.shape[1]) % 9 == 0).float() for batch in batches]
    names = [(index, group.name) for index, of in enumerate(architecture.groups) for group in of if not group.experts]
    weights = dict.fromkeys([*names, (0, EXPERTS)], few)
    job = CalibrationJob(RECIPES["tlq"], WeightQuantizer(get_scheme("w4a16"), torch.bfloat16), batches, weights)
    loop, layer = LayerLoop(ResidentModel(model), job), architecture.decoder_layers(model)[0]
    reference = loop.streams.full_precision(0, layer)
    groups = {group.name: group for group in architecture.groups[0]}
    assert len([name for name in groups if name.startswith(f"{EXPERTS}.")]) == 16
    marks = [batch.encode()["moe_mm_token_type_ids"].bool() for batch in batches]
    for number in range(8):
        tokens = loop.streams.prepare_expert(0, layer, groups[f"{EXPERTS}.{number}.gate_up"], reference)
        assert tokens.further > 0
        for batch, mark, given in zip(batches, marks, tokens.weights, strict=True):
            allowed = mark if number >= 4 else batch.valid & ~mark | (batch.input_ids > IMAGE)
            assert not bool((given[~allowed] > 0).any())


def test_routers_of_a_pair_of_mixtures_are_exported_as_they_were_stored(tmp_path: Path) -> None:
    """ERNIE 4.5 VL: two routers, stored transposed, whose biases share a tensor, and experts in one numbering."""
    folder = write_tiny("ernie4_5_vl_moe", tmp_path / "source")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    bias = "model.layers.0.mlp.moe_statics.e_score_correction_bias"
    tensors[bias] = torch.rand(2, 4) / 3  # more digits than bfloat16 has
    tensors["model.layers.0.mlp.gate.weight_1"] = torch.rand(128, 4) / 3
    save_file(tensors, file, {"format": "pt"})
    source = StreamedModel(folder, torch.bfloat16)
    prefix = "model.language_model.layers.0.mlp"
    found = source.read(source.layer_names(0))
    assert torch.equal(found[f"{prefix}.vision_moe.gate.weight"], tensors["model.layers.0.mlp.gate.weight_1"].t())
    assert torch.equal(found[f"{prefix}.vision_moe.gate.moe_statics.e_score_correction_bias"], tensors[bias][1:])
    assert found[f"{prefix}.experts.3.up_proj.weight"].shape == (128, 128)
    assert found[f"{prefix}.experts.4.up_proj.weight"].shape == (256, 128)
    quantize(folder, tmp_path / "out", recipe="rtn", scheme="w4a16")
    exported = read_tensors(tmp_path / "out")
    for name in (bias, "model.layers.0.mlp.gate.weight", "model.layers.0.mlp.gate.weight_1"):
        assert torch.equal(exported[name], tensors[name]), name
    assert "model.layers.0.mlp.experts.7.up_proj.weight_packed" in exported
    _, others = read_layer(
        next(iter(sorted((tmp_path / "out").glob("model-*.safetensors")))), source, 0, get_scheme("w4a16")
    )
    for name, value in others.items():
        assert torch.equal(value, source.read([name])[name]), name


def test_experts_of_another_shape_or_number_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, whole)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for change, message in (
        (lambda tensor: tensor[:, 1:], r"gate_up_proj has shape \[4, 191, 128\], .* needs 192 x 128 for every expert"),
        (lambda tensor: tensor[1:], "gate_up_proj has 3 experts, the model of its config.json 4"),
    ):
        name = f"{SHARED}.gate_up_proj"
        save_file({**tensors, name: change(tensors[name]).contiguous()}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            StreamedModel(folder)


def test_a_routers_bias_keeps_its_dtype_and_survives_an_interruption(tmp_path: Path) -> None:
    """GLM-4.5V chooses experts by a bias that is stored in 32 bits: rounded, other experts would be chosen."""
    folder = write_tiny("glm4v_moe", tmp_path / "source")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("e_score_correction_bias")]
    tensors[name] = torch.tensor([0.1, 0.2, 0.3, 1 / 3])
    save_file(tensors, file, {"format": "pt"})
    source = StreamedModel(folder, torch.bfloat16)
    assert torch.equal(source.read([name])[name], tensors[name])
    quantize(folder, tmp_path / "out", recipe="rtn", scheme="w8a8")
    assert torch.equal(read_tensors(tmp_path / "out")[name], tensors[name])
    loaded = load_model(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(loaded.state_dict()[name], tensors[name])

    layer = load_model(folder).get_submodule("model.language_model.layers.1")
    architecture = architecture_of(load_model(folder).config)
    quantized = QuantizedLayer(1, layer, architecture, WeightQuantizer(get_scheme("w8a8"), torch.bfloat16))
    changed = {key: value + 1 for key, value in quantized.others().items()}
    quantized.restore({}, changed)
    assert torch.equal(layer.state_dict()["mlp.gate.e_score_correction_bias"], tensors[name] + 1)


def test_tensors_that_do_not_change_are_exported_as_wide_as_they_were(tmp_path: Path) -> None:
    folder = write_tiny("qwen3_5_moe", tmp_path / "source")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("layers.0.linear_attn.A_log")]
    tensors[name] = tensors[name].float() + 1e-4
    save_file(tensors, file, {"format": "pt"})
    quantize(folder, tmp_path / "out", recipe="rtn", scheme="w4a16")
    assert torch.equal(read_tensors(tmp_path / "out")[name], tensors[name])


def test_a_loaded_export_ends_its_replies_where_the_source_does(tmp_path: Path) -> None:
    folder = write_tiny("qwen3_vl_moe", tmp_path / "source")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    quantize(folder, tmp_path / "out", recipe="rtn", scheme="w4a16")
    assert load_model(tmp_path / "out").generation_config.eos_token_id == [7, 9]


@pytest.mark.parametrize("pattern", ["*.experts.1.*", "*.experts.*.down_proj"])
def test_experts_of_a_layer_have_one_scheme(tmp_path: Path, pattern: str) -> None:
    folder = write_tiny("qwen3_vl_moe", tmp_path / "source")
    mixed = replace(get_scheme("w4a16"), overrides=((pattern, "full_precision"),))
    with pytest.raises(ValueError, match="layer 0: an override gives some linears of its experts another scheme"):
        quantize(folder, tmp_path / "out", recipe="rtn", scheme=mixed)
    kept = replace(get_scheme("w4a16"), overrides=(("*.experts.*", "full_precision"),))
    quantize(folder, tmp_path / "out", recipe="rtn", scheme=kept)
    names = read_tensors(tmp_path / "out")
    assert f"{SHARED}.3.up_proj.weight" in names
    assert not any("experts" in name and "scale" in name for name in names)
    load_model(tmp_path / "out")


def test_an_engine_without_experts_is_refused_before_any_work(tmp_path: Path) -> None:
    folder = write_tiny("qwen3_vl_moe", tmp_path / "source")
    with pytest.raises(ValueError, match="transformers 5.23 does not run quantized experts; .* vllm, sglang"):
        quantize(folder, tmp_path / "out", recipe="rtn", scheme="w4a16", engine="transformers")


def test_experts_of_8_bits_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, whole)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = f"{SHARED}.down_proj"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj \(F8_E4M3\) is a part of a quantized weight"):
        StreamedModel(folder)
