"""What the whole pipeline will need on this machine: memory, disk and time of every long stage.

    python -m tasks.plan

Reads params.yaml, the model and data/prepared. Nothing is computed except a measurement of some seconds. The time of an
evaluation is known once full precision was evaluated: every variant answers the same questions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.compare import FULL
from benchmarks.results import EvaluationRun
from tasks.cluster.launch import ranks_wanted
from tasks.command import command_line
from tasks.config.params import read_recipe, section
from tasks.config.sections import CalibrateParams, CalibsetParams, VariantParams
from tasks.files import ALLOCATION, EVALUATION, IMPORTANCE, MODELS
from tasks.planning import speed_of
from tasks.stages.importance import ScoringJob
from tlq.calibration.allocation import MEASURED
from tlq.calibration.job import CalibrationJob
from tlq.models.batches import calibration_batches
from tlq.parallel import Ranks
from tlq.plan.duration import time_allocation, time_calibration, time_importance
from tlq.plan.needs import Plan, gib, most_counted, plan_allocation, plan_calibration, refuse_impossible
from tlq.plan.speed import Speed
from tlq.quantization.formats import Scheme, WeightQuantizer
from tlq.recipes import Recipe
from tlq.runtime.clock import in_words

_RUN = EVALUATION / FULL / "run.json"
_COLUMNS = ("stage", "device", "host", "disk", "time")


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage, as a row of the table; ``Plan.work`` is the name of the stage.

    Attributes:
        out: folder that the stage writes.
        add_time: returns the plan with its seconds on a machine of a measured ``speed``.
    """

    out: Path
    plan: Plan
    add_time: Callable[..., Plan]

    def timed(self, speed: Speed) -> StagePlan:
        return replace(self, plan=self.add_time(self.plan, speed=speed))

    @property
    def seconds(self) -> float:
        return sum(self.plan.seconds.values())

    def cells(self) -> tuple[str, ...]:
        needs = (self.plan.device, self.plan.host, self.plan.disk)
        return (self.plan.work, *map(gib, needs), in_words(self.seconds) if self.plan.seconds else "unknown")


def main() -> None:
    scoring = ScoringJob()
    model = scoring.model
    ranks = Ranks(size=ranks_wanted(), device=model.device)
    stages = _stages(scoring, ranks)
    probe = replace(scoring.probe, batch_size=section("calibrate", CalibrateParams).batch_size)
    speed = speed_of([stage.plan for stage in stages], model, probe, ranks)
    if speed is not None:
        stages = [stage.timed(speed) for stage in stages]
    sys.stdout.write("\n".join([*_table([_COLUMNS, *(stage.cells() for stage in stages)]), *_totals(stages), ""]))
    for stage in stages:
        refuse_impossible(stage.plan, stage.out, model.device, ranks.size)


def _stages(scoring: ScoringJob, ranks: Ranks) -> list[StagePlan]:
    """The long stages: importance, the distribution of budgets, the calibration of every variant."""
    model, params, variants = scoring.model, section("calibrate", CalibrateParams), section("variants", VariantParams)
    losses, budget = list(scoring.losses.values()), section("calibset", CalibsetParams).budget
    encoded = calibration_batches(model, scoring.samples, params.batch_size, scoring.params.max_tokens)

    def job_of(row: Recipe, scheme: Scheme) -> CalibrationJob:
        batches = encoded if row.needs_data(scheme) else []
        return CalibrationJob(row, WeightQuantizer(scheme, model.checkpoint_dtype), batches, ranks=ranks)

    importance = partial(time_importance, model=model, batches=scoring.batches, ranks=ranks.size, losses=losses)
    stages = [StagePlan(IMPORTANCE, scoring.plan(ranks), importance)]
    schemes = [params.scheme(name) for name in variants.schemes]
    if mixes := [scheme for scheme in schemes if scheme.budget is not None]:
        job = job_of(MEASURED, mixes[0])
        plan = replace(plan_allocation(model, job), work="allocate")
        stages.append(StagePlan(ALLOCATION, plan, partial(time_allocation, model=model, job=job)))
    for row, scheme in product((read_recipe(name) for name in variants.recipes), schemes):
        job, name = job_of(row, scheme), f"{row.name}-{scheme.name}"
        plan = replace(plan_calibration(model, job, most_counted(model, row, budget)), work=f"calibrate {name}")
        stages.append(StagePlan(MODELS / name, plan, partial(time_calibration, model=model, job=job)))
    return stages


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of text, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _totals(stages: Sequence[StagePlan]) -> list[str]:
    """Lines about all stages together."""
    seconds = sum(stage.seconds for stage in stages)
    largest = max(stage.plan.device for stage in stages)
    disk = sum(stage.plan.disk for stage in stages)
    lines = ["", f"largest peak on the device {gib(largest)}, disk {gib(disk)}"]
    if not seconds:
        return lines
    lines.append(f"importance and calibration: about {in_words(seconds)}, one stage after the other")
    if not _RUN.exists():
        return [*lines, "evaluations: their time is known when full precision has been evaluated (dvc repro baseline)"]
    run = EvaluationRun.load(_RUN)
    each, count = run.seconds, len(section("variants", VariantParams).names)
    return [
        *lines,
        f"evaluations: about {in_words(each)} each, as full precision took on {run.device}; {count} of them "
        f"{in_words(count * each)}",
        f"all together: about {in_words(seconds + count * each)}",
    ]


if __name__ == "__main__":
    command_line(main, __doc__)
