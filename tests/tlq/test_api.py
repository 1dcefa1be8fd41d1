"""The Python API: a checkpoint in, a checkpoint out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import tlq
from tlq import CalibrationOptions, quantize
from tlq.api import Options, plan
from tlq.export.loading import load_model
from tlq.importance.token_set import TokenBudget
from tlq.models.architectures import architecture_of, input_widths
from tlq.quantization.equalization import Equalization
from tlq.quantization.ranges import Ranges
from tlq.recipes import Recipe
from tlq.samples import Sample


@pytest.mark.parametrize("recipe", ["rtn", "awq", "mbq", "tlq-c"])
def test_a_checkpoint_is_quantized_in_one_call(
    tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path, recipe: str
) -> None:
    result = tlq.quantize(
        tiny_checkpoint,
        tmp_path / "out",
        samples=samples,
        recipe=recipe,
        scheme="w3a16",
        budget=TokenBudget(300),
        batch_size=3,
    )
    report = json.loads((tmp_path / "out/calibration.json").read_text())
    assert report["recipe"]["name"] == recipe
    assert len(report["groups"]) == 8
    assert result.groups == report["groups"]
    assert [layer["groups"] for layer in result.layers] == [report["groups"][:4], report["groups"][4:]]
    assert result.folder == tmp_path / "out"
    assert 0 < sum(layer["seconds"] for layer in result.layers) <= result.seconds + 0.01
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    quantized, original = (load_model(path).get_parameter(name) for path in (tmp_path / "out", tiny_checkpoint))
    assert 0 < float((quantized - original).norm() / original.norm()) < 0.5
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_budget_by_width_gives_wide_groups_more_tokens(
    tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path
) -> None:
    budget = TokenBudget(1, "top", per_width=0.125)
    result = quantize(tiny_checkpoint, tmp_path / "out", samples, "tlq", "w3a16", budget=budget)
    skeleton = load_model(tiny_checkpoint)
    widths = input_widths(skeleton, architecture_of(skeleton.config))
    assert len(set(widths.values())) > 1
    for group in result.layers[0]["groups"]:  # in the last layer few tokens have a gradient
        assert group["tokens"] == widths[0, group["group"]] // 8


@pytest.mark.parametrize("recipe", ["mbq", "tlq-c"])
def test_a_checkpoint_is_quantized_in_bfloat16(
    tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path, recipe: str
) -> None:
    """As on a GPU, errors are added up in float32 and layers compute in bfloat16. mbq uses only the parent's error."""
    budget = TokenBudget(300)
    result = quantize(tiny_checkpoint, tmp_path / "out", samples, recipe, "w3a16", budget=budget, dtype="bfloat16")
    assert all(group["error_after"] < 1.5 * group["error_before"] for group in result.groups)


def test_rtn_needs_no_samples_and_others_do(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "rtn", [], "rtn", "w4a8")
    with pytest.raises(ValueError, match="no calibration samples"):
        quantize(tiny_checkpoint, tmp_path / "awq", [], "awq", "w3a16")


def test_a_folder_with_files_is_not_written_over(tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(FileExistsError, match="not empty"):
        quantize(tiny_checkpoint, tmp_path, samples, "rtn", "w3a16")
    assert (tmp_path / "precious").read_text() == "data"


def test_every_public_name_can_be_imported() -> None:
    assert set(tlq.__all__) == set(tlq._MODULES) <= set(dir(tlq))
    for name in tlq.__all__:
        assert getattr(tlq, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'tlq' has no attribute 'quantise'; it has .*quantize"):
        tlq.quantise  # noqa: B018


def test_options_are_the_same_as_keywords_and_as_a_dataclass() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(CalibrationOptions)}
    assert list(fields) == list(Options.__annotations__)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        quantize("model", "out", batchsize=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("gpu", "options", "expected"),
    [
        (False, {}, ("cpu", torch.float32)),
        (True, {}, ("cuda", torch.bfloat16)),
        (True, {"device": "cpu"}, ("cpu", torch.float32)),
        (True, {"dtype": "float32"}, ("cuda", "float32")),
        (False, {"dtype": "bfloat16"}, ("cpu", "bfloat16")),
    ],
)
def test_a_gpu_is_taken_with_the_checkpoint_dtype(
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    options: dict[str, Any],
    expected: tuple[str, torch.dtype | str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    device, dtype = CalibrationOptions(**options).place(tiny_checkpoint)
    assert (device.type, dtype) == expected


def test_the_result_has_a_model_card(tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path) -> None:
    result = quantize(tiny_checkpoint, tmp_path / "mine", samples, "mbq", "w3a16", batch_size=3)
    card = ModelCard.load(tmp_path / "mine/README.md")
    assert card.data.library_name == "transformers"
    assert {"compressed-tensors", "w3a16", "mbq"} <= set(card.data.tags)
    qkv = [group["error_after"] for group in result.groups if group["group"] == "qkv"]
    assert f"| {sum(qkv) / len(qkv):.4g} |" in card.text
    assert '.from_pretrained("mine"' in card.text
    assert "| calibration samples | 6 |" in card.text
    quantize(tiny_checkpoint, tmp_path / "rtn", [], "rtn", "w4a8")
    assert "the recipe needs no data" in (tmp_path / "rtn/README.md").read_text()


def test_no_samples_are_needed_for_a_scheme_whose_ranges_are_not_searched(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = Recipe("rtn", ranges=Ranges("search", most_bits=2))
    quantize(tiny_checkpoint, tmp_path / "one", [], recipe, "w3a16")
    quantize(tiny_checkpoint, tmp_path / "other", [], "rtn", "w3a16")
    one, other = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("*.safetensors")} for name in ("one", "other")
    )
    assert one
    assert one == other


def test_the_plan_has_a_part_for_importance_where_gradients_are_scored(
    tiny_checkpoint: Path, samples: list[Sample]
) -> None:
    assert [part.work for part in plan(tiny_checkpoint, samples, "tlq")] == ["importance", "calibration"]
    assert [part.work for part in plan(tiny_checkpoint, samples, "gptq")] == ["calibration"]
    assert plan(tiny_checkpoint, samples, "tlq", budget=TokenBudget(50))[1].counted == 50


def test_unknown_names_list_the_known_ones(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown recipe 'tql'; choose one of rtn"):
        quantize(tiny_checkpoint, tmp_path / "out", [], "tql")
    with pytest.raises(ValueError, match="unknown scheme 'w5'; choose one of w2a16"):
        quantize(tiny_checkpoint, tmp_path / "out", [], "rtn", "w5")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Equalization("grid", points=0), "equalization.points is 0, must be at least 2"),
        (lambda: Equalization("fixed", alpha=1.5), r"equalization.alpha is 1.5, must be in \[0, 1\]"),
        (lambda: Recipe("mine", damping=-0.1), "damping is -0.1, must not be negative"),
    ],
)
def test_choices_out_of_range_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
