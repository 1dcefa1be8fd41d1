"""Read calibration samples: LLaVA's JSON, lists of questions, parquet, image folders.

====================  ==================================================================================================
a path                holds
====================  ==================================================================================================
``*.json``            a list of rows
``*.jsonl``           a row per line
``*.parquet``         a row per question; ``image`` is the bytes of an image file, or ``{"bytes", "path"}`` as the
                      library ``datasets`` writes it, or a list of either
a folder              images, and ``metadata.jsonl`` with a row per image; or, without it, next to each image
                      ``name.png`` its caption ``name.txt``
====================  ==================================================================================================

A row is one of

- ``{"conversations": [{"from": "human" | "gpt", "value": text}, ...], "image": name}``: LLaVA and ShareGPT4V;
- ``{"messages": [{"role", "content"}, ...], "images": [...]}``: the form of ``tlq.Sample``;
- ``{"question": text, "answer": text, "image": name}``; without a question (a caption), ``prompt`` is the question.

``image`` (``images``, or ``file_name`` as in the image folders of ``datasets``) is one name or a list of names,
relative to ``image_root``. ``<image>`` marks in a text say where the images go; a question without one gets them in
front. ``answer`` may be a list of accepted answers, of which the first is taken; ``text`` is another name for it.
"""

from __future__ import annotations

import json
import logging
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tlq.inputs.chat import IMAGE_MARK, Message
from tlq.inputs.images import decode_image, read_image_file
from tlq.samples import Sample

logger = logging.getLogger("tlq.data")

#: Roles of chat templates by the names that LLaVA's files give them.
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

CAPTION_PROMPT = "Describe this image."

_IMAGE_KEYS = ("image", "images", "file_name")
_ANSWER_KEYS = ("answer", "text", "caption")
_IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Rejected:
    """A row that calibration cannot use."""

    row: str
    reason: str


def load_samples(
    path: str | Path,
    image_root: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    prompt: str = CAPTION_PROMPT,
    max_rejected: float = 0.1,
) -> list[Sample]:
    """Read calibration samples from a file or a folder, see the module's table.

    Rows that calibration cannot use (an image is missing, an answer is empty) are skipped, and logged with the reason.

    Args:
        image_root: folder that image names are relative to; by default the folder of ``path``.
        limit: number of samples to draw, without replacement and in random order; by default all samples, in order.
        seed: seed of the draw.
        prompt: the question of rows that have none.
        max_rejected: share of the rows read that may be unusable.

    Raises:
        FileNotFoundError: the file or folder does not exist.
        ValueError: ``limit`` or ``seed`` is too small, the format is not in the table, too many rows are unusable, or
            fewer than ``limit`` are usable.
        ImportError: pyarrow, which reads parquet, is not installed.
    """
    for name, number, least in (("limit", limit, 1), ("seed", seed, 0)):
        if number is not None and number < least:
            raise ValueError(f"{name} is {number}, must be at least {least}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; give a .json, .jsonl or .parquet file, or a folder of images")
    root = Path(image_root) if image_root is not None else path if path.is_dir() else path.parent
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder of images; correct image_root")
    rows = _read_rows(path)

    def read(index: int) -> Sample:
        return sample_of(rows[index], str(index), root, path.name, prompt)

    kept, rejected = draw_usable(len(rows), read, limit, seed)
    for each in rejected:
        logger.warning("%s: row %s is skipped: %s", path, each.row, each.reason)
    if len(rejected) > max_rejected * (len(kept) + len(rejected)):
        raise ValueError(
            f"{path}: {len(rejected)} of {len(kept) + len(rejected)} rows are unusable, max_rejected = "
            f"{max_rejected:g} of them are allowed; the first is row {rejected[0].row}: {rejected[0].reason}"
        )
    if not kept or (limit is not None and len(kept) < limit):
        first = f"; the first unusable one is row {rejected[0].row}: {rejected[0].reason}" if rejected else ""
        raise ValueError(f"{path}: {len(kept)} usable rows, {limit or 1} needed; lower the limit or add rows{first}")
    return kept


def draw_usable(
    count: int,
    read: Callable[[int], Sample],
    limit: int | None,
    seed: int,
    check: Callable[[Sample], object] = lambda sample: None,
) -> tuple[list[Sample], list[Rejected]]:
    """Read rows until ``limit`` of them are usable.

    Args:
        count: number of rows.
        read: function from a row to its sample; raises ValueError with the reason if the row is unusable.
        limit: samples taken from a seeded shuffle of the rows; None takes every row in its order.
        check: called with every usable sample; ValueError with the reason if it is not usable after all.

    Returns:
        The samples, and the unusable rows among those read.
    """
    kept: list[Sample] = []
    rejected: list[Rejected] = []
    order = range(count) if limit is None else np.random.default_rng(seed).permutation(count)
    for index in order:
        if len(kept) == limit:
            break
        try:
            sample = checked(read(int(index)))
            check(sample)
            kept.append(sample)
        except ValueError as error:
            rejected.append(Rejected(str(index), str(error)))
    return kept, rejected


def checked(sample: Sample) -> Sample:
    """Return ``sample`` if calibration can use it; raise ValueError with the reason otherwise."""
    if not sample.messages or sample.messages[-1]["role"] != "assistant":
        raise ValueError("its last turn is not an answer")
    if not sample.messages[-1]["content"].strip():
        raise ValueError("its answer is empty")
    marks = sum(message["content"].count(IMAGE_MARK) for message in sample.messages)
    if marks != len(sample.images):
        raise ValueError(f"{marks} image marks in its text, {len(sample.images)} images")
    for data in sample.images:
        decode_image(data)
    return sample


def _read_rows(path: Path) -> Sequence[Any]:
    if path.is_dir():
        return _read_folder(path)
    readers: dict[str, Callable[[Path], Sequence[Any]]] = {
        ".json": read_json_list,
        ".jsonl": _read_json_lines,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: unknown kind of file; choose one of {', '.join(readers)}, or a folder of images")
    return readers[path.suffix](path)


def read_json_list(path: Path) -> list[Any]:
    """The rows of a JSON file.

    Raises:
        ValueError: the file is not JSON, or its content is not a list.
    """
    try:
        rows = json.loads(read_utf8(path))
    except (ValueError, RecursionError) as error:
        raise _no_json(str(path), error) from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must be a list of conversations")
    return rows


def _read_json_lines(path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise _no_json(f"{path}:{number}", error) from error
    return rows


def read_utf8(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: the file is in another encoding.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: not UTF-8 at byte {error.start}; convert it, for example with "
            f"`iconv -f LATIN1 -t UTF-8 {path.name}`"
        ) from error


def _no_json(place: str, error: Exception) -> ValueError:
    if isinstance(error, RecursionError):
        return ValueError(f"{place}: JSON nested too deep; calibration data are a list of flat rows")
    return ValueError(str(error) if "not UTF-8" in str(error) else f"{place}: not valid JSON: {error}")


def _read_parquet(path: Path) -> Sequence[Any]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{path}: reading parquet needs pyarrow; run `pip install 'tlq[parquet]'`") from error
    return _TableRows(pq.read_table(path))


class _TableRows(Sequence[Any]):
    """The rows of a pyarrow table as dicts, converted on access."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        return self._table.slice(index, 1).to_pylist()[0]


def _read_folder(folder: Path) -> list[Any]:
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        return _read_json_lines(metadata)
    captions = [
        (image, image.with_suffix(".txt"))
        for image in sorted(folder.iterdir())
        if image.suffix.lower() in _IMAGE_SUFFIXES
    ]
    if not any(caption.exists() for _, caption in captions):
        raise ValueError(
            f"{folder}: neither metadata.jsonl nor captions ({len(captions)} images, no .txt of the same name); add one"
        )
    return [
        {"id": image.stem, "image": image.name, "answer": read_utf8(caption).strip() if caption.exists() else ""}
        for image, caption in captions
    ]


def sample_of(
    row: Any, index: str, root: Path, source: str, prompt: str = CAPTION_PROMPT, folders: Sequence[Path] = ()
) -> Sample:
    """The sample of a row, see the module's list of rows.

    Args:
        index: id of the sample if the row has none.
        root: folder that image names are relative to.
        source: source of the sample if the row names none.

    Raises:
        ValueError: the row has none of the three forms, or an image cannot be read.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"it is a {type(row).__name__}, must be an object with names and values")
    for medium in ("video", "audio"):
        if any(_filled(row.get(key)) for key in (medium, f"{medium}s")):
            raise ValueError(f"it has a {medium}; calibration takes texts and images")
    images = [image_bytes(image, root, folders) for image in image_entries(row)]
    if isinstance(row.get("conversations"), list):
        messages = [_llava_message(turn) for turn in row["conversations"]]
    elif isinstance(row.get("messages"), list):
        messages = [_chat_message(turn) for turn in row["messages"]]
    else:
        messages = _question_and_answer(row, len(images), prompt)
    marks = [mark for mark in ("<video>", "<audio>") if any(mark in message["content"] for message in messages)]
    if marks:
        raise ValueError(f"its text has a mark {marks[0]}; calibration takes texts and images")
    if (system := as_text(row.get("system"), "its system prompt")) and messages and messages[0]["role"] != "system":
        messages.insert(0, Message(role="system", content=system))
    return Sample(text_or(row.get("id"), index), images, messages, text_or(row.get("source"), source))


def _filled(value: Any) -> bool:
    """Whether a cell holds anything; tables fill the cells of other rows with None or NaN."""
    return value is not None and value != "" and value != [] and not (isinstance(value, float) and math.isnan(value))


def image_entries(row: Mapping[str, Any]) -> list[Any]:
    """The images of a row, as names or as bytes."""
    value: Any = next((row[key] for key in _IMAGE_KEYS if _filled(row.get(key))), [])
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def image_bytes(image: Any, root: Path, folders: Sequence[Path] = ()) -> bytes:
    """The file of an image given by name, by bytes, or as ``{"bytes", "path"}``.

    Args:
        root: folder that names are relative to, and that files are read from.
        folders: further folders that files may be read from.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, Mapping):
        data = image.get("bytes")
        if data is not None and not isinstance(data, bytes):  # bytes(10**12) would take all memory
            raise ValueError(f"unreadable image: its bytes are of type {type(data).__name__}")
        if data is not None:
            return data
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise ValueError(f"unreadable image: neither a file's bytes nor its path (found {type(image).__name__})")
    return read_image_file(root / image, [root, *folders])


def _question_and_answer(row: Mapping[str, Any], images: int, prompt: str) -> list[Message]:
    key = next((key for key in _ANSWER_KEYS if key in row), None)
    if key is None:
        raise ValueError("it has no list of `conversations` or `messages`, and no `answer`")
    answer = as_text(row[key], f"its {key}")
    asked = row.get("question")
    question = as_text(asked, "its question")
    if not question and not isinstance(asked, str):  # no question, where an empty one would be a mistake
        question = prompt
    if not question.strip():
        raise ValueError("its question is empty")
    if IMAGE_MARK not in question:
        question = IMAGE_MARK * images + question
    return [Message(role="user", content=_tidy(question)), Message(role="assistant", content=answer)]


def as_text(value: Any, what: str = "a cell") -> str:
    """A cell as text: text, a number, or nothing; a list of accepted texts is its first.

    A whole number in a column with gaps, which tables keep as floating point, is written without a fraction. NaN is
    nothing.

    Raises:
        ValueError: the cell is anything else: its Python form would become a question or an answer.
    """
    if isinstance(value, list | tuple | np.ndarray):
        value = value[0] if len(value) else None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, str):
        return encodable(value, what)
    if isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_) and math.isfinite(value):
        return str(int(float(value))) if isinstance(value, float | np.floating) and value.is_integer() else str(value)
    raise ValueError(f"{what} is a {type(value).__name__}, must be text, a number, or a list of those")


def encodable(text: str, what: str) -> str:
    """Return ``text``; ValueError if it has half of a surrogate pair (of an emoji that a cut went through)."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{what} has half of a surrogate pair, which no encoding of text can hold")
    return text


def text_or(value: Any, default: str) -> str:
    """A cell as text, ``default`` where it is empty or no text."""
    try:
        return as_text(value) or default
    except ValueError:
        return default


def _llava_message(turn: Any) -> Message:
    """A LLaVA turn {"from", "value"} as a chat message; ValueError if it is not one."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
        raise ValueError("a turn has no text in `value`")
    if turn.get("from") not in ROLES:
        raise ValueError(f"a turn is from {turn.get('from')!r}, not one of {', '.join(ROLES)}")
    return Message(role=ROLES[turn["from"]], content=_tidy(encodable(turn["value"], "a turn")))


def _chat_message(turn: Any) -> Message:
    """A chat turn {"role", "content"}; ValueError if it is not one."""
    if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
        raise ValueError("a turn has no text in `content`")
    if turn.get("role") not in ROLES:
        raise ValueError(f"the role of a turn is {turn.get('role')!r}, must be one of {', '.join(ROLES)}")
    return Message(role=ROLES[turn["role"]], content=encodable(turn["content"], "a turn"))


def _tidy(text: str) -> str:
    """Drop LLaVA's newline between the image mark and the text, because chat templates add their own."""
    return text.replace(f"{IMAGE_MARK}\n", IMAGE_MARK).replace(f"\n{IMAGE_MARK}", IMAGE_MARK)
