"""Stage `importance`: score the importance of every token of the calibration samples, by layer and linear group.

Reads data/prepared; writes data/importance (scores.parquet, sequences.parquet).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tasks.cluster.launch import meeting_place, ranks_wanted, shared_by_ranks
from tasks.command import command_line, device
from tasks.config.params import section
from tasks.config.sections import ImportanceParams, ModelParams
from tasks.files import IMPORTANCE, PREPARED, read_samples, write_importance
from tasks.planning import add_dry_run, show_plan, speed_of
from tlq.importance.gradients import score_resumably
from tlq.importance.losses import AnswerLoss, BlockLoss, Loss
from tlq.importance.pool import TokenPool
from tlq.importance.weighting import LossName
from tlq.models.architectures import input_widths
from tlq.models.batches import calibration_batches
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks, joined_ranks
from tlq.plan.duration import time_importance
from tlq.plan.needs import Plan, plan_importance, refuse_impossible
from tlq.plan.speed import Probe
from tlq.quantization.formats import get_scheme
from tlq.runtime.memory import processes_here
from tlq.runtime.resume import ResumeState


def main(dry_run: bool = False) -> None:
    if dry_run:
        job = ScoringJob()
        ranks = Ranks(size=ranks_wanted(), device=job.model.device)
        show_plan(job.timed_plan(ranks), IMPORTANCE, ranks)
    else:
        score()


class ScoringJob:
    """The model, the micro-batches and the losses to score."""

    def __init__(self) -> None:
        model_params = section("model", ModelParams)
        params = section("importance", ImportanceParams)
        self.params = params
        self.samples = read_samples(PREPARED / "calibration.parquet", params.samples)
        self.model = StreamedModel(model_params.path, model_params.torch_dtype, device())
        self.batches = calibration_batches(self.model, self.samples, params.batch_size, params.max_tokens)
        losses: dict[LossName, Loss] = {
            "answer": AnswerLoss(),
            "block": BlockLoss(get_scheme(params.block_scheme), self.model.checkpoint_dtype),
        }
        self.losses = {name: losses[name] for name in params.losses}
        self.states = {name: ResumeState(IMPORTANCE.with_name(f"importance-{name}")) for name in params.losses}

    def plan(self, ranks: Ranks) -> Plan:
        return plan_importance(self.model, self.batches, ranks, list(self.losses.values()))

    @property
    def probe(self) -> Probe:
        return Probe(self.samples, self.params.batch_size, self.params.max_tokens)

    def timed_plan(self, ranks: Ranks) -> Plan:
        """The plan with its seconds, if this machine can be measured."""
        plan, losses = self.plan(ranks), list(self.losses.values())
        speed = speed_of([plan], self.model, self.probe, ranks)
        if speed is None:
            return plan
        return time_importance(plan, self.model, self.batches, speed, ranks.size, losses)


@shared_by_ranks("tasks.stages.importance")
def score() -> None:
    """Score every sample on this process's share of the work; the leading rank writes the result."""
    job = ScoringJob()
    with joined_ranks(device(), meeting_place()) as ranks, ExitStack() as locks:
        there = sum(state.size() for state in job.states.values())
        refuse_impossible(job.plan(ranks), IMPORTANCE, ranks.device, processes_here(), there)
        if ranks.leads:
            for state in job.states.values():
                locks.enter_context(state.locked())
        scores = {
            name: score_resumably(job.model, job.batches, job.losses[name], state, ranks)
            for name, state in job.states.items()
        }
        if ranks.leads:
            widths = input_widths(job.model.skeleton, job.model.architecture)
            write_importance(scores, TokenPool.of(job.batches), Path(IMPORTANCE), widths)
            for state in job.states.values():
                state.remove()


if __name__ == "__main__":
    command_line(main, __doc__, add_dry_run)
