"""Stage `calibset`: choose the tokens whose error calibration will count.

Reads data/importance, writes data/calibset/tokens.parquet (layer, group, sample, position, token_id, is_image, weight)
and summary.csv (per layer and group: tokens, effective tokens, image share).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from tasks.cli import run
from tasks.files import (
    CALIBSET,
    IMPORTANCE,
    Sequences,
    new_directory,
    read_importance,
    read_sequences,
    write_parquet,
    write_text,
)
from tasks.params import section
from tlq.importance import Importance, Source, Weighting, token_weights
from tlq.tokens import TokenBudget, effective_sample_size, select_tokens, split_by_sample


@dataclass(frozen=True)
class CalibsetParams:
    """Attributes:
    budget: how many tokens, and how they are chosen.
    source: importance they are chosen by.
    weighting: from raw importance to weights.
    """

    budget: TokenBudget
    source: Source = "token"
    weighting: Weighting = field(default_factory=Weighting)
    seed: int = 0


def build(scores: Importance, sequences: Sequences, params: CalibsetParams) -> pd.DataFrame:
    """The token-level calibration set of every layer and group, one row per chosen token."""
    token_id = np.concatenate(sequences.token_ids)
    is_image = np.concatenate(sequences.is_image)
    frames = []
    for number, ((layer, group), raw) in enumerate(sorted(scores.items())):
        weights = np.concatenate(token_weights(raw, sequences.is_image, params.source, params.weighting))
        generator = np.random.default_rng([params.seed, number])
        chosen, chosen_weights = select_tokens(weights, is_image, params.budget, generator)
        sample, position = split_by_sample(chosen, sequences.lengths)
        frames.append(
            pd.DataFrame(
                {
                    "layer": np.int32(layer),
                    "group": group,
                    "sample": sample.astype(np.int32),
                    "position": position.astype(np.int32),
                    "token_id": token_id[chosen],
                    "is_image": is_image[chosen],
                    "weight": chosen_weights,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


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


def main() -> None:
    params = section("calibset", CalibsetParams)
    tokens = build(read_importance(IMPORTANCE), read_sequences(IMPORTANCE), params)
    with new_directory(Path(CALIBSET)) as folder:
        write_parquet(tokens, folder / "tokens.parquet")
        write_text(summarise(tokens).to_csv(index=False), folder / "summary.csv")


if __name__ == "__main__":
    run(main)
