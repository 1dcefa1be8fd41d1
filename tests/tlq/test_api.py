"""The Python API: a checkpoint in, a checkpoint out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import tlq
from tlq import quantize
from tlq.importance.token_set import TokenBudget
from tlq.models.checkpoint import load_model
from tlq.quantization.equalization import Equalization
from tlq.recipes import Recipe
from tlq.samples import Sample


@pytest.mark.parametrize("recipe", ["rtn", "awq", "mbq", "tlq-c"])
def test_a_checkpoint_is_quantized_in_one_call(
    tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path, recipe: str
) -> None:
    reports = tlq.quantize(
        tiny_checkpoint,
        tmp_path / "out",
        calibration=samples,
        recipe=recipe,
        scheme="w3a16",
        budget=TokenBudget(300),
        batch_size=3,
    )
    report = json.loads((tmp_path / "out/calibration.json").read_text())
    assert report["recipe"]["name"] == recipe
    assert len(report["groups"]) == 8
    assert [layer["groups"] for layer in reports] == [report["groups"][:4], report["groups"][4:]]
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    quantized, original = (load_model(path).get_parameter(name) for path in (tmp_path / "out", tiny_checkpoint))
    assert 0 < float((quantized - original).norm() / original.norm()) < 0.5
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("recipe", ["mbq", "tlq-c"])
def test_a_checkpoint_is_quantized_in_bfloat16(
    tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path, recipe: str
) -> None:
    """As on a GPU: errors are added up in float32, layers compute in bfloat16. mbq looks at the parent's error only."""
    budget = TokenBudget(300)
    reports = quantize(tiny_checkpoint, tmp_path / "out", samples, recipe, "w3a16", budget=budget, dtype="bfloat16")
    assert all(group["error_after"] < 1.5 * group["error_before"] for layer in reports for group in layer["groups"])


def test_rtn_needs_no_samples_and_others_do(tiny_checkpoint: Path, tmp_path: Path) -> None:
    quantize(tiny_checkpoint, tmp_path / "rtn", [], "rtn", "w4a8")
    with pytest.raises(ValueError, match="no calibration samples"):
        quantize(tiny_checkpoint, tmp_path / "awq", [], "awq", "w3a16")


def test_a_folder_with_files_is_not_written_over(tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(FileExistsError, match="not empty"):
        quantize(tiny_checkpoint, tmp_path, samples, "rtn", "w3a16")
    assert (tmp_path / "precious").read_text() == "data"


def test_the_package_has_this_one_name() -> None:
    with pytest.raises(AttributeError, match="module 'tlq' has no attribute 'quantise'"):
        tlq.quantise  # noqa: B018


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
