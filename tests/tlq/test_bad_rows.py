"""Whatever a row of JSON holds, it becomes a sample, or is refused with a reason; nothing else is raised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tlq.data import checked, load_samples, sample_of
from tlq.samples import Sample

KEYS = (
    *("id", "image", "images", "file_name", "conversations", "messages", "question", "answer", "answers", "text"),
    *("system", "source", "video", "from", "value", "role", "content", "bytes", "path", "type"),
)
WORDS = ("", "a", "<image>", "human", "gpt", "user", "assistant", "system", "nan", "../x", "\x00", "\ud800", "x" * 300)

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=4)
cells = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)
rows = st.dictionaries(st.sampled_from(KEYS), cells, max_size=6) | cells


def outcome(row: Any, folder: Path) -> Sample | ValueError:
    try:
        return checked(sample_of(row, "0", folder, "rows.json"))
    except ValueError as error:
        return error


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows)
def test_any_row_is_a_sample_or_is_refused_with_a_reason(row: Any) -> None:
    found = outcome(row, Path("/nowhere"))
    if isinstance(found, ValueError):
        assert str(found)
    else:
        assert found.messages[-1]["role"] == "assistant"
        assert all(isinstance(message["content"], str) for message in found.messages)


@pytest.mark.parametrize(
    "content", ["", "{", "7", "{}", "[]", '"a"', "[" * 5000, "null", "[[[]]]", '{"rows": []}', "[1, 2]", "\ufeff[]"]
)
def test_any_file_ends_with_one_line_that_names_it(tmp_path: Path, content: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="rows.json") as refused:
        load_samples(file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"\xff\xfe[\x00", b"\xe9", b"\x80\x04."])
def test_a_file_of_another_encoding_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="rows.json"):
        load_samples(file)


def test_a_text_of_a_megabyte_is_read_and_its_length_is_checked_with_the_model(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"question": "?", "answer": "a" * 1_000_000}]))
    assert len(load_samples(file)[0].messages[-1]["content"]) == 1_000_000
