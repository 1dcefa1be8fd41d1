"""A calibration on ranks that are forked from the test's process, after its imports."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import distributed as dist

from support.forked import Forked
from tlq.calibration.job import CalibrationJob
from tlq.importance.gradients import score_resumably
from tlq.importance.losses import AnswerLoss
from tlq.importance.pool import TokenPool
from tlq.importance.token_set import TokenBudget
from tlq.importance.token_weights import TokenWeights, to_batches, token_set, uniform_tokens
from tlq.importance.weighting import Weighting
from tlq.job import quantize_checkpoint
from tlq.models.streaming import StreamedModel
from tlq.parallel import joined_ranks
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import get_recipe
from tlq.runtime.resume import ResumeState
from tlq.samples import Batch

RESULT = "out"


def quantize(folder: Path, source: Path, batches: Sequence[Batch], recipe_name: str, scheme: str) -> None:
    """Score and calibrate ``source`` into ``folder``, on the ranks that the environment describes, or alone."""
    recipe, model = get_recipe(recipe_name), StreamedModel(source)
    where = os.environ.get("TLQ_TEST_STORE")
    store = None if where is None else dist.FileStore(where, int(os.environ["WORLD_SIZE"]))
    with joined_ranks(torch.device("cpu"), store) as ranks:
        pool = TokenPool.of(batches)

        def weigh() -> TokenWeights:
            if recipe.importance == "uniform":
                layers = enumerate(model.architecture.groups)
                return to_batches(uniform_tokens([(i, g.name) for i, groups in layers for g in groups], pool), batches)
            scores = score_resumably(model, batches, AnswerLoss(), ResumeState(folder / "scores"), ranks)
            return to_batches(token_set(scores, pool, "token", Weighting(), TokenBudget(300), 0), batches)

        job = CalibrationJob(recipe, WeightQuantizer(get_scheme(scheme), model.checkpoint_dtype), batches, ranks=ranks)
        quantize_checkpoint(model, folder / RESULT, job, weigh)


def start_ranks(
    count: int, folder: Path, source: Path, batches: Sequence[Batch], recipe: str, scheme: str
) -> list[Forked]:
    """Start ``quantize`` on ``count`` ranks, which meet in a file."""
    folder.mkdir(exist_ok=True)
    store = folder / "store"
    store.unlink(missing_ok=True)

    def rank(number: int) -> None:
        place = {"TORCHELASTIC_RUN_ID": "test", "RANK": str(number), "WORLD_SIZE": str(count)}
        os.environ.update(place, TLQ_TEST_STORE=str(store))
        quantize(folder, source, batches, recipe, scheme)

    started = [Forked(rank, number) for number in range(count)]
    for process in started:
        process.start()
    return started


def finish_ranks(started: Sequence[Forked], seconds: float = 300) -> None:
    """Wait for the ranks; the test fails if one of them does."""
    for process in started:
        process.join(seconds)
    assert [process.exitcode for process in started] == [0] * len(started)


def killed(started: Sequence[Forked]) -> None:
    """Send SIGKILL to all ranks and wait until they are gone."""
    for process in started:
        process.kill()
    for process in started:
        process.join()
