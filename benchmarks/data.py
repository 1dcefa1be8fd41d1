"""Read and check a benchmark's rows from the hub or a local parquet; bad rows are listed, images stay encoded."""

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.source import BenchmarkSource as BenchmarkSource
from tlq.inputs.images import IMAGE_ERRORS, as_rgb, open_image, read_image_file

logger = logging.getLogger(__name__)


class BenchmarkError(ValueError):
    """A benchmark cannot run; the message names the value to change."""


class EncodedImage:
    """An image as its file's bytes. It is decoded when a batch needs it, so that a large set fits in memory."""

    def __init__(self, data: bytes, name: str) -> None:
        """Read the size from the header. Raises one of IMAGE_ERRORS if the bytes are not an image."""
        self._data = data
        self.name = name
        with open_image(data) as image:
            self.width, self.height = image.size

    def decode(self) -> Image.Image:
        """Pixels as RGB. Raises one of IMAGE_ERRORS if the file is damaged."""
        with open_image(self._data) as image:
            return as_rgb(image)

    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self._data).hexdigest()

    def __str__(self) -> str:
        return f"{self.name} ({self.width}x{self.height})"


@dataclass(frozen=True)
class Skip:
    """A chosen row that was not scored, and the reason."""

    doc: str
    reason: str


@dataclass
class Rows(Sequence[dict[str, Any]]):
    """Rows of one benchmark in the shape that lm-eval expects of a data set split.

    Attributes:
        folder: of a local table, in which its rows may name image files.
    """

    docs: list[dict[str, Any]]
    ids: list[str]
    asked: int
    skipped: list[Skip] = field(default_factory=list)
    folder: Path | None = None

    def digest(self) -> str:
        """SHA-256 of all rows, with the bytes of their images."""
        total = hashlib.sha256()
        for name, doc in zip(self.ids, self.docs, strict=True):
            cells = {key: cell.digest() if isinstance(cell, EncodedImage) else cell for key, cell in doc.items()}
            total.update(f"{name} {sorted(cells.items())!r}\n".encode())
        return total.hexdigest()

    @property
    def features(self) -> Mapping[str, Any]:
        return dict.fromkeys(self.docs[0]) if self.docs else {}

    def __getitem__(self, index: Any) -> Any:
        return self.docs[index]

    def __len__(self) -> int:
        return len(self.docs)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.docs)


def choose_rows(names: Sequence[str], task: str, limit: int | None, seed: int) -> list[int]:
    """Positions, in order, of the ``limit`` rows whose name has the smallest hash with seed and task.

    The choice depends on nothing else, so every variant answers the same questions.
    """
    if limit is None or limit >= len(names):
        return list(range(len(names)))

    def rank(position: int) -> bytes:
        return hashlib.sha256(f"{seed}:{task}:{names[position]}".encode()).digest()

    return sorted(sorted(range(len(names)), key=rank)[:limit])


def load_rows(
    source: BenchmarkSource,
    config: Mapping[str, Any],
    target: Callable[[Mapping[str, Any]], str],
    limit: int | None,
    seed: int,
) -> Rows:
    """Rows of a benchmark, the unusable ones listed in ``skipped``.

    Args:
        config: the task's YAML; ``metadata`` names its ``columns``, ``images`` and optionally an ``id`` column.
        target: the YAML's ``doc_to_target``; a row without a target is skipped unless ``empty_target: score``.
        limit: number of rows to choose, None for all; the source's own limit takes precedence.
    """
    metadata = config["metadata"]
    table = _read_table(source, config)
    names = _row_names(table, metadata.get("id"))
    limit = limit if source.limit is None else source.limit
    chosen = choose_rows(names, source.task, limit, seed)
    if limit is not None and limit > len(names):
        logger.warning("%s: %d items needed, %d found", source.task, limit, len(names))
    rows = Rows([], [], len(chosen) if limit is None else limit, folder=_folder(source))
    for position in chosen:
        _add_row(rows, dict(table[position]), names[position], metadata, target)
    if not rows.docs:
        first = f"; first reason: {rows.skipped[0].reason}" if rows.skipped else ""
        raise BenchmarkError(f"{source.task}: no usable row in {_place(source, config)}{first}")
    if rows.skipped:
        logger.warning(
            "%s: %d of %d rows skipped, e.g. %s: %s",
            source.task, len(rows.skipped), len(chosen), rows.skipped[0].doc, rows.skipped[0].reason,
        )  # fmt: skip
    return rows


def find_rows(
    source: BenchmarkSource,
    config: Mapping[str, Any],
    target: Callable[[Mapping[str, Any]], str],
    ids: Collection[str],
) -> Rows:
    """The rows of a benchmark with these ids; the unusable ones are listed in ``skipped``, missing ones are left out.

    Args:
        config, target: as for ``load_rows``.
    """
    metadata = config["metadata"]
    table = _read_table(source, config)
    rows = Rows([], [], len(ids), folder=_folder(source))
    for position, name in enumerate(_row_names(table, metadata.get("id"))):
        if name in ids:
            _add_row(rows, dict(table[position]), name, metadata, target)
    return rows


def _read_table(source: BenchmarkSource, config: Mapping[str, Any]) -> datasets.Dataset:
    """All rows of a benchmark, with the columns that it needs, and images as encoded bytes."""
    metadata = config["metadata"]
    table = _read_local(source) if source.data else _read_hub(source, config)
    _check_columns(table.column_names, metadata["columns"], source)
    for column in set(metadata["images"]) & set(table.column_names):
        if isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _place(source: BenchmarkSource, config: Mapping[str, Any]) -> str:
    if source.data:
        return source.data
    return f"{source.hub or config['dataset_path']} split {source.split or config['test_split']}"


def _folder(source: BenchmarkSource) -> Path | None:
    """The folder of a local table; None for a data set of the hub."""
    if not source.data:
        return None
    path = Path(source.data)
    return path if path.is_dir() else path.parent


def _read_local(source: BenchmarkSource) -> datasets.Dataset:
    """Read a parquet file with all its columns, written by ``datasets`` or pandas."""
    path = Path(str(source.data))
    if source.hub or source.revision or source.split or source.subset:
        raise BenchmarkError(f"{source.task}: give either `data` or hub, subset, revision and split, not both")
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise BenchmarkError(
            f"{source.task}: {path} is missing or holds no parquet file; run the stage that makes it or correct `data`"
        )
    try:
        return datasets.Dataset(pa.concat_tables(pq.read_table(file) for file in files))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{source.task}: {path} is no readable parquet file ({error})") from error


def _read_hub(source: BenchmarkSource, config: Mapping[str, Any]) -> datasets.Dataset:
    path, split = source.hub or config["dataset_path"], source.split or config["test_split"]
    kwargs = dict(config.get("dataset_kwargs") or {})
    if source.revision:
        kwargs["revision"] = source.revision
    try:
        loaded = datasets.load_dataset(path, source.subset or config.get("dataset_name"), **kwargs)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise BenchmarkError(
            f"{source.task}: cannot load {path} ({type(error).__name__}: {str(error)[:200]}); "
            "check hub id, subset, revision and network, or give a local parquet as `data`"
        ) from error
    if split not in loaded:
        raise BenchmarkError(f"{source.task}: {path} has no split {split!r}, it has {', '.join(loaded)}")
    return loaded[split]


def _check_columns(columns: Sequence[str], needed: Sequence[str], source: BenchmarkSource) -> None:
    missing = [column for column in needed if column not in columns]
    if missing:
        raise BenchmarkError(
            f"{source.task}: {source.data or source.hub or 'the data set'} lacks column {', '.join(missing)} "
            f"(it has {', '.join(columns)}); is it the right data set for this benchmark?"
        )


def _row_names(table: datasets.Dataset, id_column: str | None) -> list[str]:
    """Stable names of rows: the id if it is unique, else the position (with the id, if the row has one)."""
    if id_column is None:
        return [str(position) for position in range(len(table))]
    ids = [str(value) for value in table[id_column]]
    return ids if len(set(ids)) == len(ids) else [f"{name}#{position}" for position, name in enumerate(ids)]


def _add_row(
    rows: Rows,
    doc: dict[str, Any],
    name: str,
    metadata: Mapping[str, Any],
    target: Callable[[Mapping[str, Any]], str],
) -> None:
    """Check one row and add it to the rows or to the skipped rows."""
    empty = [
        column
        for column in metadata["columns"]
        if doc[column] is None and not (column in ("answers", "answer") and _scores_empty(metadata))
    ]
    if empty:
        rows.skipped.append(Skip(name, f"empty column {', '.join(empty)}"))
        return
    try:
        for column in metadata["images"]:
            if doc.get(column) is not None:
                doc[column] = _encoded(doc[column], f"{column} of {name}", rows.folder)
        if unfit := _unfit(doc):
            rows.skipped.append(Skip(name, unfit))
            return
        if not target(doc).strip() and not _scores_empty(metadata):
            rows.skipped.append(Skip(name, "no answer"))
            return
    except (TypeError, AttributeError, KeyError) as error:
        rows.skipped.append(Skip(name, f"its answer has a form that the benchmark does not have ({error})"[:200]))
        return
    except IMAGE_ERRORS as error:
        rows.skipped.append(Skip(name, f"{type(error).__name__}: {error}"[:200]))
        return
    rows.docs.append(doc)
    rows.ids.append(name)


def _unfit(doc: Mapping[str, Any]) -> str | None:
    """Why a row's question or answers have another form than the benchmark's; None if they do not."""
    if not isinstance(doc.get("question"), str):
        return f"question is {type(doc.get('question')).__name__}, must be text"
    answers = doc.get("answers")
    if isinstance(answers, str | bytes) or not isinstance(answers, Sequence | None):
        return f"answers is {type(answers).__name__}, must be a list"
    return None


def _scores_empty(metadata: Mapping[str, Any]) -> bool:
    return metadata.get("empty_target") == "score"


def _encoded(value: Any, name: str, folder: Path | None) -> EncodedImage:
    """Convert an image column entry ({"bytes", "path"} or bytes) to an EncodedImage.

    Args:
        folder: of a local table, which paths are relative to; None for a data set of the hub, whose paths are not read.
    """
    if isinstance(value, Mapping):
        data, path = value.get("bytes"), value.get("path")
        value = read_image_file(folder / path, [folder]) if not data and path and folder is not None else data
    if not isinstance(value, bytes):
        raise ValueError(f"image is neither bytes nor a readable path but {type(value).__name__}")
    return EncodedImage(value, name)
