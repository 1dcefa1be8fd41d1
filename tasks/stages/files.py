"""Files that stages leave for each other, and their formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tlq.importance.weighting import Importance, LossName
from tlq.runtime.files import new_directory, new_file
from tlq.samples import Sample, Sequences

PREPARED = Path("data/prepared")
IMPORTANCE = Path("data/importance")
CALIBSET = Path("data/calibset")
MODELS = Path("models")
EVALUATION = Path("evaluation")
REPORT = Path("report")


class VariantName(NamedTuple):
    """``<recipe>-<scheme>``: the folder of a checkpoint, and of its scores."""

    recipe: str
    scheme: str

    @classmethod
    def parse(cls, name: str) -> VariantName:
        """Raises ValueError if ``name`` is not a recipe and a scheme; names of recipes may have hyphens."""
        recipe, hyphen, scheme = name.rpartition("-")
        if not (recipe and hyphen and scheme):
            raise ValueError(f"variant {name!r}: needs the form <recipe>-<scheme>, for instance tlq-w3a16")
        return cls(recipe, scheme)

    def __str__(self) -> str:
        return f"{self.recipe}-{self.scheme}"


def existing(path: Path, stage: str) -> Path:
    """``path``; raises FileNotFoundError, with the DVC stage that makes it, if there is no such file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; run `dvc repro {stage}` first")
    return path


_SAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.binary())),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("source", pa.string()),
    ]
)


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    table = pa.Table.from_pylist([asdict(sample) for sample in samples], schema=_SAMPLES)
    with new_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_samples(path: Path, limit: int | None = None) -> list[Sample]:
    """The first ``limit`` calibration samples.

    Raises:
        FileNotFoundError, ValueError: no such file, a column is missing, or fewer samples than asked for.
    """
    table = pq.read_table(existing(path, "prepare"))
    missing = [name for name in _SAMPLES.names if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path}: needs the columns {', '.join(_SAMPLES.names)} but has no {', '.join(missing)}; "
            "make it with `dvc repro prepare`"
        )
    if limit is not None and limit > table.num_rows:
        raise ValueError(f"{path}: {limit} samples asked for, {table.num_rows} there; raise prepare.samples")
    return [Sample(**row) for row in table.slice(0, limit).to_pylist()]


def write_importance(scores: Mapping[LossName, Importance], sequences: Sequences, folder: Path) -> None:
    """Write ``scores.parquet`` (loss, layer, group, sample, values) and ``sequences.parquet``, a row per sample."""
    rows: list[dict[str, Any]] = [
        {"loss": loss, "layer": layer, "group": group, "sample": sample, "values": values}
        for loss, importance in scores.items()
        for (layer, group), per_sample in importance.items()
        for sample, values in enumerate(per_sample)
    ]
    schema = pa.schema(
        [
            ("loss", pa.string()),
            ("layer", pa.int32()),
            ("group", pa.string()),
            ("sample", pa.int32()),
            ("values", pa.list_(pa.float32())),
        ]
    )
    marks = {"is_image": sequences.is_image, "is_answer": sequences.is_answer}
    token_rows = {"token_ids": sequences.token_ids, **marks}
    with new_directory(folder) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), temporary / "scores.parquet", compression="zstd")
        pq.write_table(pa.table(token_rows), temporary / "sequences.parquet", compression="zstd")


def read_sequences(folder: Path) -> Sequences:
    table = pq.read_table(existing(folder / "sequences.parquet", "importance"))
    is_image, is_answer = (
        [np.asarray(marks, np.bool_) for marks in table[name].to_pylist()] for name in ("is_image", "is_answer")
    )
    return Sequences([np.asarray(ids, np.int32) for ids in table["token_ids"].to_pylist()], is_image, is_answer)


def read_importance(folder: Path, loss: LossName = "answer") -> Importance:
    """Raw scores of one loss.

    Raises:
        ValueError: that loss was not scored.
    """
    table = pq.read_table(existing(folder / "scores.parquet", "importance"))
    table = table.filter(pc.equal(table["loss"], loss))
    if not table.num_rows:
        raise ValueError(f"{folder}: holds no scores of the loss {loss}; add it to importance.losses in params.yaml")
    scores: Importance = {}
    columns = (table[name].to_pylist() for name in ("layer", "group", "values"))
    for layer, group, values in zip(*columns, strict=True):
        scores.setdefault((layer, group), []).append(np.asarray(values, np.float32))
    return scores


def read_tokens(path: Path) -> pd.DataFrame:
    """The token-level calibration set: layer, group, sample, position, token_id, is_image, weight."""
    return pq.read_table(existing(path, "calibset")).to_pandas()


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    with new_file(path) as temporary:
        frame.to_parquet(temporary, index=False, compression="zstd")
