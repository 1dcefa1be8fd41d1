"""Stage `importance`: how much every token of the calibration samples matters, by layer and linear group.

Reads data/prepared, writes data/importance (scores.parquet, sequences.parquet).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tasks.cli import device, run
from tasks.files import IMPORTANCE, PREPARED, read_samples, write_importance
from tasks.launch import on_ranks
from tasks.params import ModelParams, section
from tlq.importance import LossName
from tlq.processor import load_processor
from tlq.quantizer import get_scheme
from tlq.ranks import joined_ranks
from tlq.samples import encode_batches, image_token_id, sequences_of
from tlq.scoring import AnswerLoss, BlockLoss, Loss, score_resumably
from tlq.state import WorkFolder
from tlq.streaming import StreamedModel


@dataclass(frozen=True)
class ImportanceParams:
    """Attributes:
    samples: how many of the prepared samples are scored; the pool that token sets are drawn from.
    batch_size: samples per micro-batch.
    max_tokens: longest sample allowed.
    losses: whose gradients are scored: `answer` (sources token and modality), `block` (source block).
    block_scheme: what the loss `block` rounds weights to.
    """

    samples: int
    batch_size: int = 8
    max_tokens: int = 4096
    losses: tuple[LossName, ...] = ("answer",)
    block_scheme: str = "w3a16"


def main() -> None:
    on_ranks("tasks.importance", [], score)


def score() -> None:
    """Score every sample on this process's share of the work; the leading rank writes the result."""
    model_params = section("model", ModelParams)
    params = section("importance", ImportanceParams)
    scheme = get_scheme(params.block_scheme)
    samples = read_samples(PREPARED / "calibration.parquet", params.samples)
    model = StreamedModel(model_params.path, model_params.torch_dtype, device())
    processor = load_processor(model.folder)
    batches = encode_batches(samples, processor, image_token_id(model.config), params.batch_size, params.max_tokens)
    losses: dict[LossName, Loss] = {"answer": AnswerLoss(), "block": BlockLoss(scheme, model.storage)}
    work = {name: WorkFolder(IMPORTANCE.with_name(f"importance-{name}")) for name in params.losses}
    with joined_ranks(device()) as ranks:
        scores = {
            name: score_resumably(model, batches, len(samples), losses[name], folder, ranks)
            for name, folder in work.items()
        }
        if ranks.leads:
            write_importance(scores, sequences_of(batches), Path(IMPORTANCE))
            for folder in work.values():
                folder.remove()


if __name__ == "__main__":
    run(main)
