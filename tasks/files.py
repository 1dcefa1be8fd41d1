"""Read and write the files that pass between stages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tlq.importance.pool import GroupKey, Importance, PoolWeights, TokenPool, WeightedTokens
from tlq.importance.weighting import LossName
from tlq.quantization.formats import Scheme
from tlq.runtime.files import new_directory, new_file
from tlq.samples import Sample

PREPARED = Path("data/prepared")
IMPORTANCE = Path("data/importance")
CALIBSET = Path("data/calibset")
ALLOCATION = Path("data/allocation")
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
    """``path``; raises FileNotFoundError, with the DVC stage that makes the file, if it is missing."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; run `dvc repro {stage}` first")
    return path


#: Key of the input widths in the metadata of scores.parquet.
_WIDTHS = b"input_widths"

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
        FileNotFoundError, ValueError: the file or a column is missing, or there are fewer samples than ``limit``.
    """
    table = pq.read_table(existing(path, "prepare"))
    missing = [name for name in _SAMPLES.names if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{path}: needs the columns {', '.join(_SAMPLES.names)} but has no {', '.join(missing)}; "
            "make it with `dvc repro prepare`"
        )
    if limit is not None and limit > table.num_rows:
        raise ValueError(f"{path}: {limit} samples needed, {table.num_rows} found; raise prepare.samples")
    return [Sample(**row) for row in table.slice(0, limit).to_pylist()]


def write_importance(
    scores: Mapping[LossName, Importance], pool: TokenPool, folder: Path, widths: Mapping[GroupKey, int] | None = None
) -> None:
    """Write ``scores.parquet`` (loss, layer, group, and the list of all tokens' values) and ``sequences.parquet``.

    ``sequences.parquet`` has a row per sample, with lists of its tokens; their lengths divide the values among samples.

    Args:
        widths: input channels of every layer and group, which ``scores.parquet`` holds as metadata.
    """
    losses, layers, groups = zip(*((loss, *key) for loss in scores for key in scores[loss]), strict=True)
    whole = np.array([0, len(pool)])
    table = pa.table(
        {
            "loss": pa.array(losses, pa.string()),
            "layer": pa.array(layers, pa.int32()),
            "group": pa.array(groups, pa.string()),
            "values": pa.chunked_array(
                [_lists(values, whole) for importance in scores.values() for values in importance.values()]
            ),
        }
    )
    tokens = {name: _lists(getattr(pool, name), pool.cu_seqlens) for name in ("token_ids", "is_image", "is_answer")}
    with new_directory(folder) as temporary:
        by_group = json.dumps([[*key, width] for key, width in sorted((widths or {}).items())])
        described = table.replace_schema_metadata({_WIDTHS: by_group})
        pq.write_table(described, temporary / "scores.parquet", compression="zstd")
        pq.write_table(pa.table(tokens), temporary / "sequences.parquet", compression="zstd")


def _lists(values: NDArray[Any], cu_seqlens: NDArray[np.int64]) -> pa.ListArray:
    """Values [tokens] as lists, the list ``i`` from ``cu_seqlens[i]`` to ``cu_seqlens[i + 1]``."""
    return pa.ListArray.from_arrays(pa.array(cu_seqlens, pa.int32()), pa.array(values))


def read_pool(folder: Path) -> TokenPool:
    """The tokens of all scored samples."""
    table = _read_table(folder / "sequences.parquet", "importance")
    lengths = pc.list_value_length(table["token_ids"]).to_numpy()
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return TokenPool(cu_seqlens, *(_flat(table[name]) for name in ("token_ids", "is_image", "is_answer")))


def read_importance(folder: Path, loss: LossName = "answer") -> Importance:
    """Raw scores of one loss.

    Raises:
        ValueError: the loss was not scored, or an older version wrote the file.
    """
    table = pq.read_table(existing(folder / "scores.parquet", "importance"))
    if "sample" in table.column_names:
        raise ValueError(f"{folder}: written by an older version, one row per sample; run `dvc repro importance`")
    table = table.filter(pc.equal(table["loss"], loss))
    if not table.num_rows:
        raise ValueError(f"{folder}: holds no scores of the loss {loss}; add it to importance.losses in params.yaml")
    keys = zip(table["layer"].to_pylist(), table["group"].to_pylist(), strict=True)
    return {key: row.values.to_numpy() for key, row in zip(keys, table["values"], strict=True)}


def read_widths(folder: Path) -> dict[GroupKey, int]:
    """Input channels of every layer and group; none in files of older versions."""
    metadata = pq.read_schema(existing(folder / "scores.parquet", "importance")).metadata or {}
    return {(layer, group): width for layer, group, width in json.loads(metadata.get(_WIDTHS, b"[]"))}


def _flat(lists: pa.ChunkedArray) -> NDArray[Any]:
    """A column of lists as one flat array."""
    return pc.list_flatten(lists).to_numpy()


def read_allocation(scheme: Scheme, folder: Path) -> Scheme:
    """A scheme with its budget, if it has one, distributed as stage `allocate` has chosen."""
    if scheme.budget is None:
        return scheme
    path = existing(folder / f"{scheme.name}.json", "allocate")
    return replace(scheme, budget=None, overrides=tuple(json.loads(path.read_text())["overrides"].items()))


def read_tokens(path: Path) -> pd.DataFrame:
    """The token-level calibration set: layer, group, sample, position, token_id, is_image, weight."""
    return _read_table(path, "calibset").to_pandas()


def read_token_weights(path: Path, pool: TokenPool) -> PoolWeights:
    """The token-level calibration set as weights of the pool's tokens."""
    table = read_tokens(path)
    indices = pool.cu_seqlens[table["sample"].to_numpy()] + table["position"].to_numpy()
    weights = table["weight"].to_numpy()
    groups: dict[GroupKey, WeightedTokens] = {}
    for key, rows in table.groupby(["layer", "group"]).indices.items():
        layer, group = cast(tuple[int, str], key)
        groups[int(layer), group] = WeightedTokens(indices[rows], weights[rows])
    return PoolWeights(pool.cu_seqlens, groups)


def _read_table(path: Path, stage: str) -> pa.Table:
    return pq.read_table(existing(path, stage))


def write_parquet(frame: pd.DataFrame, path: Path) -> None:
    with new_file(path) as temporary:
        frame.to_parquet(temporary, index=False, compression="zstd")
