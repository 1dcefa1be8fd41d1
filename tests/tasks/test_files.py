"""Files between stages: round trips, and atomic writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.pools import pool_of

from tasks.files import (
    read_importance,
    read_pool,
    read_samples,
    read_token_weights,
    read_tokens,
    read_widths,
    write_importance,
    write_parquet,
    write_samples,
)
from tlq.runtime.files import new_directory, new_file, write_text
from tlq.samples import Sample


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_file_leaves_the_old_one_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "result.txt"
    write_text("old", path)

    def write() -> None:
        with new_file(path) as temporary:
            temporary.write_text("ne")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["result.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_directory_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "result"
    with new_directory(path) as folder:
        (folder / "a.txt").write_text("old")

    def write() -> None:
        with new_directory(path) as folder:
            (folder / "b.txt").write_text("ne")
            raise error

    with pytest.raises(error):
        write()
    assert names(path) == ["a.txt"]
    assert names(tmp_path) == ["result"]


def test_an_interrupted_first_directory_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with new_directory(tmp_path / "deep" / "result") as folder:
            (folder / "b.txt").write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert names(tmp_path / "deep") == []


def test_a_new_directory_replaces_all_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "result"
    for name in ("a.txt", "b.txt"):
        with new_directory(path) as folder:
            (folder / name).write_text(name)
            assert not (path / name).exists()
    assert names(path) == ["b.txt"]
    assert names(tmp_path) == ["result"]


def test_the_old_directory_is_whole_until_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interruption while the old directory is deleted must not leave a part of it in place."""
    path = tmp_path / "result"
    with new_directory(path) as folder:
        (folder / "a.txt").write_text("old")
    seen: list[list[str]] = []
    remove = shutil.rmtree

    def watching(target: Path, ignore_errors: bool = False) -> None:
        seen.append(names(path) if path.exists() else [])
        remove(target, ignore_errors=ignore_errors)

    monkeypatch.setattr("tlq.runtime.files.shutil.rmtree", watching)
    with new_directory(path) as folder:
        (folder / "b.txt").write_text("new")
    assert set(map(tuple, seen)) == {("a.txt",), ("b.txt",)}


def test_leftovers_of_a_killed_run_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".result.tmp").mkdir()
    (tmp_path / ".result.tmp" / "half").write_text("x")
    with new_directory(tmp_path / "result") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["result"]


def test_samples_survive_the_round_trip(tmp_path: Path, samples: list[Sample]) -> None:
    path = tmp_path / "calibration.parquet"
    write_samples(samples, path)
    assert read_samples(path) == samples
    assert read_samples(path, 2) == samples[:2]


def test_a_limit_above_the_number_of_samples_is_refused(tmp_path: Path, samples: list[Sample]) -> None:
    path = tmp_path / "calibration.parquet"
    write_samples(samples, path)
    with pytest.raises(ValueError, match="7 samples needed, 6 found; raise prepare.samples"):
        read_samples(path, 7)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    path = tmp_path / "calibration.parquet"
    pq.write_table(pa.table({"id": ["a"], "images": [[b""]], "text": ["hello"]}), path)
    with pytest.raises(ValueError, match="needs the columns .* but has no messages, source; make it with `dvc repro"):
        read_samples(path)


@pytest.mark.parametrize(
    ("read", "stage"), [(read_samples, "prepare"), (read_tokens, "calibset")], ids=["samples", "tokens"]
)
def test_a_missing_file_names_the_stage_that_makes_it(tmp_path: Path, read: object, stage: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"not found; run `dvc repro {stage}` first"):
        read(tmp_path / "none.parquet")  # type: ignore[operator]
    with pytest.raises(FileNotFoundError, match="run `dvc repro importance` first"):
        read_importance(tmp_path)


def test_importance_survives_the_round_trip(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lengths = [4, 1, 7]
    pool = pool_of(
        [np.arange(length) % 2 == 0 for length in lengths],
        [np.arange(length) % 3 == 1 for length in lengths],
        [np.arange(length, dtype=np.int32) for length in lengths],
    )
    answer, block = (
        {
            (layer, group): generator.random(len(pool)).astype(np.float32)
            for layer in (0, 1)
            for group in ("qkv", "o_proj")
        }
        for _ in range(2)
    )
    write_importance({"answer": answer}, pool, tmp_path / "importance")
    with pytest.raises(ValueError, match="no scores of the loss block; add it to importance.losses"):
        read_importance(tmp_path / "importance", "block")
    write_importance({"answer": answer, "block": block}, pool, tmp_path / "importance")
    for loss, scores in (("answer", answer), ("block", block)):
        again = read_importance(tmp_path / "importance", loss)  # type: ignore[arg-type]
        assert list(again) == list(scores)
        for key, values in scores.items():
            assert again[key].dtype == np.float32
            np.testing.assert_array_equal(again[key], values)
    for name in ("cu_seqlens", "token_ids", "is_image", "is_answer"):
        before, after = getattr(pool, name), getattr(read_pool(tmp_path / "importance"), name)
        assert (before.dtype, before.tolist()) == (after.dtype, after.tolist())


def test_input_widths_are_stored_with_the_scores(tmp_path: Path) -> None:
    pool = pool_of([np.array([True, False])], token_ids=[np.array([5, 6], np.int32)])
    scores = {(0, "qkv"): np.array([1, 2], np.float32)}
    widths = {(1, "down"): 512, (0, "qkv"): 256}
    write_importance({"answer": scores}, pool, tmp_path / "importance", widths)
    assert read_widths(tmp_path / "importance") == widths
    write_importance({"answer": scores}, pool, tmp_path / "importance")
    assert read_widths(tmp_path / "importance") == {}


def test_scores_are_stored_as_one_flat_list_per_group(tmp_path: Path) -> None:
    """The format that other readers of data/importance rely on."""
    token_ids = [np.array([5, 6], np.int32), np.array([7], np.int32)]
    pool = pool_of([np.array([True, False]), np.array([False])], token_ids=token_ids)
    scores = {(layer, "qkv"): np.array([1, 2, 3], np.float32) * (1 + layer) for layer in (0, 1)}
    write_importance({"answer": scores}, pool, tmp_path / "importance")
    table = pq.read_table(tmp_path / "importance/scores.parquet")
    assert table.schema.field("values").type == pa.list_(pa.float32())
    assert table.to_pylist() == [
        {"loss": "answer", "layer": layer, "group": "qkv", "values": values}
        for layer, values in [(0, [1, 2, 3]), (1, [2, 4, 6])]
    ]
    assert pq.read_table(tmp_path / "importance/sequences.parquet").to_pylist() == [
        {"token_ids": [5, 6], "is_image": [True, False], "is_answer": [False, False]},
        {"token_ids": [7], "is_image": [False], "is_answer": [False]},
    ]


def test_scores_of_an_older_version_name_the_command_that_makes_new_ones(tmp_path: Path) -> None:
    frame = pd.DataFrame({"loss": ["answer"], "layer": [0], "group": ["qkv"], "sample": [0], "values": [[1.0]]})
    write_parquet(frame, tmp_path / "scores.parquet")
    with pytest.raises(ValueError, match="older version.*dvc repro importance"):
        read_importance(tmp_path)


def test_a_token_set_becomes_weights_of_the_pool(tmp_path: Path) -> None:
    pool = pool_of([np.zeros(length, np.bool_) for length in (3, 2, 4)])
    columns = ["layer", "group", "sample", "position", "token_id", "is_image", "weight"]
    rows = [(0, "down", 0, 2, 0, False, 0.5), (0, "down", 2, 0, 0, False, 1.5), (1, "qkv", 1, 1, 0, False, 1.0)]
    frame = pd.DataFrame(rows, columns=columns).astype({"weight": np.float32})
    write_parquet(frame, tmp_path / "tokens.parquet")
    weights = read_token_weights(tmp_path / "tokens.parquet", pool)
    assert {key: (tokens.indices.tolist(), tokens.weights.tolist()) for key, tokens in weights.groups.items()} == {
        (0, "down"): ([2, 5], [0.5, 1.5]),
        (1, "qkv"): ([4], [1.0]),
    }
