"""Reading calibration samples: formats, draws, unusable rows."""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.tiny import png

from tlq import Sample, load_samples

MESSAGES = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "a cat"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of different content."""
    (tmp_path / "images").mkdir()
    for index in range(3):
        (tmp_path / f"images/{index}.png").write_bytes(png(index))
    return tmp_path


def write(path: Path, rows: Any) -> Path:
    path.write_text(json.dumps(rows))
    return path


LLAVA = {
    "id": "7",
    "image": "0.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a cat"}],
}


@pytest.mark.parametrize(
    "row",
    [
        LLAVA,
        {"id": 7, "image": "0.png", "question": "What is it?", "answer": "a cat"},
        {"id": 7, "images": ["0.png"], "question": "<image>\nWhat is it?", "answer": ["a cat", "cat"]},
        {"id": 7, "file_name": "0.png", "question": "What is it?", "text": "a cat"},
        {"id": 7, "images": ["0.png"], "messages": MESSAGES},
    ],
)
def test_json_rows_of_every_form_give_one_sample(folder: Path, row: dict[str, Any]) -> None:
    path = write(folder / "samples.json", [row])
    assert load_samples(path, folder / "images") == [Sample("7", [png(0)], MESSAGES, "samples.json")]  # type: ignore[arg-type]


def test_json_lines_and_a_caption_without_a_question(folder: Path) -> None:
    path = folder / "captions.jsonl"
    path.write_text('{"image": "images/0.png", "caption": "a cat"}\n\n{"image": "images/1.png", "text": "a dog"}\n')
    first, second = load_samples(path, prompt="What is here?")
    assert first.messages[0]["content"] == second.messages[0]["content"] == "<image>What is here?"
    assert (second.id, second.images, second.messages[1]["content"]) == ("1", [png(1)], "a dog")


def test_parquet_holds_images_as_bytes(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": png(0), "path": None}, "question": "What is it?", "answer": "a cat"},
        {"image": {"bytes": png(1), "path": None}, "question": "Whose?", "answer": "mine"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "datasets.parquet")
    plain = [{**row, "image": row["image"]["bytes"]} for row in rows]  # type: ignore[index]
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "plain.parquet")
    one, other = (load_samples(tmp_path / name) for name in ("datasets.parquet", "plain.parquet"))
    assert [sample.images for sample in one] == [sample.images for sample in other] == [[png(0)], [png(1)]]
    assert one[1].messages == other[1].messages
    assert one[1].messages[0]["content"] == "<image>Whose?"


def test_samples_that_the_pipeline_has_prepared_are_read_back(tmp_path: Path, samples: list[Sample]) -> None:
    from tasks.files import write_samples

    write_samples(samples, tmp_path / "calibration.parquet")
    read = load_samples(tmp_path / "calibration.parquet")
    assert [(each.id, each.images, each.messages) for each in read] == [
        (each.id, each.images, each.messages) for each in samples
    ]


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"rows\.parquet: reading parquet needs pyarrow.*tlq\[parquet\]"):
        load_samples(tmp_path / "rows.parquet")


def test_a_folder_with_metadata(folder: Path) -> None:
    lines = [{"file_name": f"{index}.png", "question": "Which?", "answer": index} for index in range(3)]
    (folder / "images/metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert [sample.messages[1]["content"] for sample in load_samples(folder / "images")] == ["0", "1", "2"]


def test_a_folder_with_captions(folder: Path) -> None:
    for index, caption in enumerate(("a cat", "a dog", "a fox")):
        (folder / f"images/{index}.txt").write_text(f"{caption}\n")
    loaded = load_samples(folder / "images")
    assert [sample.id for sample in loaded] == ["0", "1", "2"]
    assert loaded[2].messages == [
        {"role": "user", "content": "<image>Describe this image."},
        {"role": "assistant", "content": "a fox"},
    ]


def test_a_draw_is_seeded_and_without_replacement(folder: Path) -> None:
    rows = [{"image": "0.png", "question": "Which?", "answer": index} for index in range(20)]
    path = write(folder / "rows.json", rows)
    ids = {seed: [each.id for each in load_samples(path, folder / "images", 10, seed)] for seed in (0, 1)}
    assert ids[0] == [each.id for each in load_samples(path, folder / "images", 10, 0)]
    assert ids[0] != ids[1]
    assert len(set(ids[0])) == 10


def test_unusable_rows_are_skipped_and_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(folder / "rows.json", [{**LLAVA, "image": f"{index}.png"} for index in range(4)])
    with caplog.at_level(logging.WARNING):
        assert len(load_samples(path, folder / "images", max_rejected=0.25)) == 3
    assert caplog.messages == [
        f"{path}: row 3 is skipped: unreadable image: {folder}/images/3.png: No such file or directory",
    ]
    with pytest.raises(ValueError, match=r"1 of 4 rows are unusable, max_rejected = 0\.2 .* row 3: unreadable image"):
        load_samples(path, folder / "images", max_rejected=0.2)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "it is a str, must be an object"),
        ({"image": "0.png"}, "no list of `conversations` or `messages`, and no `answer`"),
        ({"image": "0.png", "question": "Which?", "answer": " "}, "its answer is empty"),
        ({"question": "<image>Which?", "answer": "it"}, "1 image marks in its text, 0 images"),
        ({"images": [3], "answer": "it"}, r"neither a file's bytes nor its path \(found int\)"),
        ({**LLAVA, "conversations": [{"from": "bard", "value": "?"}]}, "a turn is from 'bard', not one of human"),
        ({"messages": [{"role": "user"}]}, "a turn has no text in `content`"),
    ],
)
def test_reasons_of_unusable_rows(folder: Path, row: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"1 of 1 rows are unusable.*{reason}"):
        load_samples(write(folder / "rows.json", [row]), folder / "images")


def test_wrong_paths_and_formats_are_refused_with_the_next_step(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.json: not found; give a \.json"):
        load_samples(folder / "none.json")
    path = write(folder / "rows.json", [LLAVA])
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder of images; correct image_root"):
        load_samples(path, folder / "nowhere")
    with pytest.raises(ValueError, match=r"rows\.csv: unknown kind of file; choose one of \.json"):
        load_samples(write(folder / "rows.csv", []))
    with pytest.raises(ValueError, match=r"object\.json: must be a list"):
        load_samples(write(folder / "object.json", {}))
    with pytest.raises(ValueError, match=r"rows\.json: 1 usable rows, 2 needed; lower the limit"):
        load_samples(path, folder / "images", limit=2)
    with pytest.raises(ValueError, match=r"images: neither metadata\.jsonl nor captions \(3 images"):
        load_samples(folder / "images")
    (folder / "bad.jsonl").write_text('{"image": 1}\n{')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: not valid JSON"):
        load_samples(folder / "bad.jsonl")


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("net", "net"),
        (3, "3"),
        (3.0, "3"),
        (2.5, "2.5"),
        (0, "0"),
        (2**62 + 1, "4611686018427387905"),
        (["net", "nets"], "net"),
        ([3.0], "3"),
    ],
)
def test_texts_numbers_and_lists_of_them_are_answers(folder: Path, cell: Any, text: str) -> None:
    path = folder / "table.parquet"
    pq.write_table(pa.Table.from_pylist([{"image": png(0), "question": "q", "answer": cell}]), path)
    (sample,) = load_samples(path)
    assert sample.messages[-1]["content"] == text


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ([{"answer": "net", "answer_id": 1}], "its answer is a dict, must be text, a number, or a list of those"),
        ({"value": "net", "aliases": ["nets"]}, "its answer is a dict, must be"),
        ([["net", "nets"]], "its answer is a list, must be"),
        (b"net", "its answer is a bytes, must be"),
        (True, "its answer is a bool, must be"),
        (float("inf"), "its answer is a float, must be"),
        (float("nan"), "its answer is empty"),
        (None, "its answer is empty"),
        ([], "its answer is empty"),
    ],
)
def test_other_cells_are_never_turned_into_text(folder: Path, cell: Any, reason: str) -> None:
    rows = [{"image": png(0), "question": "q", "answer": cell}, {"image": png(0), "question": "q", "answer": cell}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    with pytest.raises(ValueError, match=f"the first is row 0: {re.escape(reason)}"):
        load_samples(folder / "table.parquet")


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ({"text": "Who?"}, "its question is a dict, must be text, a number, or a list of those"),
        (b"Who?", "its question is a bytes, must be"),
        (True, "its question is a bool, must be"),
        ("  ", "its question is empty"),
        ("", "its question is empty"),
    ],
)
def test_a_question_is_text_or_its_row_is_refused(folder: Path, cell: Any, reason: str) -> None:
    rows = [{"image": png(0), "question": cell, "answer": "net"}] * 2
    pq.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    with pytest.raises(ValueError, match=f"the first is row 0: {re.escape(reason)}"):
        load_samples(folder / "table.parquet")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"video": "x.mp4"}, "it has a video; calibration takes texts and images"),
        ({"videos": ["x.mp4"]}, "it has a video"),
        ({"audio": "x.wav"}, "it has a audio"),
        ({"conversations": [{"from": "human", "value": "<video>\nWho?"}, LLAVA["conversations"][1]]}, "a mark <video>"),
        (
            {
                "images": ["0.png"],
                "image": None,
                "conversations": [{"from": "human", "value": "Hi"}, LLAVA["conversations"][1]],
            },
            "0 image marks in its text, 1 images",
        ),
        ({"image": 5}, "unreadable image: neither a file's bytes nor its path (found int)"),
        ({"image": [None]}, "unreadable image: neither a file's bytes nor its path (found NoneType)"),
        ({"conversations": None}, "it has no list of `conversations` or `messages`, and no `answer`"),
        (
            {"conversations": [{"from": "human", "value": "<image>\ud83d"}, LLAVA["conversations"][1]]},
            "half of a surrogate pair",
        ),
    ],
)
def test_conversations_that_calibration_cannot_use_say_why(folder: Path, change: Any, reason: str) -> None:
    path = write(folder / "rows.json", [{**LLAVA, **change}])
    with pytest.raises(ValueError, match=f"the first is row 0: .*{re.escape(reason)}"):
        load_samples(path, folder / "images")


def test_the_system_prompt_of_a_row_is_kept_as_a_turn(folder: Path) -> None:
    own = [{"from": "system", "value": "Be kind."}, *LLAVA["conversations"]]
    rows = [{**LLAVA, "system": "Answer in one word."}, {**LLAVA, "system": "Not this.", "conversations": own}]
    first, second = load_samples(write(folder / "rows.json", rows), folder / "images")
    assert [message["role"] for message in first.messages] == ["system", "user", "assistant"]
    assert (first.messages[0]["content"], second.messages[0]["content"]) == ("Answer in one word.", "Be kind.")


def test_a_byte_order_mark_is_no_text_and_other_encodings_say_what_to_do(folder: Path) -> None:
    path = folder / "rows.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps([LLAVA]).encode())
    assert len(load_samples(path, folder / "images")) == 1
    path.write_bytes(json.dumps([{**LLAVA, "id": "caf\u00e9"}], ensure_ascii=False).encode("latin-1"))
    with pytest.raises(
        ValueError, match="not UTF-8 at byte .*; convert it, for example with `iconv -f LATIN1 -t UTF-8"
    ):
        load_samples(path, folder / "images")


def test_deep_json_says_so(folder: Path) -> None:
    (folder / "rows.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="rows.json: JSON nested too deep; calibration data are a list of flat rows"):
        load_samples(folder / "rows.json")
