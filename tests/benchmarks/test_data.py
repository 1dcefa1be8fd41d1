"""Reading benchmark rows: refused sources, skipped rows, and the rows that a limit chooses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import data
from benchmarks.data import BenchmarkError, BenchmarkSource, choose_rows
from benchmarks.harness import load_benchmarks

Make = Callable[..., BenchmarkSource]
CONFIG = {
    "dataset_path": "lmms-lab/textvqa",
    "test_split": "validation",
    "metadata": {"id": "question_id", "images": ["image"], "columns": ["image", "question", "answers"]},
}


def load(source: BenchmarkSource, limit: int | None = None, seed: int = 0) -> data.Rows:
    return load_benchmarks([source], limit, seed)[source.task].rows


def test_rows_keep_images_encoded_until_needed(textvqa: Make) -> None:
    rows = load(textvqa(3))
    assert rows.ids == ["0", "1", "2"]
    image = rows[1]["image"]
    assert (image.width, image.height) == (48, 32)
    assert image.decode().size == (48, 32)
    assert str(image) == "image of 1 (48x32)"


def test_parquet_written_by_pandas(textvqa: Make, tmp_path: Path) -> None:
    source = textvqa(3)
    frame = pd.read_parquet(str(source.data))
    frame.to_parquet(tmp_path / "pandas.parquet")
    rows = load(BenchmarkSource("demo_textvqa", data=str(tmp_path / "pandas.parquet")))
    assert rows[1]["image"].decode().size == (48, 32)


def test_a_folder_is_read_as_all_its_parquet_files(textvqa: Make, tmp_path: Path) -> None:
    """As a data set of the hub is downloaded: shards in a folder."""
    whole = pd.read_parquet(str(textvqa(5).data))
    (tmp_path / "set/data").mkdir(parents=True)
    for number, part in enumerate((whole[:3], whole[3:])):
        part.to_parquet(tmp_path / f"set/data/validation-0000{number}-of-00002.parquet")
    assert load(BenchmarkSource("demo_textvqa", data=str(tmp_path / "set"))).ids == ["0", "1", "2", "3", "4"]


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 5))
def test_a_limit_picks_the_same_rows_every_time(count: int, limit: int, seed: int) -> None:
    names = [f"q{index}" for index in range(count)]
    chosen = choose_rows(names, "task", limit, seed)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(limit, count)
    assert chosen == choose_rows(list(names), "task", limit, seed)
    more = choose_rows(names, "task", limit + 1, seed)
    assert set(chosen) <= set(more)


def test_chosen_rows_depend_on_seed_task_and_the_limit_of_the_source(textvqa: Make) -> None:
    names = [str(index) for index in range(200)]
    assert choose_rows(names, "a", 20, 0) != choose_rows(names, "a", 20, 1)
    assert choose_rows(names, "a", 20, 0) != choose_rows(names, "b", 20, 0)
    source = textvqa(6)
    assert len(load(source, limit=4)) == 4
    assert len(load(BenchmarkSource(source.task, data=source.data, limit=2), limit=4)) == 2
    assert load(source, limit=9).asked == 9


def test_bad_rows_are_skipped_and_listed(textvqa: Make) -> None:
    def spoil(rows: list[dict[str, Any]]) -> None:
        rows[0]["image"] = {"bytes": b"not an image", "path": None}
        rows[1]["answers"] = []
        rows[2]["answers"] = [" "] * 10
        rows[3]["question"] = None
        rows[4]["image"] = {"bytes": None, "path": None}

    rows = load(textvqa(8, spoil))
    assert (rows.ids, rows.asked) == (["5", "6", "7"], 8)
    reasons = {skip.doc: skip.reason for skip in rows.skipped}
    assert reasons["0"].startswith("UnidentifiedImageError")
    assert reasons["1"] == reasons["2"] == "no answer"
    assert reasons["3"] == "empty column question"
    assert "neither bytes nor a readable path" in reasons["4"] or reasons["4"] == "empty column image"


def test_vizwiz_scores_rows_without_answers(textvqa: Make) -> None:
    def spoil(rows: list[dict[str, Any]]) -> None:
        rows[1]["answers"] = []
        rows[2]["answers"] = None

    source = textvqa(3, spoil)
    rows = load(BenchmarkSource("vizwiz_vlm", data=source.data))
    assert (len(rows), rows.skipped) == (3, [])


def test_duplicate_ids_get_their_position(textvqa: Make) -> None:
    def repeat(rows: list[dict[str, Any]]) -> None:
        rows[1]["question_id"] = 0

    assert load(textvqa(3, repeat)).ids == ["0#0", "0#1", "2#2"]


def test_data_without_a_usable_row_is_refused(textvqa: Make) -> None:
    def spoil(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["answers"] = []

    with pytest.raises(BenchmarkError, match=r"no usable row in .*textvqa.parquet.* first reason: no answer"):
        load(textvqa(3, spoil))


def test_a_missing_column_is_refused(textvqa: Make) -> None:
    source = textvqa(3)
    with pytest.raises(BenchmarkError, match=r"chartqa_vlm: .* lacks column answer, type \(it has image, question"):
        load(BenchmarkSource("chartqa_vlm", data=source.data))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (BenchmarkSource("textvqa"), "unknown benchmark 'textvqa'; choose one of .*textvqa_vlm"),
        (BenchmarkSource("demo_textvqa", data="nowhere.parquet"), "nowhere.parquet is missing"),
        (BenchmarkSource("demo_textvqa", data="docs"), "docs is missing or holds no parquet file"),
        (BenchmarkSource("demo_textvqa", data="a.parquet", split="test"), "either `data` or hub"),
    ],
)
def test_invalid_sources_are_refused(source: BenchmarkSource, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        load(source)


def test_a_duplicate_task_is_refused() -> None:
    source = BenchmarkSource("demo_textvqa", data="x.parquet")
    with pytest.raises(BenchmarkError, match="names a task twice"):
        load_benchmarks([source, source], None, 0)


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"bad")
    with pytest.raises(BenchmarkError, match="no readable parquet"):
        load(BenchmarkSource("demo_textvqa", data=str(tmp_path / "bad.parquet")))


def test_hub_source_and_wrong_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def load_dataset(path: str, name: str | None, **kwargs: Any) -> datasets.DatasetDict:
        asked.update(path=path, name=name, **kwargs)
        return datasets.DatasetDict(test=datasets.Dataset.from_dict({"image": [None]}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = BenchmarkSource("textvqa_vlm", hub="other/textvqa", subset="small", revision="abc", split="val")
    with pytest.raises(BenchmarkError, match="other/textvqa has no split 'val', it has test"):
        data.load_rows(source, CONFIG, lambda doc: "x", None, 0)
    assert asked == {"path": "other/textvqa", "name": "small", "revision": "abc"}


def test_an_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(BenchmarkError, match=r"cannot load lmms-lab/textvqa \(ConnectionError.*local parquet"):
        data.load_rows(BenchmarkSource("textvqa_vlm"), CONFIG, lambda doc: "x", None, 0)


@pytest.mark.parametrize("suffix", ["", "\nOne word."])
def test_a_suffix_replaces_the_instruction(textvqa: Make, suffix: str) -> None:
    source = textvqa(2)
    plain = load_benchmarks([source], None, 0)[source.task]
    changed = load_benchmarks([replace(source, suffix=suffix)], None, 0)[source.task]
    instruction = "\nAnswer the question using a single word or phrase."
    for doc in plain.rows:
        assert plain.task.doc_to_text(doc).endswith(instruction)
        assert changed.task.doc_to_text(doc) == plain.task.doc_to_text(doc).removesuffix(instruction) + suffix
