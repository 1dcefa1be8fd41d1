"""Stage `prepare`: draw calibration samples from a hub data set, a parquet file, or LLaVA-style JSON with images.

Writes data/prepared/calibration.parquet (id, images, messages, source) and data/prepared/rejected.csv (row, reason).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Image as ImageFeature
from datasets import Sequence as SequenceFeature
from datasets import load_dataset

from tasks.command import command_line
from tasks.config.params import PrepareParams, section
from tasks.files import PREPARED, write_samples
from tlq.data import Rejected, as_text, draw_usable, image_bytes, image_entries, read_json_list, sample_of
from tlq.inputs.chat import IMAGE_MARK, Message
from tlq.runtime.files import new_directory, write_text
from tlq.samples import Sample

logger = logging.getLogger("tlq.prepare")


def prepare(params: PrepareParams, out: Path) -> tuple[int, list[Rejected]]:
    """Draw, check and write the samples; returns the number of samples, and the rejected rows.

    Raises:
        ValueError: too many rows are unusable, there are too few rows, or a column is missing.
    """
    count, read = READERS[params.kind](params)
    kept, rejected = draw(count, read, params)
    with new_directory(out) as folder:
        write_samples(kept, folder / "calibration.parquet")
        frame = pd.DataFrame([vars(row) for row in rejected], columns=["row", "reason"])
        write_text(frame.to_csv(index=False), folder / "rejected.csv")
    return len(kept), rejected


def draw(count: int, read: Callable[[int], Sample], params: PrepareParams) -> tuple[list[Sample], list[Rejected]]:
    """The first ``params.samples`` usable rows of a seeded shuffle of ``count`` rows, and the unusable rows read."""
    kept, rejected = draw_usable(count, read, params.samples, params.seed)
    looked_at = len(kept) + len(rejected)
    if looked_at and len(rejected) / looked_at > params.max_rejected:
        raise ValueError(
            f"{params.path}: {len(rejected)} of {looked_at} rows are unusable, more than "
            f"prepare.max_rejected = {params.max_rejected:g} allows; the first: row {rejected[0].row}, "
            f"{rejected[0].reason}"
        )
    if len(kept) < params.samples:
        raise ValueError(f"{params.path}: {len(kept)} usable rows, prepare.samples needs {params.samples}")
    return kept, rejected


Reader = tuple[int, Callable[[int], Sample]]


def read_table(params: PrepareParams) -> Reader:
    """Read rows with an image (or a list of images), a question and an answer (or a list of accepted answers)."""
    if params.kind == "parquet":
        if not Path(params.path).exists():
            raise FileNotFoundError(f"{params.path}: not found; set prepare.path to a parquet file")
        dataset = load_dataset("parquet", data_files={params.split: params.path}, split=params.split)
    else:
        dataset = load_dataset(params.path, params.name, split=params.split, revision=params.revision)
    columns = params.columns
    asked = columns.question if params.prompt is None else None
    wanted = [columns.image, columns.answer, *filter(None, (asked, columns.id, columns.source))]
    missing = [name for name in wanted if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"{params.path}: no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}: "
            "name the right ones in prepare.columns"
        )
    dataset = _keep_encoded(dataset, columns.image)

    def read(index: int) -> Sample:
        row = dataset[index]
        images = row[columns.image] if isinstance(row[columns.image], list) else [row[columns.image]]
        encoded = [image_bytes(image, Path()) for image in images if image is not None]
        answer = row[columns.answer]
        if isinstance(answer, list):
            answer = answer[0] if answer else ""
        question = f"{IMAGE_MARK * len(encoded)}{as_text(row[asked] if asked else params.prompt)}"
        messages = [
            Message(role="user", content=question),
            Message(role="assistant", content=as_text(answer)),
        ]
        identifier = str(row[columns.id]) if columns.id else str(index)
        source = str(row[columns.source]) if columns.source else params.path
        return Sample(identifier, encoded, messages, source)

    return len(dataset), read


def _keep_encoded(dataset: Any, column: str) -> Any:
    """Prevent ``datasets`` from decoding images, because the encoded files are stored."""
    feature = dataset.features[column]
    if isinstance(feature, ImageFeature):
        return dataset.cast_column(column, ImageFeature(decode=False))
    if isinstance(getattr(feature, "feature", None), ImageFeature):
        return dataset.cast_column(column, SequenceFeature(ImageFeature(decode=False)))
    return dataset


def read_llava_json(params: PrepareParams) -> Reader:
    """Read LLaVA / ShareGPT4V: a list of {"id", "image", "conversations": [{"from", "value"}, ...]}."""
    path, root = Path(params.path), Path(params.image_root or "")
    if not path.exists() or not root.is_dir():
        raise FileNotFoundError(f"{path} or image_root {root}: not found; correct them in prepare")
    rows = [row for row in read_json_list(path) if _has_prefix(row, params.image_prefix)]

    def read(index: int) -> Sample:
        if not isinstance(rows[index], dict) or not isinstance(rows[index].get("conversations"), list):
            raise ValueError("it has no list of `conversations`")
        return sample_of(rows[index], str(index), root, path.name)

    return len(rows), read


def _has_prefix(row: Any, prefix: str) -> bool:
    """Whether the names of a row's images begin with ``prefix``; with a prefix, the row needs at least one image."""
    if not prefix:
        return True
    names = image_entries(row) if isinstance(row, dict) else []
    return bool(names) and all(name.startswith(prefix) for name in names)


READERS: dict[str, Callable[[PrepareParams], Reader]] = {
    "parquet": read_table,
    "hub": read_table,
    "llava_json": read_llava_json,
}


def main() -> None:
    params = section("prepare", PrepareParams)
    kept, rejected = prepare(params, PREPARED)
    logger.info("%d samples kept, %d rows rejected", kept, len(rejected))


if __name__ == "__main__":
    command_line(main, __doc__)
