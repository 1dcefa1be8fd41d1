"""What the whole pipeline will need on this machine: memory, disk and time of every long stage.

    python -m tasks.plan

Reads params.yaml, the model and data/prepared. Nothing is computed except a measurement of some seconds. The time of an
evaluation is known once full precision was evaluated: every variant answers the same questions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.compare import FULL
from benchmarks.results import EvaluationRun
from tasks.cluster.launch import ranks_wanted
from tasks.command import command_line
from tasks.config.params import recipe, section
from tasks.config.sections import CalibrateParams, CalibsetParams, VariantParams
from tasks.files import EVALUATION, IMPORTANCE, MODELS
from tasks.planning import speed_of
from tasks.stages.importance import ScoringJob
from tlq.calibration.job import CalibrationJob
from tlq.job import calibration_batches
from tlq.models.architectures import input_widths
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks
from tlq.plan.duration import time_calibration
from tlq.plan.needs import Plan, gib, plan_calibration, refuse_impossible
from tlq.plan.speed import Speed
from tlq.quantization.formats import WeightQuantizer
from tlq.recipes import Recipe
from tlq.runtime.clock import in_words
from tlq.samples import Sample

_RUN = EVALUATION / FULL / "run.json"
_COLUMNS = ("stage", "device", "host", "disk", "time")


@dataclass(frozen=True)
class StagePlan:
    """The plan of a stage that writes ``out``, as a row of the table; ``Plan.work`` is the name of the stage."""

    out: Path
    plan: Plan

    @property
    def seconds(self) -> float:
        return sum(self.plan.seconds.values())

    def cells(self) -> tuple[str, ...]:
        needs = (self.plan.device, self.plan.host, self.plan.disk)
        return (self.plan.work, *map(gib, needs), in_words(self.seconds))


def main() -> None:
    scoring = ScoringJob()
    model, samples = scoring.model, scoring.samples
    ranks = Ranks(size=ranks_wanted(), device=model.device)
    params = section("calibrate", CalibrateParams)
    speed = speed_of(model, samples, params.batch_size, scoring.params.max_tokens, ranks)
    stages = [
        StagePlan(IMPORTANCE, scoring.timed_plan(ranks, speed)),
        *_calibrations(model, samples, params, scoring.params.max_tokens, speed, ranks),
    ]
    sys.stdout.write("\n".join([*_table([_COLUMNS, *(stage.cells() for stage in stages)]), *_totals(stages), ""]))
    for stage in stages:
        refuse_impossible(stage.plan, stage.out, model.device, ranks.size)


def _calibrations(
    model: StreamedModel,
    samples: Sequence[Sample],
    params: CalibrateParams,
    longest: int,
    speed: Speed,
    ranks: Ranks,
) -> list[StagePlan]:
    """The calibration of every variant."""
    variants = section("variants", VariantParams)
    stages = []
    for row in (recipe(name) for name in variants.recipes):
        batches = calibration_batches(model, samples, row, params.batch_size, longest)
        for scheme in (params.scheme(name) for name in variants.schemes):
            job = CalibrationJob(row, WeightQuantizer(scheme, model.checkpoint_dtype), batches, ranks=ranks)
            plan = time_calibration(plan_calibration(model, job, _counted(model, row)), model, job, speed)
            name = f"{row.name}-{scheme.name}"
            stages.append(StagePlan(MODELS / name, replace(plan, work=f"calibrate {name}")))
    return stages


def _counted(model: StreamedModel, row: Recipe) -> int | None:
    """Maximum number of tokens whose error counts in a linear group; None means all tokens."""
    if row.tokens != "set":
        return None
    widest = max(input_widths(model.skeleton, model.architecture).values())
    return section("calibset", CalibsetParams).budget.of(widest).tokens_per_layer


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines of text, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _totals(stages: Sequence[StagePlan]) -> list[str]:
    """Lines about all stages together."""
    seconds = sum(stage.seconds for stage in stages)
    largest = max(stage.plan.device for stage in stages)
    disk = sum(stage.plan.disk for stage in stages)
    lines = [
        "",
        f"importance and calibration: about {in_words(seconds)}, one stage after the other; largest peak on the device "
        f"{gib(largest)}, disk {gib(disk)}",
    ]
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
