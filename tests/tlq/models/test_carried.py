"""Keys and values that layers leave for later ones: both streams, gradients, resuming, and what is on disk."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exporting import read_tensors
from support.families import batches_of, write_tiny
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from tlq.api import quantize
from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import LayerLoop, LayerResult, calibrate_layers
from tlq.export.loading import load_model
from tlq.importance.gradients import score_tokens
from tlq.importance.losses import AnswerLoss, BlockLoss, Segment
from tlq.importance.pool import TokenPool
from tlq.models.architectures import architecture_of, get_linear
from tlq.models.linear_groups import is_expert
from tlq.models.streaming import ResidentModel, StreamedModel
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import RECIPES
from tlq.samples import Batch

#: Layers 2 and 3 attend with the keys and values of layers 0 and 1.
SHARED_KV = "gemma4-shared_kv"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(SHARED_KV, tmp_path_factory.mktemp("shared_kv"))


def plain_importance(model: Any, batch: Batch) -> dict[tuple[int, str], Tensor]:
    """Mean |dL/dy| of every token of one sample, by autograd through the whole model."""
    architecture = architecture_of(model.config)
    outputs: dict[tuple[int, str], list[Tensor]] = {}
    handles = []
    for index, layer in enumerate(architecture.decoder_layers(model)):
        for group in (group for group in architecture.groups[index] if group.experts is None):
            for path in group.linears:
                into = outputs.setdefault((index, group.name), [])
                handles.append(
                    get_linear(layer, path).register_forward_hook(lambda _m, _a, y, into=into: into.append(y))
                )
    model.requires_grad_(True)
    logits = model(**batch.encode(), use_cache=False).logits
    is_answer = batch.is_answer[:, 1:]
    loss = nn.functional.cross_entropy(logits[:, :-1][is_answer], batch.input_ids[:, 1:][is_answer])
    every = [output for parts in outputs.values() for output in parts]
    gradients = iter(torch.autograd.grad(loss, every))
    for handle in handles:
        handle.remove()
    model.requires_grad_(False)
    return {key: torch.cat([next(gradients)[0] for _ in parts], -1).abs().mean(-1) for key, parts in outputs.items()}


@pytest.mark.parametrize("name", ["gemma4", "gemma4-experts", SHARED_KV, "gemma4_unified", "muse_glimmer"])
@pytest.mark.parametrize("keeps_graph", [True, False])
def test_importance_equals_autograd_through_the_whole_model(
    tmp_path: Path, name: str, keeps_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not keeps_graph:
        monkeypatch.setenv("TLQ_DEVICE_MEMORY", "0")
    path, batches = write_tiny(name, tmp_path), batches_of(name, batch_size=1)
    scores, pool, model = score_tokens(StreamedModel(path), batches), TokenPool.of(batches), load_model(path)
    for batch in batches:
        expected = plain_importance(model, batch)
        assert set(expected) == {key for key in scores if not key[1].startswith("experts")}
        for key, values in expected.items():
            found = pool.split(scores[key])[batch.samples[0]]
            np.testing.assert_allclose(found, values.numpy(), rtol=1e-3, atol=1e-7, err_msg=str(key))


def test_gradients_flow_from_later_layers_into_the_keys_that_they_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them the importance of the two layers that leave keys and values is another one, and only theirs."""
    batches = batches_of(SHARED_KV)
    with_them = score_tokens(StreamedModel(checkpoint), batches)
    gradients = Segment.gradients
    monkeypatch.setattr(Segment, "gradients", lambda self, gradient, _carried: gradients(self, gradient))
    without = score_tokens(StreamedModel(checkpoint), batches)
    for layer, group in with_them:
        change = np.abs(with_them[layer, group] - without[layer, group]).max() / with_them[layer, group].max()
        assert (change > 0.05) if layer < 2 and group == "qkv" else (change < 1e-6 or layer < 2), (layer, group)


@pytest.mark.parametrize("memory", ["0", "100"])
def test_scores_do_not_depend_on_where_hidden_states_are(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    """On disk, one micro-batch in a pass: the same bits."""
    batches = batches_of(SHARED_KV, batch_size=1)
    for loss in (AnswerLoss(), BlockLoss(get_scheme("w3a16"), torch.bfloat16)):
        expected = score_tokens(StreamedModel(checkpoint), batches, loss)
        with monkeypatch.context() as patched:
            patched.setenv("TLQ_DEVICE_MEMORY", "0")
            patched.setenv("TLQ_HOST_MEMORY", memory)
            found = score_tokens(StreamedModel(checkpoint), batches, loss)
        for key, values in expected.items():
            np.testing.assert_array_equal(values, found[key], err_msg=str(key))


def test_the_error_of_a_layer_that_reads_keys_is_measured_with_the_original_ones(checkpoint: Path) -> None:
    """VLMQ's loss: only the layer's own weights are rounded."""
    model, (batch, *_) = load_model(checkpoint), batches_of(SHARED_KV, batch_size=1)
    scheme = get_scheme("w3a16")
    scores = score_tokens(ResidentModel(model), [batch], BlockLoss(scheme, torch.bfloat16))
    architecture, (seen, kept) = architecture_of(model.config), ({}, [])
    layer = architecture.decoder_layers(model)[2]
    handle = layer.register_forward_pre_hook(
        lambda _m, args, named: seen.update(args=args, named=named), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch.encode(), use_cache=False)
    handle.remove()
    args = seen["args"][0].detach().requires_grad_(), *seen["args"][1:]
    with torch.no_grad():
        original = layer(*args, **seen["named"])
    quantizer = WeightQuantizer(scheme, torch.bfloat16)
    for path in architecture.linears(2):
        linear = get_linear(layer, path)
        linear.weight.data = quantizer.fake_quantize(linear.weight.data)
    handle = layer.self_attn.q_proj.register_forward_hook(lambda _m, _a, y: kept.append(y))
    output = layer(*args, **seen["named"])
    (gradient,) = torch.autograd.grad((output - original).square().sum(), kept)
    handle.remove()
    np.testing.assert_allclose(scores[2, "qkv"], gradient[0].abs().mean(-1).numpy(), rtol=1e-3, atol=1e-8)


def job_of(recipe: str, batches: list[Batch], model: StreamedModel) -> CalibrationJob:
    quick = replace(RECIPES[recipe], equalization=replace(RECIPES[recipe].equalization, points=3))
    groups = model.architecture.groups
    weights = {
        (index, group.name): [batch.valid.float() for batch in batches]
        for index, layer in enumerate(groups)
        for group in layer
        if not is_expert(group.name)
    }
    return CalibrationJob(quick, WeightQuantizer(get_scheme("w3a16"), torch.bfloat16), batches, weights)


def inputs_of_last_layer(model: Any, batch: Batch) -> Tensor:
    seen: list[Tensor] = []
    last = architecture_of(model.config).decoder_layers(model)[-1]
    handle = last.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(**batch.encode(), use_cache=False)
    handle.remove()
    return seen[0][batch.valid]


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["tlq", "tlq-c", "awq", "mbq"])
def test_each_stream_attends_with_its_own_keys(checkpoint: Path, recipe: str) -> None:
    """Exposed, those of the quantized layers with all their groups, whatever the search for scales tried."""
    batches, original = batches_of(SHARED_KV), load_model(checkpoint)
    model = copy.deepcopy(original)
    loop = LayerLoop(ResidentModel(model), job_of(recipe, batches, StreamedModel(checkpoint)))
    for index, layer in enumerate(architecture_of(model.config).decoder_layers(model)):
        loop.solve_layer(index, layer)
    exposed, full = loop.streams.exposed, loop.streams.full
    assert len(exposed) + len(full) > 0
    for number, batch in enumerate(batches):
        plain, quantized = (inputs_of_last_layer(each, batch) for each in (original, model))
        assert float((plain - quantized).abs().max()) > 0.1
        if loop.streams.sees_exposed:
            torch.testing.assert_close(exposed[number][batch.valid], quantized, rtol=1e-4, atol=1e-4)
        if loop.streams.sees_full_precision:
            torch.testing.assert_close(full[number][batch.valid], plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_a_run_that_continues_finds_the_keys_of_finished_layers(checkpoint: Path, finished: int) -> None:
    model, batches = StreamedModel(checkpoint), batches_of(SHARED_KV)
    job = job_of("tlq-c", batches, model)
    once = list(calibrate_layers(model, job))

    def done(layer: LayerResult) -> Any:
        return lambda: layer

    again = list(calibrate_layers(model, job, {layer.index: done(layer) for layer in once[:finished]}))
    assert [layer.index for layer in again] == [layer.index for layer in once[finished:]]
    for first, second in zip(once[finished:], again, strict=True):
        for path, weight in first.weights.items():
            assert torch.equal(weight.codes, second.weights[path].codes), path
            assert torch.equal(weight.scale, second.weights[path].scale), path


def test_a_streamed_model_has_the_codes_of_the_model_in_memory(checkpoint: Path) -> None:
    streamed, batches = StreamedModel(checkpoint), batches_of(SHARED_KV)
    job = job_of("tlq", batches, streamed)
    with streamed.whole() as resident:
        resident.skeleton.requires_grad_(False)
        originals = {name: value.clone() for name, value in resident.skeleton.state_dict().items()}
        in_memory = list(calibrate_layers(resident, job))
        assert any(not torch.equal(value, originals[name]) for name, value in resident.skeleton.state_dict().items())
    for expected, found in zip(in_memory, calibrate_layers(StreamedModel(checkpoint), job), strict=True):
        assert set(expected.weights) == set(found.weights)
        for path, weight in expected.weights.items():
            assert torch.equal(weight.codes, found.weights[path].codes), path
            assert torch.equal(weight.scale, found.weights[path].scale), path
        for name, value in expected.others.items():
            assert torch.equal(value, found.others[name]), name


def test_keys_that_no_layer_computes_are_left_out(checkpoint: Path, tmp_path: Path) -> None:
    """Gemma's checkpoints hold keys and values of layers that share those of others; nothing reads them."""
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    prefix = "model.language_model.layers"
    unread = [f"{prefix}.{index}.self_attn.{name}.weight" for index in (2, 3) for name in ("k_proj", "v_proj")]
    norm = f"{prefix}.2.self_attn.k_norm.weight"
    more = {name: torch.ones(64, 128, dtype=torch.bfloat16) for name in unread} | {norm: torch.ones(32)}
    save_file(tensors | more, source / "model.safetensors", {"format": "pt"})
    assert set(StreamedModel(source).unnamed) == {norm}
    quantize(source, tmp_path / "out", recipe="rtn", scheme="w4a16")
    quantize(checkpoint, tmp_path / "without", recipe="rtn", scheme="w4a16")
    found, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "without")
    assert set(found) == {*expected, norm}
    assert f"{prefix}.0.self_attn.k_proj.weight_packed" in found
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert not [pattern for pattern in config["ignore"] if "k_proj" in pattern or "v_proj" in pattern]
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for batch in batches_of(SHARED_KV):
        with torch.no_grad():
            logits, same = (each(**batch.encode()).logits for each in (loaded, load_model(tmp_path / "without")))
        torch.testing.assert_close(logits, same, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma4", SHARED_KV, "muse_glimmer"])
@pytest.mark.parametrize("kept", ["w8a8", "full_precision"])
def test_engines_find_one_scheme_for_all_that_they_fuse(tmp_path: Path, name: str, kept: str) -> None:
    """Engines keep q, k and v in one weight, also of a layer that lacks some, and look for the scheme of each.

    vLLM calls the gate of Muse Glimmer's attention ``output_gate_proj``.
    """
    gate = ("output_gate_proj",) if name == "muse_glimmer" else ()
    source = write_tiny(name, tmp_path / "source")
    architecture = StreamedModel(source).architecture
    last = len(architecture.groups) - 1
    mixed = replace(get_scheme("w4a8"), overrides=((f"*.layers.{last}.self_attn.*", kept),))
    quantize(source, tmp_path / "out", recipe="rtn", scheme=mixed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]

    def schemes(path: str) -> list[int | None]:
        groups = config["config_groups"].values()
        named = [group for group in groups if any(re.match(target[3:], path) for target in group["targets"])]
        ignored = any(re.match(pattern[3:], path) for pattern in config["ignore"] if pattern.startswith("re:"))
        return [None] if ignored else [group["weights"]["num_bits"] for group in named]

    for index, bits in ((0, 4), (last, 8 if kept == "w8a8" else None)):
        for linear in ("q_proj", "k_proj", "v_proj", *gate):
            found = schemes(f"model.language_model.layers.{index}.self_attn.{linear}")
            assert found == [bits] or (kept == "full_precision" and bits == 4 and found == []), (index, linear)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for batch in batches_of(name):
        logits, same = (each(**batch.encode()).logits[batch.valid] for each in (plain, load_model(tmp_path / "out")))
        torch.testing.assert_close(logits, same, rtol=1e-4, atol=1e-4)


def test_embeddings_per_layer_are_read_by_row_and_their_linears_keep_full_precision(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = StreamedModel(checkpoint)
    assert not [name for name in model.entrance_names if "embed_tokens" in name]
    assert [name for name in model.outside_names if "embed_tokens_per_layer" in name]
    quantize(checkpoint, tmp_path / "out", recipe="rtn", scheme="w4a16")
    found, source = read_tensors(tmp_path / "out"), load_file(checkpoint / "model.safetensors")
    kept = [name for name in source if "per_layer" in name]
    assert len([name for name in kept if ".layers.3." in name]) == 3
    for name in kept:
        assert torch.equal(found[name], source[name]), name
