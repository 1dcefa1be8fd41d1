"""In every family, a model read from disk layer by layer equals the model in memory, even with activations on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import TINY, batches_of, write_tiny

from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import calibrate, calibrate_layers
from tlq.export.loading import load_model
from tlq.importance.gradients import score_batches, score_tokens
from tlq.importance.losses import AnswerLoss, BlockLoss
from tlq.importance.pool import Importance, TokenPool
from tlq.models import reading
from tlq.models.conversion import StackedTensor
from tlq.models.decoder import enter_decoder
from tlq.models.stored import open_tensors, tensors_of
from tlq.models.streaming import ResidentModel, StreamedModel
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import RECIPES
from tlq.runtime.activations import Activations, HostMemory
from tlq.samples import Batch

every_family = pytest.mark.parametrize("name", list(TINY))


@every_family
def test_streamed_weights_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Names on disk, tied embeddings and buffers: the decoder's input and every layer's weights."""
    path = write_tiny(name, tmp_path)
    resident, streamed = ResidentModel(load_model(path)), StreamedModel(path)
    batches = batches_of(name)
    with resident.entrance() as one, streamed.entrance() as other:
        calls = [enter_decoder(model, resident.architecture, batches, streamed.device) for model in (one, other)]
    for expected, found in zip(*calls, strict=True):
        # Bits may differ: weights that transformers maps from a file are aligned otherwise.
        torch.testing.assert_close(found.hidden_states, expected.hidden_states, rtol=1e-5, atol=1e-5)
        assert [set(kwargs) for kwargs in expected.kwargs] == [set(kwargs) for kwargs in found.kwargs]
    count = 0
    order = range(len(resident.architecture.groups))
    for (_, expected_layer), (_, layer) in zip(resident.layers(order), streamed.layers(order), strict=True):
        weights = layer.state_dict()
        for key, value in expected_layer.state_dict().items():
            assert torch.equal(weights[key], value), key
            count += 1
    assert count == len([key for key in streamed.weight_map if key.startswith(streamed.architecture.layers)])
    with streamed.head() as head:
        assert torch.equal(head.get_output_embeddings().weight, resident.skeleton.get_output_embeddings().weight)
    assert all(parameter.is_meta for parameter in streamed.skeleton.parameters())


@every_family
def test_scores_and_codes_are_those_of_the_model_in_memory(name: str, tmp_path: Path) -> None:
    path = write_tiny(name, tmp_path)
    model, batches = load_model(path), batches_of(name)
    expected, found = (score_tokens(source, batches) for source in (ResidentModel(model), StreamedModel(path)))
    for key, values in expected.items():
        np.testing.assert_allclose(values, found[key], rtol=1e-3, atol=1e-7)
    weights = {key: [batch.valid.float() for batch in batches] for key in expected}
    recipe = replace(RECIPES["tlq-c"], equalization=replace(RECIPES["tlq-c"].equalization, points=3))
    job = CalibrationJob(recipe, WeightQuantizer(get_scheme("w3a16"), torch.bfloat16), batches, weights)
    in_memory = calibrate(model, job)
    for expected_layer, layer in zip(in_memory.layers, calibrate_layers(StreamedModel(path), job), strict=True):
        for linear, weight in expected_layer.weights.items():
            assert float((weight.codes != layer.weights[linear].codes).float().mean()) < 0.01, linear
        assert set(expected_layer.others) == set(layer.others)


@pytest.mark.parametrize("loss", [AnswerLoss(), BlockLoss(get_scheme("w3a16"), torch.bfloat16)])
def test_scores_do_not_depend_on_memory(tiny_checkpoint: Path, batches: list[Batch], loss: AnswerLoss) -> None:
    """Without any memory budget micro-batches are scored one by one, and hidden states are on disk."""
    model = StreamedModel(tiny_checkpoint)
    plenty, none = HostMemory(2**40), HostMemory(0)
    together, alone = (list(score_batches(model, batches, range(len(batches)), loss, each)) for each in (plenty, none))
    assert (plenty.spilled, plenty.used) == (0, 0)
    assert none.spilled > 0
    for one, other in zip(together, alone, strict=True):
        assert one.batch == other.batch
        assert all(torch.equal(values, other.values[key]) for key, values in one.values.items())


def test_the_block_loss_is_the_error_of_rounding_alone(
    tiny_checkpoint: Path, batches: list[Batch], scores: Importance
) -> None:
    """By finite differences: moving one linear's output by d changes the block's squared error by about g d."""
    model = load_model(tiny_checkpoint).double()
    found = score_tokens(ResidentModel(model), batches, BlockLoss(get_scheme("w3a16"), torch.bfloat16))
    assert set(found) == set(scores)
    pool = TokenPool.of(batches)
    for key, values in found.items():
        assert values.shape == scores[key].shape
        assert np.isfinite(values).all()
        assert all(each.max() > 0 for each in pool.split(values))
    layer = model.model.language_model.layers[1]  # type: ignore[union-attr]
    exact = score_tokens(ResidentModel(model), batches, BlockLoss(get_scheme("w8a8"), torch.float32))
    assert np.mean(exact[1, "down"]) < 0.1 * np.mean(found[1, "down"])
    assert not any(module._forward_hooks for module in layer.modules())


def sharded(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint in two files with an index."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_sharded_checkpoint_is_read_by_its_index(tiny_checkpoint: Path, tmp_path: Path) -> None:
    one, other = StreamedModel(tiny_checkpoint), StreamedModel(sharded(tiny_checkpoint, tmp_path / "sharded"))
    for name, value in one.read(one.weight_map).items():
        assert torch.equal(other.read([name])[name], value)
    assert len({place.file for place in other.weight_map.values()}) == 2


def drop_a_tensor(folder: Path) -> None:
    for file in folder.glob("part-*.safetensors"):
        tensors = load_file(file)
        tensors.pop("model.layers.1.mlp.down_proj.weight", None)
        save_file(tensors, file)


def drop_a_file(folder: Path) -> None:
    (folder / "part-2.safetensors").unlink()


def drop_the_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_a_tensor, "1 weights are missing, the first is model.language_model.layers.1.mlp.down_proj.weight"),
        (drop_a_file, "part-2.safetensors: not found, but model.safetensors.index.json names it"),
        (
            drop_the_index,
            "has no model.safetensors, no model.safetensors.index.json, .*; give a checkpoint with its weights",
        ),
    ],
)
def test_an_incomplete_checkpoint_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    folder = sharded(tiny_checkpoint, tmp_path / "sharded")
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        StreamedModel(folder)


def test_activations_beyond_the_budget_are_written_to_disk_and_read_back(tmp_path: Path) -> None:
    memory = HostMemory(100, tmp_path)
    values = [torch.arange(10.0) + number for number in range(4)]
    kept = Activations(memory, torch.device("cpu"), values)
    assert (memory.used, memory.spilled) == (80, 80)
    assert list(tmp_path.iterdir()) == []  # a file without a name: nothing is left when the process dies
    assert all(torch.equal(one, other) for one, other in zip(kept, values, strict=True))
    kept[3] = torch.zeros(1, dtype=torch.bfloat16)
    assert kept[3].dtype == torch.bfloat16
    kept.clear()
    assert memory.used == 0
    assert not list(tmp_path.rglob("*.safetensors"))


def test_of_the_embeddings_only_the_tokens_rows_are_read(tiny_checkpoint: Path, batches: list[Batch]) -> None:
    model, whole = StreamedModel(tiny_checkpoint), load_model(tiny_checkpoint)
    embeddings: Any = model.skeleton.get_input_embeddings()
    output: Any = model.skeleton.get_output_embeddings()
    expected: Any = whole.get_input_embeddings()
    tokens = batches[0].input_ids
    with model.entrance():
        assert torch.equal(embeddings(tokens), expected(tokens))
        assert len(embeddings.weight) == len(tokens.unique()) < expected.num_embeddings
        assert output.weight.is_meta
    assert embeddings.weight.is_meta
    assert embeddings.padding_idx == expected.padding_idx


@pytest.mark.parametrize("limit", [1, 5000, 2**28])
def test_tensors_read_in_parts_are_the_same(tiny_checkpoint: Path, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def counted(file: Path) -> Any:
        opened.append(file)
        return open_tensors(file)

    model = StreamedModel(tiny_checkpoint)
    expected = load_file(tiny_checkpoint / "model.safetensors")
    monkeypatch.setattr(reading, "MAPPED_BYTES", limit)
    monkeypatch.setattr(reading, "open_tensors", counted)
    for dtype in (torch.float32, torch.float64):
        tensors = model.read(model.weight_map, dtype)
        assert set(tensors) == set(model.weight_map)
        for name, tensor in tensors.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, expected[model.weight_map[name].key].to(dtype))
    assert bool(opened) == (limit < 2**28)  # large tensors were read in several parts


@pytest.mark.parametrize("limit", [100, 2**28])
def test_a_weight_that_is_not_finite_is_found_in_every_part(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAPPED_BYTES", limit)
    weights = {"a": torch.ones(3), "large": torch.ones(40, 8), "z": torch.ones(2, dtype=torch.int64)}
    save_file(weights, tmp_path / "good.safetensors")
    reading.check_finite(tmp_path / "good.safetensors")
    for row in (0, 17, 39):
        damaged = weights["large"].clone()
        damaged[row, 3] = torch.inf
        save_file({**weights, "large": damaged}, tmp_path / "bad.safetensors")
        with pytest.raises(FloatingPointError, match="bad.safetensors: large is not finite"):
            reading.check_finite(tmp_path / "bad.safetensors")


def test_a_tensor_stored_in_several_is_put_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MAPPED_BYTES", 64)
    rows = {"a": torch.randn(20, 8), "b": torch.randn(12, 8)}
    save_file(rows, tmp_path / "model.safetensors")
    stacked = StackedTensor.of(list(tensors_of(tmp_path / "model.safetensors").values()))
    with open_tensors(stacked.file) as opened:
        assert len(list(reading.row_parts(stacked, opened))) == 1
        found = reading.copy_of(stacked, opened, torch.device("cpu"), torch.float64)
    assert torch.equal(found, torch.cat([rows["a"], rows["b"]]).double())
