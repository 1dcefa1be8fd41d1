"""Names of flow runs and of their experiments."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
import yaml

from flows import names
from flows.names import name_of

DAY = date(2026, 11, 27)


@pytest.fixture(autouse=True)
def _params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = {"recipes": ["rtn", "tlq"], "schemes": ["w3a16"]}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"variants": variants}))
    (tmp_path / "data/models/qwen").mkdir(parents=True)
    monkeypatch.setattr(names, "ROOT", tmp_path)


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({}, "rtn+tlq w3a16 2026-11-27"),
        ({"model": "", "recipes": ("rtn",), "schemes": ("w4a16",)}, "rtn w4a16 2026-11-27"),
        ({"settings": {"variants.schemes": ["w8a8"]}}, "rtn+tlq w8a8 2026-11-27"),
        ({"model": "qwen2-vl-2b"}, "qwen2-vl-2b rtn+tlq w3a16 2026-11-27"),
        ({"model": "data/models/qwen"}, "qwen rtn+tlq w3a16 2026-11-27"),
        ({"models": ["a", "b"], "recipes": ["tlq"]}, "a+b tlq w3a16 2026-11-27"),
        ({"recipes": ["rtn", "awq", "gptq", "mbq", "tlq"]}, "5 recipes w3a16 2026-11-27"),
    ],
)
def test_a_run_is_named_by_what_varies(parameters: dict[str, Any], name: str) -> None:
    assert name_of(parameters, DAY) == name


def test_an_evaluation_of_registered_models_is_named_by_them() -> None:
    assert name_of({"models": ["demo-w3a16/2"]}, DAY, variants=False) == "demo-w3a16/2 2026-11-27"


def test_a_broken_params_yaml_is_left_to_the_flow_to_report(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("variants: {recipes: [none]}")
    assert name_of({}, DAY) == "2026-11-27"


def test_two_runs_of_one_name_are_two_experiments_that_git_can_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for _ in range(2):
        monkeypatch.setattr(names, "flow_run", SimpleNamespace(name="qwen rtn+tlq w3a16 2026-11-27", id=str(uuid4())))
        made.append(names.experiment_name())
    assert made[0] != made[1]
    assert all(re.fullmatch(r"qwen-rtn-tlq-w3a16-2026-11-27-[0-9a-f]{4}", name) for name in made)
