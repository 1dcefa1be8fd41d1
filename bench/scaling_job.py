"""One calibration with importance for bench.scaling, on this process's share of the work; writes seconds by phase."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tasks.cluster.launch import meeting_place, on_ranks
from tasks.cluster.rank import RankCommand
from tasks.command import device, run
from tlq.calibration.job import CalibrationJob
from tlq.importance.gradients import score_resumably
from tlq.importance.losses import AnswerLoss
from tlq.importance.pool import PoolWeights, TokenPool
from tlq.importance.token_set import TokenBudget
from tlq.importance.token_weights import TokenWeights, to_batches, token_set
from tlq.importance.weighting import Weighting
from tlq.job import quantize_checkpoint
from tlq.models.batches import calibration_batches
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks, joined_ranks
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import get_recipe
from tlq.runtime.resume import ResumeState
from tlq.samples import Batch, Sample


def main() -> None:
    on_ranks(RankCommand("bench.scaling_job", tuple(sys.argv[1:])), calibrate)


def calibrate() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--samples", type=Path, required=True, help="pickled samples")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--measured", type=Path, required=True)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--tokens", type=int, required=True, help="tokens per layer")
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--device-memory", type=float, help="GiB of the GPU that this process may use")
    arguments = parser.parse_args()
    where = device()
    if where.type == "cuda" and arguments.device_memory:
        total = torch.cuda.get_device_properties(where).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, arguments.device_memory * 2**30 / total), where)
    samples: list[Sample] = pickle.loads(arguments.samples.read_bytes())
    model = StreamedModel(arguments.model, torch.bfloat16 if where.type == "cuda" else torch.float32, where)
    with joined_ranks(where, meeting_place()) as ranks:
        if where.type == "cpu":  # one core per rank: a single rank must not read ahead on another core
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[ranks.rank % len(cores)]})

        ranks.barrier()
        started = time.perf_counter()
        recipe, quantizer = get_recipe(arguments.recipe), WeightQuantizer(get_scheme("w3a16"), model.checkpoint_dtype)
        batches = calibration_batches(model, samples, arguments.batch_size, 10**6)

        def weigh() -> TokenWeights:
            with ranks.clock.phase("importance"):
                return to_batches(_weights(model, batches, arguments, ranks), batches)

        job = CalibrationJob(recipe, quantizer, batches, ranks=ranks)
        layers = quantize_checkpoint(model, arguments.out, job, weigh, arguments.tokens)
        if ranks.leads:
            seconds = time.perf_counter() - started
            device_name = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
            measured = {"seconds": seconds, "layers": layers, "device": device_name}
            arguments.measured.write_text(json.dumps(measured))


def _weights(
    model: StreamedModel, batches: Sequence[Batch], arguments: argparse.Namespace, ranks: Ranks
) -> PoolWeights:
    """Score tokens and select the token set, like the stages importance and calibset."""
    work = ResumeState(arguments.out.with_name("scores"))
    scores = score_resumably(model, batches, AnswerLoss(), work, ranks)
    ranks.barrier()
    if ranks.leads:
        work.remove()
    return token_set(scores, TokenPool.of(batches), "token", Weighting(), TokenBudget(arguments.tokens), 0)


if __name__ == "__main__":
    run(main)
