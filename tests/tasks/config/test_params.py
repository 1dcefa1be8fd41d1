"""params.yaml: parsed once, strictly, with errors of one line that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tasks.config.params import ParamsError, read, read_recipe, section
from tasks.config.sections import SECTIONS, CalibsetParams, EvaluateParams, ModelParams, PrepareParams, VariantParams
from tlq.recipes import RECIPES

SHIPPED = Path(__file__).parents[3] / "params.yaml"


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def message_of(error: pytest.ExceptionInfo[ParamsError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_section_of_the_shipped_params_parses_and_is_known() -> None:
    assert list(read(SHIPPED)) == list(SECTIONS)
    for name, cls in SECTIONS.items():
        assert isinstance(section(name, cls, SHIPPED), cls)


@pytest.mark.parametrize("name", RECIPES)
def test_the_shipped_params_leave_recipes_as_they_are(name: str) -> None:
    assert read_recipe(name, SHIPPED) == RECIPES[name]


def test_dtype_becomes_a_torch_dtype() -> None:
    assert ModelParams(path="m", dtype="bfloat16").torch_dtype is torch.bfloat16


CALIBSET = {"budget": {"tokens_per_layer": 100}, "weighting": {"power": 0.5}, "seed": 3}


def test_nested_sections_become_nested_dataclasses(tmp_path: Path) -> None:
    params = section("calibset", CalibsetParams, write(tmp_path, {"calibset": CALIBSET}))
    assert (params.budget.tokens_per_layer, params.weighting.power, params.seed) == (100, 0.5, 3)
    assert params.budget.selection == "sample"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"sed": 1},
            "calibset.sed: unknown key; correct its spelling or remove it (known: budget, source, weighting, seed)",
        ),
        (
            {"budget": {"tokens_per_layer": 5, "selecton": "top"}},
            "calibset.budget.selecton: unknown key; correct its spelling or remove it (known: tokens_per_layer, ",
        ),
        ({"budget": {}}, "calibset.budget.tokens_per_layer: required key is missing; add it"),
        ({"seed": "many"}, "calibset.seed: must be a valid integer"),
        ({"source": "tokens"}, "calibset.source: must be 'uniform', 'modality', 'token' or 'block'"),
        ({"budget": {"tokens_per_layer": 0}}, "calibset.budget.tokens_per_layer is 0, must be at least 1"),
        ({"weighting": {"power": -1}}, "calibset.weighting.power is -1"),
        ({"seed": -1}, "calibset.seed: must be at least 0 (found -1)"),
        ({"budget": 7}, "calibset.budget: must be "),
    ],
)
def test_mistakes_name_the_key(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = write(tmp_path, {"calibset": {**CALIBSET, **changes}})
    with pytest.raises(ParamsError) as error:
        section("calibset", CalibsetParams, path)
    assert message_of(error).startswith(f"{path}: {expected}")


def test_the_value_found_is_shown(tmp_path: Path) -> None:
    path = write(tmp_path, {"calibset": {**CALIBSET, "seed": "many", "source": "tokens"}})
    with pytest.raises(ParamsError) as error:
        section("calibset", CalibsetParams, path)
    assert "(found 'many')" in message_of(error)
    assert "(found 'tokens')" in message_of(error)


def test_a_missing_section_or_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="section `calibset` is missing; add it"):
        section("calibset", CalibsetParams, write(tmp_path, {"model": {"path": "x"}}))
    with pytest.raises(ParamsError, match="not found; run from the project's top folder"):
        section("calibset", CalibsetParams, tmp_path / "none.yaml")


@pytest.mark.parametrize("content", ["a: [1", "just text", "- 1"])
def test_files_that_are_not_params_are_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ParamsError, match="not valid YAML|must be a mapping") as error:
        section("calibset", CalibsetParams, write(tmp_path, content))
    message_of(error)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"benchmarks": []}, "evaluate.benchmarks: must have at least 1 entry (found [])"),
        ({"benchmarks": [{"task": "a", "dat": "b"}]}, "evaluate.benchmarks.0.dat: unknown key; correct its spelling"),
        ({"batch_size": 0}, "evaluate.batch_size: must be at least 1 (found 0)"),
        ({"max_skipped": 2.0}, "evaluate.max_skipped: must be at most 1.0 (found 2.0)"),
    ],
)
def test_mistakes_inside_lists_and_choices_name_the_key(tmp_path: Path, values: dict[str, Any], expected: str) -> None:
    path = write(tmp_path, {"evaluate": {"benchmarks": [{"task": "demo_textvqa"}], **values}})
    with pytest.raises(ParamsError) as error:
        section("evaluate", EvaluateParams, path)
    assert message_of(error).startswith(f"{path}: {expected}")


def test_variants_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"variants": {"recipes": ["tlq", "tql"], "schemes": ["w3a16"]}})
    with pytest.raises(ParamsError, match="variants: unknown recipe 'tql'; choose one of rtn, "):
        section("variants", VariantParams, path)


def test_prepare_refuses_conversations_without_an_image_folder(tmp_path: Path) -> None:
    path = write(tmp_path, {"prepare": {"kind": "llava_json", "path": "a.json", "samples": 3}})
    with pytest.raises(ParamsError, match="prepare: kind llava_json needs image_root"):
        section("prepare", PrepareParams, path)


@pytest.mark.parametrize("prompt", ["", "  "])
def test_prepare_refuses_an_empty_prompt(prompt: str, tmp_path: Path) -> None:
    """It would reject every row of the table."""
    values = {"kind": "parquet", "path": "a.parquet", "samples": 3, "prompt": prompt}
    with pytest.raises(ParamsError, match="prepare.prompt is '.*', must be a question, or null"):
        section("prepare", PrepareParams, write(tmp_path, {"prepare": values}))


def test_an_override_changes_one_choice_and_keeps_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, {"recipes": {"tlq": {"equalization": {"duo": False}, "rounding": "compensated"}}})
    row = read_recipe("tlq", path)
    assert (row.equalization.duo, row.rounding) == (False, "compensated")
    assert row.equalization.method == RECIPES["tlq"].equalization.method
    assert read_recipe("mbq", path) == RECIPES["mbq"]


@pytest.mark.parametrize(
    ("overrides", "name", "expected"),
    [
        ({}, "tlq2", "unknown recipe 'tlq2'; choose one of rtn, smoothquant"),
        ({"tlqq": {"rounding": "nearest"}}, "tlq", "unknown recipe 'tlqq'; choose one of rtn, smoothquant"),
        ({"tlq": {"roundin": "nearest"}}, "tlq", "recipes.tlq.roundin: unknown key"),
        ({"tlq": {"equalization": {"duos": True}}}, "tlq", "recipes.tlq.equalization.duos: unknown key"),
        (
            {"tlq": {"rounding": "random"}},
            "tlq",
            "recipes.tlq.rounding is 'random'; choose one of nearest, compensated",
        ),
        ({"tlq": {"name": "mine"}}, "tlq", "recipes.tlq.name: a recipe cannot be renamed"),
    ],
)
def test_recipe_mistakes_name_the_recipe(tmp_path: Path, overrides: dict[str, Any], name: str, expected: str) -> None:
    path = write(tmp_path, {"recipes": overrides})
    with pytest.raises(ParamsError) as error:
        read_recipe(name, path)
    assert message_of(error).startswith(f"{path}: {expected}")
