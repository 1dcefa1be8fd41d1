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
from datasets.exceptions import DatasetsError

from tasks.command import command_line
from tasks.config.params import section
from tasks.config.sections import ImportanceParams, ModelParams, PrepareParams
from tasks.files import PREPARED, write_samples
from tlq.data import Rejected, draw_usable, image_entries, read_json_list, sample_of
from tlq.models.checkpoint import local_folder
from tlq.models.processor import load_processor
from tlq.runtime.files import new_directory, write_text
from tlq.samples import Sample, encode_sample

logger = logging.getLogger("tlq.prepare")


Check = Callable[[Sample], object]


def accepts_all(sample: Sample) -> None:
    """The check of a source on its own, without a model."""


def prepare(params: PrepareParams, out: Path, check: Check = accepts_all) -> tuple[int, list[Rejected]]:
    """Draw, check and write the samples; returns the number of samples, and the rejected rows.

    Raises:
        ValueError: too many rows are unusable, there are too few rows, or a column is missing.
    """
    count, read = READERS[params.kind](params)
    kept, rejected = draw(count, read, params, check)
    if not any(sample.images for sample in kept):
        logger.warning("none of the %d samples has an image; is prepare.columns.image right?", len(kept))
    with new_directory(out) as folder:
        write_samples(kept, folder / "calibration.parquet")
        frame = pd.DataFrame([vars(row) for row in rejected], columns=["row", "reason"])
        write_text(frame.to_csv(index=False), folder / "rejected.csv")
    return len(kept), rejected


def draw(
    count: int, read: Callable[[int], Sample], params: PrepareParams, check: Check = accepts_all
) -> tuple[list[Sample], list[Rejected]]:
    """The first ``params.samples`` usable rows of a seeded shuffle of ``count`` rows, and the unusable rows read."""
    kept, rejected = draw_usable(count, read, params.samples, params.seed, check)
    looked_at = len(kept) + len(rejected)
    if looked_at and len(rejected) / looked_at > params.max_rejected:
        raise ValueError(
            f"{params.path}: {len(rejected)} of {looked_at} rows are unusable, more than "
            f"prepare.max_rejected = {params.max_rejected:g} allows; the first: row {rejected[0].row}, "
            f"{rejected[0].reason}"
        )
    if len(kept) < params.samples:
        first = (
            f"; {len(rejected)} are not, the first is row {rejected[0].row}: {rejected[0].reason}" if rejected else ""
        )
        raise ValueError(f"{params.path}: {len(kept)} usable rows, prepare.samples needs {params.samples}{first}")
    return kept, rejected


Reader = tuple[int, Callable[[int], Sample]]


def read_table(params: PrepareParams) -> Reader:
    """Read rows with an image (or a list of images), a question and an answer (or a list of accepted answers)."""
    if params.kind == "parquet":
        if not Path(params.path).exists():
            raise FileNotFoundError(f"{params.path}: not found; set prepare.path to a parquet file")
        try:
            dataset = load_dataset("parquet", data_files={params.split: params.path}, split=params.split)
        except (ValueError, DatasetsError) as error:
            raise ValueError(
                f"{params.path}: not readable as parquet with rows ({_reason(error)}); make it again, or correct "
                "prepare.path"
            ) from error
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
    root, place = Path(params.image_root or ""), Path(params.path)
    folder = place if place.is_dir() else place.parent

    def read(index: int) -> Sample:
        row = dataset[index]
        cells = {
            "image": row[columns.image],
            "question": row[asked] if asked else params.prompt,
            "answer": row[columns.answer],
            "id": row[columns.id] if columns.id else None,
            "source": row[columns.source] if columns.source else None,
        }
        return sample_of(cells, str(index), root, params.path, prompt="", folders=[folder])

    return len(dataset), read


def _reason(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split())[:200]


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
    return bool(names) and all(isinstance(name, str) and name.startswith(prefix) for name in names)


READERS: dict[str, Callable[[PrepareParams], Reader]] = {
    "parquet": read_table,
    "hub": read_table,
    "llava_json": read_llava_json,
}


def usable_by(model: str, max_tokens: int) -> Check:
    """Refuse samples that the model's chat template or processor cannot take, or that are longer than ``max_tokens``.

    Without it the stages after this one would stop at the first such sample.
    """
    processor = load_processor(local_folder(model, weights=False))

    def check(sample: Sample) -> None:
        inputs, _ = encode_sample(sample, processor)
        tokens = inputs["input_ids"].shape[1]
        if tokens > max_tokens:
            raise ValueError(f"{tokens} tokens, more than importance.max_tokens = {max_tokens} allows")

    return check


def main() -> None:
    params = section("prepare", PrepareParams)
    model = section("model", ModelParams).path
    kept, rejected = prepare(params, PREPARED, usable_by(model, section("importance", ImportanceParams).max_tokens))
    logger.info("%d samples kept, %d rows rejected", kept, len(rejected))


if __name__ == "__main__":
    command_line(main, __doc__)
