"""Questions and pictures of items, read again by id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.benchmark_rows import mmmu_rows, textvqa_rows, write_rows

from benchmarks.data import BenchmarkError, BenchmarkSource
from benchmarks.harness import load_benchmarks, read_questions


def test_questions_are_found_by_id_with_their_pictures(textvqa: Callable[..., BenchmarkSource]) -> None:
    questions = read_questions(textvqa(6), {"4", "1", "absent"})
    assert list(questions) == ["1", "4"]
    text = "What is written on sign number 1?\nAnswer the question using a single word or phrase."
    assert questions["1"].text == text
    assert [image.decode().size for image in questions["1"].images] == [(48, 32)]


def test_a_question_has_the_benchmarks_suffix(textvqa: Callable[..., BenchmarkSource]) -> None:
    source = replace(textvqa(2), suffix=" In one word.")
    assert read_questions(source, {"0"})["0"].text.endswith("sign 0? In one word.")


def test_the_places_of_several_pictures_are_numbered(tmp_path: Path) -> None:
    source = BenchmarkSource("demo_mmmu", data=write_rows(tmp_path / "mmmu.parquet", mmmu_rows(3)))
    questions = read_questions(source, {"validation_Art_0", "validation_Art_1"})
    assert questions["validation_Art_0"].text.startswith("Which is older, [picture]?")
    assert questions["validation_Art_1"].text.startswith("Which is older, [picture 1] and [picture 2]?")
    assert len(questions["validation_Art_1"].images) == 2


def test_an_item_whose_picture_is_damaged_is_left_out(textvqa: Callable[..., BenchmarkSource]) -> None:
    source = textvqa(3, lambda rows: rows[1].update(image={"bytes": b"no picture", "path": None}))
    assert list(read_questions(source, {"0", "1"})) == ["0"]


def test_ids_are_those_of_the_evaluation(tmp_path: Path) -> None:
    """Ids that occur twice are numbered, for the evaluation and here alike."""
    rows = textvqa_rows(4)
    for row in rows:
        row["question_id"] = row["question_id"] // 2
    source = BenchmarkSource("demo_textvqa", data=write_rows(tmp_path / "rows.parquet", rows))
    ids = load_benchmarks([source], None, 0)["demo_textvqa"].rows.ids
    assert list(read_questions(source, ids)) == ids == ["0#0", "0#1", "1#2", "1#3"]


def test_data_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="is missing or holds no parquet file"):
        read_questions(BenchmarkSource("demo_textvqa", data="nowhere.parquet"), {"0"})
