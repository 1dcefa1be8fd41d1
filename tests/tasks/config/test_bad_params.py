"""Whatever params.yaml holds, a stage reads it, or ends with one line that names file, key, value and next step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.quick_project import ROOT

from tasks.config.params import ParamsError, parse, read, read_recipe
from tasks.config.presets import SECTIONS

SHIPPED: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
KEYS = [(name, key) for name, cls in SECTIONS.items() for key in getattr(cls, "model_fields", ())]

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([10**30, -(10**30), 2**63, "../..", "\x00"])
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))


def refusal(name: str, value: Any) -> str | None:
    """The message with which a section's values are refused, None if they are taken."""
    try:
        parse(name, value, SECTIONS[name])
    except ParamsError as error:
        return str(error)
    return None


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(KEYS), values)
def test_any_value_of_a_key_is_taken_or_refused_in_one_line(place: tuple[str, str], value: Any) -> None:
    name, key = place
    shipped = SHIPPED.get(name)
    message = refusal(name, {**(shipped if isinstance(shipped, dict) else {}), key: value})
    assert message is None or (message.startswith(f"params.yaml: {name}") and "\n" not in message)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(SECTIONS)), values)
def test_any_value_of_a_section_is_taken_or_refused_in_one_line(name: str, value: Any) -> None:
    message = refusal(name, value)
    assert message is None or (message.startswith("params.yaml: ") and name in message and "\n" not in message)


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("prepare", {"samples": True}, "prepare.samples is true, must be a value of another kind"),
        ("prepare", {"max_rejected": False}, "prepare.max_rejected is false, must be a value of another kind"),
        ("prepare", {"samples": 10**30}, "prepare.samples is 1000000000000000000000000000000, must be a number below"),
        ("register", {"min_retention": float("inf")}, "register.min_retention is inf, must be a number below 2^63"),
        ("register", {"floors": {"mean": float("nan")}}, "register.floors.mean is nan, must be a number below 2^63"),
        ("evaluate", {"resamples": 10**9}, "evaluate.resamples: must be at most 1000000 (found 1000000000)"),
    ],
)
def test_impossible_numbers_are_refused_by_name(name: str, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ParamsError) as refused:
        parse(name, {**SHIPPED[name], **values}, SECTIONS[name])
    assert expected in str(refused.value)
    assert len(str(refused.value)) < 200  # the rest of the section is not printed


def test_numbers_of_a_recipe_are_bounded_too(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("recipes: {tlq: {equalization: {points: .inf}}}")
    with pytest.raises(ParamsError, match=r"recipes.*points"):
        read_recipe("tlq", file)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prepare: {samples: 3, samples: 5}", "key samples stands twice in one mapping; remove one of them"),
        ("model: {path: a}\nmodel: {path: b}", "key model stands twice in one mapping; remove one of them"),
        ("a: " + "[" * 3000, "nested too deeply"),
        (b"model: {path: \xe9}", "is no UTF-8 text"),
        ("", "must be a mapping of sections"),
        ("- a", "must be a mapping of sections"),
        ("a: [", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, content: str | bytes, expected: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ParamsError) as refused:
        read(file)
    assert expected in str(refused.value)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_merged_keys_are_no_duplicates(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("base: &base {path: a, dtype: float32}\nmodel:\n  <<: *base\n  path: b\n")
    assert read(file)["model"] == {"path": "b", "dtype": "float32"}
