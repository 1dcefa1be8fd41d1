"""Stage `report`: the scores in one table and picture, and a picture of which tokens mattered.

Reads evaluation/, data/prepared, data/importance and data/calibset; writes report/ (scores.csv, means.csv for
`dvc plots`, scores.txt, scores.png, tokens.png).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.compare import scores_table
from tasks.cli import run
from tasks.files import (
    CALIBSET,
    EVALUATION,
    IMPORTANCE,
    PREPARED,
    REPORT,
    read_importance,
    read_samples,
    read_sequences,
    read_tokens,
)
from tasks.params import ModelParams, VariantParams, section
from tasks.pictures import TokenPicture, draw_scores, draw_tokens
from tlq.files import new_directory, write_text
from tlq.processor import load_processor
from tlq.samples import Sample, decode_image


@dataclass(frozen=True)
class ReportParams:
    """Attributes:
    token_samples: how many samples the picture of token importance shows.
    """

    token_samples: int = 4


def gather_scores(variants: list[str]) -> pd.DataFrame:
    """Scores of every variant: variant, benchmark, score, low, high."""
    return pd.concat([pd.read_csv(EVALUATION / name / "scores.csv") for name in variants], ignore_index=True)


def token_pictures(count: int, tokenizer: Any) -> list[TokenPicture]:
    """The samples shown: spread evenly over the kinds of question (their text up to the last word)."""
    sequences = read_sequences(IMPORTANCE)
    samples = read_samples(PREPARED / "calibration.parquet", len(sequences.lengths))
    scores = read_importance(IMPORTANCE)
    chosen = read_tokens(CALIBSET / "tokens.parquet")
    pictures = []
    for index in _spread(samples, count):
        values = np.mean([part[index] / np.mean(np.concatenate(part)) for part in scores.values()], axis=0)
        image = sequences.is_image[index]
        mask = np.zeros(len(image), bool)
        mask[chosen.loc[chosen["sample"] == index, "position"].unique()] = True
        pictures.append(
            TokenPicture(
                title=samples[index].id,
                image=decode_image(samples[index].images[0]) if samples[index].images else None,
                image_values=values[image],
                texts=[tokenizer.decode([token]) for token in sequences.token_ids[index][~image]],
                text_values=values[~image],
                chosen_image=mask[image],
                chosen_texts=mask[~image],
            )
        )
    return pictures


def _spread(samples: list[Sample], count: int) -> list[int]:
    """Indices of up to ``count`` samples, from as many different sources as there are."""
    by_source: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        by_source.setdefault(sample.source, []).append(index)
    rounds = max(len(indices) for indices in by_source.values())
    order = [indices[turn] for turn in range(rounds) for indices in by_source.values() if turn < len(indices)]
    return order[:count]


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    params = section("report", ReportParams)
    variants = ["full", *section("variants", VariantParams).names]
    scores = gather_scores(variants)
    metrics = [json.loads((EVALUATION / name / "metrics.json").read_text()) for name in variants]
    tokenizer = load_processor(section("model", ModelParams).path).tokenizer
    with new_directory(REPORT) as folder:
        write_text(scores.to_csv(index=False), folder / "scores.csv")
        write_text(scores[scores["benchmark"] == "mean"].to_csv(index=False), folder / "means.csv")
        write_text(scores_table(metrics) + "\n", folder / "scores.txt")
        save(draw_scores(scores), folder / "scores.png")
        save(draw_tokens(token_pictures(params.token_samples, tokenizer)), folder / "tokens.png")


if __name__ == "__main__":
    run(main)
