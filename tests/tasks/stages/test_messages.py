"""Messages of the library name its own fields; messages of a stage name the key of params.yaml."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tasks.config.params import ParamsError, parse
from tasks.config.sections import SECTIONS
from tasks.config.tables import page
from tlq.importance.token_set import TokenBudget
from tlq.importance.weighting import Weighting

ROOT = Path(__file__).resolve().parents[3]
LIBRARY = [*(ROOT / "tlq/importance").glob("*.py"), *(ROOT / "tlq/models").glob("*.py"), ROOT / "tlq/samples.py"]
KEY = re.compile(rf"(?<![\w./])(?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+(?!\w)")
FILES = (".py", ".json", ".csv", ".png", ".parquet", ".safetensors", ".html", ".index", ".main", ".page", ".work")


def named_keys(file: Path) -> set[str]:
    """Keys of params.yaml, for instance `calibset.budget.sample_cap`, in the string literals of a module."""
    texts = [
        node.value
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    keys = {key for text in texts for key in KEY.findall(text)}
    return {key for key in keys if not any(suffix in f"{key}." for suffix in (f"{name}." for name in FILES))}


def known_keys() -> set[str]:
    """Every key of params.yaml, as the table of docs/parameters.md lists them."""
    return set(re.findall(r"^\| `([a-z_.]+)` \|", page(), re.MULTILINE))


def test_messages_of_the_library_name_no_parameters_of_the_pipeline() -> None:
    for file in LIBRARY:
        assert named_keys(file) & known_keys() == set(), file
        assert not re.search(r"params\.yaml|dvc repro", file.read_text()), file


def test_fields_that_the_library_names_exist() -> None:
    text = "".join(file.read_text() for file in LIBRARY)
    for cls in (TokenBudget, Weighting):
        named = set(re.findall(rf"\b{cls.__name__}\.([a-z_]+)", text))
        assert named
        assert named <= {field.name for field in fields(cls)}


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("budget", {"tokens_per_layer": 0}, r"calibset\.budget\.tokens_per_layer is 0, must be at least 1"),
        ("weighting", {"power": 0}, r"calibset\.weighting\.power is 0.*, must be above 0"),
    ],
)
def test_stage_errors_name_the_key_of_params_yaml(section: str, values: dict[str, Any], message: str) -> None:
    cls: Any = {"budget": TokenBudget, "weighting": Weighting}[section]
    with pytest.raises(ParamsError, match=message):
        parse(f"calibset.{section}", values, cls)
