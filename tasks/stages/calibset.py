"""Stage `calibset`: choose the tokens whose error calibration will count.

Reads data/importance, writes data/calibset/tokens.parquet (layer, group, sample, position, token_id, is_image, weight)
and summary.csv (per layer and group: tokens, effective tokens, image share). Sets with fewer effective tokens than
calibset.weighting.least_effective are warned of.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tasks.config.params import CalibsetParams, section
from tasks.stages.command import command_line
from tasks.stages.files import CALIBSET, IMPORTANCE, read_importance, read_sequences, write_parquet
from tlq.importance.token_set import effective_sample_size
from tlq.importance.token_weights import token_set
from tlq.importance.weighting import Importance, loss_of
from tlq.runtime.files import new_directory, write_text
from tlq.samples import Sequences

logger = logging.getLogger("tlq.calibset")


def build(scores: Importance, sequences: Sequences, params: CalibsetParams) -> pd.DataFrame:
    """The token-level calibration set of every layer and group, one row per chosen token."""
    weights = token_set(
        scores,
        sequences.is_image,
        params.source,
        params.weighting,
        params.budget,
        params.seed,
        sequences.is_answer,
    )
    parts = [
        _rows(layer, group, sample, values, sequences)
        for (layer, group), per_sample in weights.items()
        for sample, values in sorted(per_sample.items())
    ]
    return pd.concat(parts, ignore_index=True)


def _rows(layer: int, group: str, sample: int, values: NDArray[np.float32], sequences: Sequences) -> pd.DataFrame:
    """Chosen tokens of one sample, in order of position."""
    position = np.flatnonzero(values)
    columns = {
        "layer": np.int32(layer),
        "group": group,
        "sample": np.int32(sample),
        "position": position.astype(np.int32),
        "token_id": sequences.token_ids[sample][position],
        "is_image": sequences.is_image[sample][position],
        "weight": values[position],
    }
    return pd.DataFrame(columns)


def summarise(tokens: pd.DataFrame) -> pd.DataFrame:
    """Per layer and group: chosen tokens, (sum w)^2 / sum w^2, share of weight on image tokens."""
    rows = [
        {
            "layer": layer,
            "group": group,
            "tokens": len(part),
            "effective_tokens": round(effective_sample_size(part["weight"].to_numpy()), 1),
            "image_weight": round(float(part.loc[part["is_image"], "weight"].sum() / part["weight"].sum()), 4),
        }
        for (layer, group), part in tokens.groupby(["layer", "group"], sort=True)
    ]
    return pd.DataFrame(rows)


def warn_of_few(summary: pd.DataFrame, least_effective: int) -> None:
    """Name every set with fewer effective tokens than asked for: by floors, caps, or a source not evened out."""
    for row in summary[summary["effective_tokens"] < least_effective].to_dict("records"):
        logger.warning(
            "layer %d, group %s: %.1f effective tokens, fewer than calibset.weighting.least_effective %d; raise "
            "calibset.budget.tokens_per_layer or importance.samples",
            row["layer"],
            row["group"],
            row["effective_tokens"],
            least_effective,
        )


def main() -> None:
    params = section("calibset", CalibsetParams)
    tokens = build(read_importance(IMPORTANCE, loss_of(params.source)), read_sequences(IMPORTANCE), params)
    summary = summarise(tokens)
    warn_of_few(summary, params.weighting.least_effective)
    with new_directory(Path(CALIBSET)) as folder:
        write_parquet(tokens, folder / "tokens.parquet")
        write_text(summary.to_csv(index=False), folder / "summary.csv")


if __name__ == "__main__":
    command_line(main, __doc__)
