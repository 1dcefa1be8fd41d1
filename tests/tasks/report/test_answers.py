"""Example answers that changed: their choice, their pictures, and data that cannot be read."""

from __future__ import annotations

import base64
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from support.benchmark_rows import textvqa_rows, write_rows

from benchmarks.source import BenchmarkSource
from tasks.report.answers import choose_changes, read_changed_answers
from tasks.stages import report

SOURCES = tuple(BenchmarkSource(name, data=f"world/{name}.parquet") for name in ("demo_textvqa", "demo_mmmu"))


@pytest.fixture
def copy(reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the reported project, as the working directory."""
    folder = Path(shutil.copytree(reported, tmp_path / "copy"))
    monkeypatch.chdir(folder)
    return folder


def items(task: str, scores: list[float], reply: str = "x") -> pd.DataFrame:
    docs = [f"d{index}" for index in range(len(scores))]
    return pd.DataFrame({"task": task, "doc": docs, "prompt": "?", "target": "t", "reply": reply, "score": scores})


# --- Choice -------------------------------------------------------------------------------------------------------


def test_an_item_changed_if_it_crossed_one_half() -> None:
    full, variant = items("a", [1, 0.6, 0.4, 0, 1, 0.5]), items("a", [0.5, 0.4, 0.6, 0.3, 0, 1])
    chosen = choose_changes(variant, full, 9)
    assert set(chosen[chosen["change"] == "lost"]["doc"]) == {"d1", "d4"}
    assert set(chosen[chosen["change"] == "gained"]["doc"]) == {"d2"}
    assert list(chosen["change"]) == ["lost", "lost", "gained"]


def test_examples_come_from_different_benchmarks() -> None:
    full = pd.concat([items("a", [1] * 9), items("b", [1] * 2), items("c", [1])])
    variant = pd.concat([items("a", [0] * 9), items("b", [0] * 2), items("c", [0])])
    assert list(choose_changes(variant, full, 3)["task"]) == ["a", "b", "c"]
    assert list(choose_changes(variant, full, 6)["task"]) == ["a", "b", "c", "a", "b", "a"]


def test_the_choice_depends_on_ids_only() -> None:
    full = items("a", [1] * 20)
    chosen = choose_changes(items("a", [0] * 20), full, 4)
    shuffled = choose_changes(items("a", [0] * 20).sample(frac=1, random_state=3), full, 4)
    assert list(chosen["doc"]) == list(shuffled["doc"])
    others = items("a", [0.0] * 20)
    others.loc[~others["doc"].isin(chosen["doc"]), "score"] = 1.0
    assert list(choose_changes(others, full, 4)["doc"]) == list(chosen["doc"])  # a variant that lost fewer items


def test_without_changes_there_are_no_examples() -> None:
    assert choose_changes(items("a", [1, 0]), items("a", [1, 0]), 2).empty
    assert choose_changes(items("a", [0]), items("a", [1]), 0).empty


# --- Content ------------------------------------------------------------------------------------------------------


def test_an_example_has_question_picture_and_both_replies(copy: Path) -> None:
    answers = read_changed_answers(["tlq-w4a8"], SOURCES, 2)["tlq-w4a8"]
    (lost,) = answers
    assert (lost.benchmark, lost.item, lost.change) == ("demo_textvqa", "1", "lost")
    assert lost.question == "What is written on sign number 1?\nAnswer the question using a single word or phrase."
    assert (lost.target, lost.full_reply, lost.reply) == ("word 1", "word 1", "tlq-w4a8 says <1>")
    stored = Image.open(io.BytesIO(textvqa_rows(2)[1]["image"]["bytes"]))
    assert [picture.tobytes() for picture in lost.pictures] == [stored.tobytes()]
    assert lost.missing is None


def test_both_directions_are_shown(copy: Path) -> None:
    answers = read_changed_answers(["rtn-w4a8"], SOURCES, 2)["rtn-w4a8"]
    assert [(answer.benchmark, answer.change) for answer in answers] == [
        ("demo_mmmu", "lost"),
        ("demo_textvqa", "lost"),
        ("demo_textvqa", "gained"),
    ]
    assert answers[-1].item == "5"


def test_the_page_embeds_the_examples_with_small_pictures(copy: Path) -> None:
    rows = textvqa_rows(6)
    buffer = io.BytesIO()
    Image.new("RGB", (1600, 800), "red").save(buffer, "PNG")
    rows[1]["image"] = {"bytes": buffer.getvalue(), "path": None}
    write_rows(Path("world/demo_textvqa.parquet"), rows)
    report.main()
    text = Path("report/index.html").read_text()
    (answer,) = re.findall(r'<article class="answer">.*?</article>', text[text.index("Examples of tlq-w4a8") :], re.S)
    (encoded,) = re.findall(r'src="data:image/jpeg;base64,(.*?)"', answer)
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert picture.size == (320, 160)
    red, green, blue = picture.getpixel((160, 80))
    assert red > 240 > 20 > max(green, blue)
    for expected in ("tlq-w4a8 says &lt;1&gt;", "word 1", "What is written on sign number 1?", "<strong>lost</strong>"):
        assert expected in answer


# --- Data that cannot be read -------------------------------------------------------------------------------------


def test_without_the_data_the_page_shows_the_prompt_and_says_why(copy: Path) -> None:
    Path("world/demo_textvqa.parquet").unlink()
    report.main()
    text = Path("report/index.html").read_text()
    assert "No picture: demo_textvqa: world/demo_textvqa.parquet is missing or holds no parquet file" in text
    assert "&lt;|im_start|&gt;user\nWhat is written on sign number 1?" in text


def test_a_benchmark_on_the_hub_is_not_downloaded(copy: Path) -> None:
    sources = (replace(SOURCES[0], data=None), SOURCES[1])
    (lost,) = read_changed_answers(["tlq-w4a8"], sources, 2)["tlq-w4a8"]
    assert lost.pictures == []
    assert lost.missing is not None
    assert lost.missing.startswith("the benchmark is on the hub")


def test_a_damaged_picture_is_reported(copy: Path) -> None:
    rows = textvqa_rows(6)
    rows[1]["image"] = {"bytes": rows[1]["image"]["bytes"][:-200], "path": None}  # its header can be read
    write_rows(Path("world/demo_textvqa.parquet"), rows)
    (lost,) = read_changed_answers(["tlq-w4a8"], SOURCES, 2)["tlq-w4a8"]
    assert (lost.pictures, lost.question[:7]) == ([], "What is")
    assert lost.missing is not None
    assert lost.missing.startswith("the picture is damaged")


def test_an_item_or_a_benchmark_that_is_gone_is_reported(copy: Path) -> None:
    write_rows(Path("world/demo_textvqa.parquet"), textvqa_rows(1))
    (lost,) = read_changed_answers(["tlq-w4a8"], SOURCES, 2)["tlq-w4a8"]
    assert lost.missing == "the benchmark's data has no such item, or its picture is damaged"
    (lost,) = read_changed_answers(["tlq-w4a8"], SOURCES[1:], 2)["tlq-w4a8"]
    assert lost.missing == "evaluate.benchmarks does not name the benchmark any more"


def test_an_evaluation_that_has_not_run_is_named(copy: Path) -> None:
    Path("evaluation/tlq-w4a8/items.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="run `dvc repro evaluate@tlq-w4a8` first"):
        read_changed_answers(["tlq-w4a8"], SOURCES, 2)
