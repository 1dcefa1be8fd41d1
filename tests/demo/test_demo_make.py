"""The generated parquet files: columns of the real data sets, decoded images, same bytes for the same seed."""

import ast
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from PIL import Image

from demo.make import BENCHMARKS, MakeParams, make
from demo.world import HEIGHT, WIDTH


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world")
    make(MakeParams(out, seed=3, calibration=40, items=30))
    return out


def rows_of(path: Path, cache: Path) -> Dataset:
    return load_dataset("parquet", data_files={"test": str(path)}, split="test", cache_dir=str(cache))


def test_calibration_has_unique_ids_and_all_kinds(world: Path, tmp_path: Path) -> None:
    rows = rows_of(world / "calibration.parquet", tmp_path)
    assert rows.column_names == ["id", "image", "question", "answer", "source"]
    assert len(set(rows["id"])) == 40
    assert set(rows["source"]) == {"demo-signs", "demo-chart", "demo-text", "demo-shapes"}
    assert isinstance(rows[0]["image"], Image.Image)
    choices = [row for row in rows if row["source"] == "demo-shapes"]
    assert all("\nA. " in row["question"] and row["answer"] in "ABCD" for row in choices)
    assert all(row["question"].endswith("given choices directly.") for row in choices)


def test_textvqa_has_the_real_columns(world: Path, tmp_path: Path) -> None:
    row = rows_of(world / "textvqa.parquet", tmp_path)[0]
    assert {"image", "question", "answers", "question_id", "ocr_tokens"} <= set(row)
    assert row["image"].size == (WIDTH, HEIGHT)
    assert len(row["answers"]) == 10
    assert len(row["ocr_tokens"]) == 2


def test_chartqa_has_the_real_columns(world: Path, tmp_path: Path) -> None:
    rows = rows_of(world / "chartqa.parquet", tmp_path)
    assert set(rows.column_names) == {"image", "question", "answer", "type"}
    assert set(rows["type"]) == {"human_test", "augmented_test"}
    assert all(isinstance(answer, str) for answer in rows["answer"])


def test_ocrbench_has_the_real_columns(world: Path, tmp_path: Path) -> None:
    rows = rows_of(world / "ocrbench.parquet", tmp_path)
    assert set(rows.column_names) == {"image", "question", "answer", "dataset", "question_type"}
    assert all(kind.endswith("Recognition") for kind in rows["question_type"])
    assert isinstance(rows[0]["answer"], list)


def test_mmmu_has_the_real_columns(world: Path, tmp_path: Path) -> None:
    rows = rows_of(world / "mmmu.parquet", tmp_path)
    assert {f"image_{n}" for n in range(1, 8)} <= set(rows.column_names)
    row = rows[0]
    assert row["id"].startswith("validation_")
    assert row["question"].startswith("<image 1> ")
    assert len(ast.literal_eval(row["options"])) == 4
    assert row["answer"] in "ABCD"
    assert row["question_type"] == "multiple-choice"
    assert isinstance(row["image_1"], Image.Image)
    assert row["image_2"] is None


def test_same_seed_gives_same_bytes(world: Path, tmp_path: Path) -> None:
    make(MakeParams(tmp_path, seed=3, calibration=40, items=30))
    for name in ("calibration", *BENCHMARKS):
        assert (tmp_path / f"{name}.parquet").read_bytes() == (world / f"{name}.parquet").read_bytes()
