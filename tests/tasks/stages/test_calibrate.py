"""Stage `calibrate`, end to end on the real outputs of the earlier stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from support.exporting import read_tensors
from transformers import AutoModelForImageTextToText

from tasks.config.params import ParamsError, section
from tasks.config.sections import CalibsetParams
from tasks.files import CALIBSET, IMPORTANCE, read_importance, read_pool
from tasks.stages import calibrate
from tasks.stages.calibrate import weights_of
from tlq import job
from tlq.calibration import loop as calibration
from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import LayerResult
from tlq.export.loading import load_model
from tlq.importance.token_weights import all_tokens, to_batches
from tlq.importance.weighting import Weighting
from tlq.models.processor import load_processor
from tlq.models.streaming import StreamedModel
from tlq.recipes import RECIPES
from tlq.samples import Batch, encode_batches

Stage = Callable[[str, str], Path]


@pytest.fixture
def workplace(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project that a test may change."""
    shutil.copytree(project / "data", tmp_path / "data")
    shutil.copyfile(project / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stage(workplace: Path) -> Stage:
    def run(recipe: str, scheme: str) -> Path:
        calibrate.main(recipe, scheme)
        return workplace / "models" / f"{recipe}-{scheme}"

    return run


def change_params(**sections: Any) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump({**params, **sections}))


@torch.no_grad()
@pytest.mark.parametrize(("recipe", "scheme"), [("rtn", "w3a16"), ("mbq", "w4a8"), ("tlq", "w3a16"), ("tlq-c", "w4a8")])
def test_the_checkpoint_is_the_model_calibrated_in_memory(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, batches: list[Batch], recipe: str, scheme: str
) -> None:
    """Loaded with transformers alone, logits within 1e-4 of a model that was quantized in memory."""
    kept: dict[str, Any] = {}
    layers = job.calibrate_layers

    def keeping(model: StreamedModel, job: CalibrationJob, *rest: Any) -> Iterator[LayerResult]:
        kept["in memory"] = load_model(model.folder)
        calibration.calibrate(kept["in memory"], job)
        return layers(model, job, *rest)

    monkeypatch.setattr(job, "calibrate_layers", keeping)
    path = stage(recipe, scheme)
    loaded = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    batch = batches[0]
    difference = (loaded(**batch.encode()).logits - kept["in memory"](**batch.encode()).logits)[batch.valid]
    assert float(difference.abs().max()) < 1e-4
    assert (
        load_processor(path).tokenizer("hello")["input_ids"]
        == load_processor(_source()).tokenizer("hello")["input_ids"]
    )

    report = json.loads((path / "calibration.json").read_text())
    assert (report["recipe"]["name"], report["scheme"]["name"]) == (recipe, scheme)
    assert [(row["layer"], row["group"]) for row in report["groups"]] == [
        (layer, group) for layer in (0, 1) for group in ("qkv", "o_proj", "gate_up", "down")
    ]
    for row in report["groups"]:
        assert row["seconds"] >= 0
        if recipe.startswith("tlq"):
            assert 0 < row["effective_tokens"] <= row["tokens"] <= 64
            assert row["error_after"] < row["error_before"]


def _source() -> str:
    return yaml.safe_load(Path("params.yaml").read_text())["model"]["path"]


def test_two_runs_write_the_same_bytes(stage: Stage) -> None:
    first = {file.name: file.read_bytes() for file in stage("tlq", "w3a16").iterdir()}
    second = {file.name: file.read_bytes() for file in stage("tlq", "w3a16").iterdir()}
    timed = "calibration.json"
    assert first.keys() == second.keys()
    assert {name: data for name, data in first.items() if name != timed} == {
        name: data for name, data in second.items() if name != timed
    }


def test_rounding_to_nearest_needs_no_data(stage: Stage, workplace: Path) -> None:
    shutil.rmtree(workplace / "data")
    assert load_model(stage("rtn", "w4a8"))


@pytest.mark.parametrize(
    ("missing", "recipe", "needed"),
    [("calibset", "tlq", "calibset"), ("importance", "mbq", "importance"), ("prepared", "gptq", "prepare")],
)
def test_a_missing_input_names_the_stage_that_makes_it(
    stage: Stage, workplace: Path, missing: str, recipe: str, needed: str
) -> None:
    shutil.rmtree(workplace / "data" / missing)
    with pytest.raises(FileNotFoundError, match=f"not found; run `dvc repro {needed}` first"):
        stage(recipe, "w3a16")
    assert not (workplace / "models").exists()


def test_an_interrupted_export_leaves_the_old_checkpoint(
    stage: Stage, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stage("rtn", "w3a16")
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def interrupted(out: Path, *_: Any) -> None:
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "finish_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stage("rtn", "w3a16")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    calibrate.main("rtn", "w3a16")
    assert [entry.name for entry in (workplace / "models").iterdir()] == ["rtn-w3a16"]


def test_a_token_set_chosen_by_another_importance_is_refused(stage: Stage) -> None:
    change_params(calibset={"source": "modality", "budget": {"tokens_per_layer": 64}})
    with pytest.raises(ParamsError, match="make recipes.tlq.importance and calibset.source equal"):
        stage("tlq", "w3a16")


@pytest.mark.parametrize(
    ("recipe", "scheme", "message"),
    [
        ("best", "w3a16", "unknown recipe 'best'; choose one of rtn"),
        ("rtn", "w9a16", "unknown scheme 'w9a16'; choose one of w2a16"),
    ],
)
def test_unknown_choices_list_the_known_ones(stage: Stage, recipe: str, scheme: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stage(recipe, scheme)


def test_a_group_size_from_params_is_used_or_refused(stage: Stage) -> None:
    change_params(calibrate={"group_size": 32})
    report = json.loads((stage("rtn", "w3a16") / "calibration.json").read_text())
    assert report["scheme"]["group_size"] == 32
    assert load_model(stage("rtn", "w4a8"))  # it has no groups to resize
    change_params(calibrate={"group_size": 48})
    with pytest.raises(ValueError, match=r"q_proj: scheme w3a16 has groups of 48, which do not divide"):
        stage("rtn", "w3a16")


# -- which token weighs what ------------------------------------------------------------------------------------------


@pytest.fixture
def encoded(workplace: Path, tiny_processor: Any) -> list[Batch]:
    from tasks.files import PREPARED, read_samples

    samples = read_samples(PREPARED / "calibration.parquet", 5)
    image_id = tiny_processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return encode_batches(samples, tiny_processor, image_id, 2, 512)


def unpadded(weights: list[torch.Tensor], batches: list[Batch]) -> dict[int, np.ndarray]:
    """Weights per sample; asserts that padding has no weight."""
    found = {}
    for weight, batch in zip(weights, batches, strict=True):
        assert float(weight[~batch.valid].abs().sum()) == 0
        for row, sample in enumerate(batch.samples):
            found[sample] = weight[row][batch.valid[row]].numpy()
    return found


def test_only_tokens_of_the_set_have_a_weight(encoded: list[Batch]) -> None:
    params, pool = section("calibset", CalibsetParams), read_pool(IMPORTANCE)
    of_pool = weights_of(RECIPES["tlq"], params, pool)
    weights = to_batches(of_pool, encoded)
    tokens = pd.read_parquet(CALIBSET / "tokens.parquet")
    assert set(weights) == {(layer, group) for layer in (0, 1) for group in ("qkv", "o_proj", "gate_up", "down")}
    for (layer, group), part in tokens.groupby(["layer", "group"]):
        found = unpadded(list(weights[layer, group]), encoded)  # type: ignore[index]
        assert sum((values > 0).sum() for values in found.values()) == len(part)
        for row in part.to_dict("records"):
            assert found[row["sample"]][row["position"]] == np.float32(row["weight"])


def test_token_weights_follow_the_importance_of_the_recipe(encoded: list[Batch]) -> None:
    params = section("calibset", CalibsetParams)
    scores, pool = read_importance(IMPORTANCE), read_pool(IMPORTANCE)
    for name in ("awq", "mbq"):
        weights = to_batches(weights_of(RECIPES[name], params, pool), encoded)
        expected = all_tokens(scores, pool, RECIPES[name].importance, Weighting())
        assert set(weights) == set(expected.groups) == set(scores)
        for key in scores:
            found = unpadded(list(weights[key]), encoded)
            for sample, values in enumerate(pool.split(expected.groups[key].weights)):
                np.testing.assert_array_equal(found[sample], values)


def test_mbq_may_count_answers_alone_as_text(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    params, pool = section("calibset", CalibsetParams), read_pool(IMPORTANCE)
    params = params.model_copy(update={"weighting": Weighting(text="answer")})
    weights = weights_of(RECIPES["mbq"], params, pool)
    for tokens in weights.groups.values():
        assert np.array_equal(tokens.weights > 0, pool.is_image | pool.is_answer)


def test_named_layers_keep_full_precision(stage: Stage) -> None:
    change_params(calibrate={"overrides": {"*.layers.0.*": "full_precision"}})
    names = read_tensors(stage("rtn", "w3a16"))
    packed = {name.split("layers.")[1][0] for name in names if name.endswith(".weight_packed")}
    assert packed == {"1"}
