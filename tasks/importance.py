"""Stage `importance`: how much every token of the calibration samples matters, by layer and linear group.

Reads data/prepared, writes data/importance (scores.parquet, sequences.parquet).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.cli import device, run
from tasks.files import IMPORTANCE, PREPARED, Sequences, read_samples, write_importance
from tasks.params import ModelParams, section
from tlq.checkpoint import load_model
from tlq.processor import load_processor
from tlq.samples import Batch, encode_batches, image_token_id, token_rows
from tlq.scoring import score_tokens
from tlq.streaming import ResidentModel


@dataclass(frozen=True)
class ImportanceParams:
    """Attributes:
    samples: how many of the prepared samples are scored; the pool that token sets are drawn from.
    batch_size: samples per micro-batch.
    max_tokens: longest sample allowed.
    """

    samples: int
    batch_size: int = 8
    max_tokens: int = 4096


def main() -> None:
    model_params = section("model", ModelParams)
    params = section("importance", ImportanceParams)
    samples = read_samples(PREPARED / "calibration.parquet", params.samples)
    model = load_model(model_params.path, model_params.torch_dtype, device())
    processor = load_processor(model_params.path)
    batches = encode_batches(samples, processor, image_token_id(model.config), params.batch_size, params.max_tokens)
    scores = score_tokens(ResidentModel(model), batches, len(samples))
    write_importance(scores, sequences_of(batches, len(samples)), Path(IMPORTANCE))


def sequences_of(batches: Sequence[Batch], samples: int) -> Sequences:
    """Token ids and image marks of every sample, padding removed."""
    token_ids = [np.empty(0, np.int32)] * samples
    is_image = [np.empty(0, np.bool_)] * samples
    for sample, row, batch in token_rows(batches):
        valid = batch.valid[row]
        token_ids[sample] = batch.input_ids[row][valid].numpy().astype(np.int32)
        is_image[sample] = batch.is_image[row][valid].numpy()
    return Sequences(token_ids, is_image)


if __name__ == "__main__":
    run(main)
