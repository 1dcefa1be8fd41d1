"""Stage `prepare`: three sources, one form; bad rows are listed, too many of them stop the stage."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import PIL.Image
import pytest
from datasets import Dataset, Features, Image, Value
from support.disks import full_disk

from tasks.config.sections import Columns, PrepareParams
from tasks.files import read_samples
from tasks.stages.prepare import prepare, usable_by
from tlq.samples import Sample


def png(number: int) -> bytes:
    """A small picture of one colour, another for every number."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


BROKEN = b"\x89PNG broken"


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


Table = Callable[..., PrepareParams]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """Params for a parquet file of ``rows`` as `datasets` writes it."""

    def write(rows: list[dict[str, Any]], **changes: Any) -> PrepareParams:
        features = {"id": Value("string"), "image": Image(), "question": Value("string")}
        answer = rows[0]["answer"]
        features["answer"] = (
            datasets.List(Value("string"))
            if isinstance(answer, list)
            else Value("int64" if isinstance(answer, int) else "string")
        )
        encoded = [{**row, "image": row["image"] and {"bytes": row["image"], "path": None}} for row in rows]
        path = tmp_path / "table.parquet"
        Dataset.from_list(encoded, features=Features(features)).to_parquet(path)
        return PrepareParams(**{"kind": "parquet", "path": str(path), "samples": len(rows), **changes})

    return write


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": f"q{index}",
            "image": png(index),
            "question": f"Question {index}?",
            "answer": f"answer {index}",
            **changes,
        }
        for index in range(count)
    ]


def run(params: PrepareParams, tmp_path: Path) -> tuple[list[Sample], pd.DataFrame]:
    prepare(params, tmp_path / "prepared")
    return (
        read_samples(tmp_path / "prepared" / "calibration.parquet"),
        pd.read_csv(tmp_path / "prepared" / "rejected.csv"),
    )


def test_a_table_becomes_conversations(table: Table, tmp_path: Path) -> None:
    found, rejected = run(table(rows(4), columns=Columns(id="id")), tmp_path)
    assert sorted(sample.id for sample in found) == ["q0", "q1", "q2", "q3"]
    assert rejected.empty
    for sample in found:
        number = int(sample.id[1:])
        assert sample.images == [png(number)]
        assert sample.messages == [
            {"role": "user", "content": f"<image>Question {number}?"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
        assert sample.source.endswith("table.parquet")


def test_the_draw_depends_on_the_seed_only(table: Table, tmp_path: Path) -> None:
    draws = [[sample.id for sample in run(table(rows(12), samples=5, seed=seed), tmp_path)[0]] for seed in (1, 1, 2)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]
    assert len(set(draws[0])) == 5


def test_answers_may_be_numbers_or_lists(table: Table, tmp_path: Path) -> None:
    """A count of 0 is an answer; of several accepted answers the first is taken."""
    found, _ = run(table(rows(2, answer=0)), tmp_path)
    assert [sample.messages[-1]["content"] for sample in found] == ["0", "0"]
    found, _ = run(table(rows(2, answer=["stop", "STOP"])), tmp_path)
    assert [sample.messages[-1]["content"] for sample in found] == ["stop", "stop"]


def test_captions_get_one_question(tmp_path: Path) -> None:
    pd.DataFrame({"image": [png(0)], "caption": ["A red square."]}).to_parquet(tmp_path / "captions.parquet")
    params = PrepareParams(
        kind="parquet",
        path=str(tmp_path / "captions.parquet"),
        samples=1,
        columns=Columns(answer="caption"),
        prompt="Describe it.",
    )
    (found,), _ = run(params, tmp_path)
    assert [message["content"] for message in found.messages] == ["<image>Describe it.", "A red square."]


def test_tables_written_by_pandas_work_too(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": [png(0), png(1)], "question": ["a?", "b?"], "answer": ["x", "y"]})
    frame.to_parquet(tmp_path / "plain.parquet")
    params = PrepareParams(kind="parquet", path=str(tmp_path / "plain.parquet"), samples=2)
    assert {sample.images[0] for sample in run(params, tmp_path)[0]} == {png(0), png(1)}


def test_unusable_rows_are_skipped_counted_and_listed(table: Table, tmp_path: Path) -> None:
    data = rows(20)
    data[3]["image"] = BROKEN
    data[7]["answer"] = "  "
    found, rejected = run(table(data, samples=18, columns=Columns(id="id")), tmp_path)
    assert len(found) == 18
    assert not {"q3", "q7"} & {sample.id for sample in found}
    reasons = dict(zip(rejected["row"], rejected["reason"], strict=True))
    assert set(reasons) == {3, 7}
    assert "unreadable image" in reasons[3]
    assert "answer is empty" in reasons[7]


@pytest.mark.parametrize("question", [None, "", "  "])
def test_a_row_without_a_question_is_listed(table: Table, tmp_path: Path, question: str | None) -> None:
    data = rows(10)
    data[4]["question"] = question
    _, rejected = run(table(data, samples=9), tmp_path)
    assert rejected[["row", "reason"]].to_numpy().tolist() == [[4, "its question is empty"]]


def test_the_list_of_unusable_rows_is_the_same_bytes_every_time(table: Table, tmp_path: Path) -> None:
    """Errors of image libraries name the address of an object."""
    data = rows(10)
    data[2]["image"], data[5]["image"] = BROKEN, b"no picture at all"
    params = table(data, samples=8, max_rejected=0.5)
    for name in ("one", "two"):
        prepare(params, tmp_path / name)
    lists = [(tmp_path / name / "rejected.csv").read_bytes() for name in ("one", "two")]
    assert lists[0] == lists[1]
    assert lists[0].count(b"unreadable image") == 2


def test_a_full_disk_is_told_in_one_line_and_the_same_command_continues(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, params = tmp_path / "prepared", table(rows(10), samples=5)

    with monkeypatch.context() as patch:
        patch.setattr("tasks.files.pq.write_table", full_disk)
        with pytest.raises(
            OSError, match=rf"^{tmp_path}/.?prepared.*: cannot be written .* run the same command again$"
        ):
            prepare(params, out)
    assert not [path for path in tmp_path.iterdir() if "prepared" in path.name]
    assert prepare(params, out)[0] == 5


def test_too_many_unusable_rows_stop_the_stage(table: Table, tmp_path: Path) -> None:
    data = rows(10)
    for index in range(4):
        data[index]["image"] = BROKEN
    with pytest.raises(
        ValueError, match=r"4 of 10 rows are unusable, more than prepare.max_rejected = 0.1.*unreadable"
    ):
        prepare(table(data), tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()
    found, rejected = run(table(data, samples=6, max_rejected=0.5), tmp_path)
    assert len(found) == 6
    assert set(rejected["row"]) <= {0, 1, 2, 3}


def test_too_few_rows(table: Table, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 usable rows, prepare.samples needs 5"):
        prepare(table(rows(3), samples=5), tmp_path / "prepared")


def test_missing_columns_are_named_with_those_there_are(table: Table, tmp_path: Path) -> None:
    params = table(rows(2), columns=Columns(image="picture", answer="label"))
    with pytest.raises(
        ValueError, match="no column picture, label; it has id, image, question, answer: name the right"
    ):
        prepare(params, tmp_path / "prepared")


def test_a_column_without_images_says_what_it_holds(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": ["a.png"], "question": ["a?"], "answer": ["x"]})
    frame.to_parquet(tmp_path / "plain.parquet")
    with pytest.raises(ValueError, match="1 of 1 rows are unusable.*unreadable image: a.png: No such file"):
        prepare(PrepareParams(kind="parquet", path=str(tmp_path / "plain.parquet"), samples=1), tmp_path / "prepared")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.parquet: not found; set prepare.path"):
        prepare(PrepareParams(kind="parquet", path=str(tmp_path / "none.parquet"), samples=1), tmp_path / "prepared")


# -- LLaVA / ShareGPT4V JSON ------------------------------------------------------------------------------------------


def conversation(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"c{number}",
        "image": f"{number}.png",
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat is {number}?"},
            {"from": "gpt", "value": f"It is {number}."},
        ],
        **changes,
    }


@pytest.fixture
def llava(tmp_path: Path) -> Callable[..., PrepareParams]:
    def write(content: Any, **changes: Any) -> PrepareParams:
        (tmp_path / "pictures").mkdir(exist_ok=True)
        for number in range(10):
            for folder in (tmp_path / "pictures", tmp_path / "pictures/coco"):
                folder.mkdir(exist_ok=True)
                (folder / f"{number}.png").write_bytes(png(number))
        path = tmp_path / "conversations.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        root = str(tmp_path / "pictures")
        arguments = {"kind": "llava_json", "path": str(path), "samples": len(content), "image_root": root, **changes}
        return PrepareParams(**arguments)

    return write


def test_llava_conversations(llava: Callable[..., PrepareParams], tmp_path: Path) -> None:
    followed_up = conversation(1)
    followed_up["conversations"] += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    spoken = conversation(
        2, image=None, conversations=[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    )
    del spoken["image"]
    found, _ = run(llava([conversation(0), followed_up, spoken]), tmp_path)
    by_id = {sample.id: sample for sample in found}
    assert by_id["c0"].messages == [
        {"role": "user", "content": "<image>What is 0?"},
        {"role": "assistant", "content": "It is 0."},
    ]
    assert by_id["c0"].images == [png(0)]
    assert [message["role"] for message in by_id["c1"].messages] == ["user", "assistant"] * 2
    assert by_id["c2"].images == []


def test_a_prefix_leaves_out_the_images_of_other_sources(llava: Callable[..., PrepareParams], tmp_path: Path) -> None:
    elsewhere = [conversation(number, image=f"sam/{number}.png") for number in range(5)]
    without = [conversation(6, image=None), "no conversation"]
    params = llava(
        [*elsewhere, conversation(7, image="coco/7.png"), *without, conversation(8, image="coco/8.png")],
        samples=2,
        image_prefix="",
    )
    with pytest.raises(ValueError, match="rows are unusable"):
        run(params, tmp_path)
    found, rejected = run(params.model_copy(update={"image_prefix": "coco/"}), tmp_path)
    assert {sample.id for sample in found} == {"c7", "c8"}
    assert rejected.empty


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (conversation(1, image="absent.png"), "pictures/absent.png: No such file"),
        ({"id": "c1"}, "no list of `conversations`"),
        ("just text", "no list of `conversations`"),
        (conversation(1, conversations=[{"from": "human", "value": "Alone?"}]), "last turn is not an answer"),
        (conversation(1, conversations=[{"from": "human"}]), "no text in `value`"),
        (conversation(1, conversations=[{"from": "robot", "value": "x"}]), "a turn is from 'robot', not one of human"),
        (conversation(1, conversations=[]), "last turn is not an answer"),
        (conversation(1, image=["1.png", "2.png"]), "1 image marks in its text, 2 images"),
    ],
)
def test_bad_llava_rows_are_listed_with_their_reason(
    llava: Callable[..., PrepareParams], tmp_path: Path, bad: Any, reason: str
) -> None:
    params = llava([conversation(0), bad, conversation(2)], samples=2, max_rejected=0.5, seed=3)
    found, rejected = run(params, tmp_path)
    assert [sample.id for sample in found] == ["c2", "c0"]
    assert rejected["row"].tolist() == [1]
    assert reason in rejected["reason"][0]


@pytest.mark.parametrize(
    ("content", "message"), [("[{", "not valid JSON"), ('{"a": 1}', "must be a list of conversations")]
)
def test_files_that_are_not_llava(
    llava: Callable[..., PrepareParams], tmp_path: Path, content: str, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"conversations\.json: {message}"):
        prepare(llava(content, samples=1), tmp_path / "prepared")


def test_a_missing_image_folder_is_named(llava: Callable[..., PrepareParams], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="image_root .*nowhere: not found; correct them in prepare"):
        prepare(llava([conversation(0)], image_root=str(tmp_path / "nowhere")), tmp_path / "prepared")


def sized(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def test_rows_that_the_model_cannot_take_are_listed(table: Table, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Images and texts that later stages would stop at: another row takes their place."""
    bad = [
        {**rows(1)[0], "image": sized(4, 1000)},
        {**rows(1)[0], "question": "why " * 400},
    ]
    params = table([*bad, *rows(8)], samples=8, max_rejected=0.2, seed=1)  # the last row drawn is a usable one
    _, rejected = prepare(params, tmp_path / "out", usable_by(str(tiny_checkpoint), 256))
    reasons = {each.row: each.reason for each in rejected}
    assert "the model's processor refuses it: absolute aspect ratio must be smaller than 200" in reasons["0"]
    assert "tokens, more than importance.max_tokens = 256 allows" in reasons["1"]
    assert len(read_samples(tmp_path / "out" / "calibration.parquet")) == 8


@pytest.mark.parametrize("root", [None, "pictures"])
def test_a_cell_may_be_the_path_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / (root or "") / "a.png").write_bytes(png(1))
    pd.DataFrame([{"image": "a.png", "question": "q", "answer": "x"}]).to_parquet("table.parquet")
    params = PrepareParams(kind="parquet", path="table.parquet", samples=1, image_root=root)
    assert run(params, tmp_path)[0][0].images == [png(1)]


def test_gaps_in_columns_of_counts_and_ids_leave_no_nan(tmp_path: Path) -> None:
    frame = pd.DataFrame([{"image": png(1), "question": "q", "answer": 3.0, "key": 7.0, "from": "here"}] * 2)
    frame.loc[1, ["key", "from"]] = None
    frame.to_parquet(tmp_path / "table.parquet")
    columns = Columns(id="key", source="from")
    params = PrepareParams(kind="parquet", path=str(tmp_path / "table.parquet"), samples=2, columns=columns)
    kept = sorted(run(params, tmp_path)[0], key=lambda sample: sample.id)
    assert [sample.messages[-1]["content"] for sample in kept] == ["3", "3"]
    assert [(sample.id, sample.source) for sample in kept] == [("1", params.path), ("7", "here")]
