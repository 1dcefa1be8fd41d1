"""Stage `allocate`: distribute the size budget of every mix over the linear groups.

Reads data/prepared and data/importance. Writes data/allocation/<scheme>.json for every scheme of the variants: the
overrides of a mix (`mix3.5`), none for other schemes. data/allocation/losses.csv holds the size and the loss of every
group with every number of bits; it is empty without a mix, and then no model is read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from tasks.cluster.launch import meeting_place, ranks_wanted, shared_by_ranks
from tasks.command import command_line, device
from tasks.config.params import read, section
from tasks.config.sections import CalibrateParams, ExportParams, ModelParams, VariantParams
from tasks.files import ALLOCATION, IMPORTANCE, PREPARED, read_importance, read_pool, read_samples
from tasks.planning import add_dry_run, show_plan
from tlq.calibration.allocation import MEASURED, distributed, measure
from tlq.calibration.job import CalibrationJob
from tlq.export.engines import mixed_by
from tlq.models.batches import calibration_batches
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks, joined_ranks
from tlq.plan.needs import outside_bytes, plan_allocation
from tlq.quantization.allocation import Unit
from tlq.quantization.formats import Scheme, WeightQuantizer
from tlq.runtime.files import new_directory


def schemes() -> list[Scheme]:
    """The schemes of the variants; those with a budget are to be distributed."""
    params = section("calibrate", CalibrateParams)
    return [params.scheme(name) for name in section("variants", VariantParams).schemes]


def main(dry_run: bool = False) -> None:
    mixes = [scheme for scheme in schemes() if scheme.budget is not None]
    if dry_run and mixes:
        model, job = _opened(mixes[0])
        ranks = Ranks(size=ranks_wanted(), device=model.device)
        show_plan(plan_allocation(model, job), ALLOCATION, ranks)
    elif dry_run:
        sys.stdout.write("no scheme of the variants is a mix: nothing is computed\n")
    elif mixes:
        distribute()
    else:
        write(schemes(), [], ALLOCATION)


@shared_by_ranks("tasks.stages.allocate")
def distribute() -> None:
    """Measure the groups on this process's share of the samples; the leading rank writes the result."""
    chosen = schemes()
    mixes = [scheme for scheme in chosen if scheme.budget is not None]
    engine = (section("export", ExportParams) if "export" in read() else ExportParams()).engine
    model, job = _opened(mixes[0])
    with joined_ranks(device(), meeting_place()) as ranks:
        units = measure(model, replace(job, ranks=ranks), read_importance(IMPORTANCE), mixed_by(engine))
        if ranks.leads:
            outside = outside_bytes(model)
            found = [scheme if scheme.budget is None else distributed(scheme, units, outside) for scheme in chosen]
            write(found, units, ALLOCATION)


def _opened(scheme: Scheme) -> tuple[StreamedModel, CalibrationJob]:
    params, pool = section("model", ModelParams), read_pool(IMPORTANCE)
    samples = read_samples(PREPARED / "calibration.parquet", pool.samples)
    model = StreamedModel(params.path, params.torch_dtype, device())
    batch_size = section("calibrate", CalibrateParams).batch_size
    batches = calibration_batches(model, samples, batch_size, int(pool.lengths.max()))
    quantizer = WeightQuantizer(scheme, model.checkpoint_dtype)
    return model, CalibrationJob(MEASURED, quantizer, batches, ranks=Ranks(device=model.device))


def write(found: Sequence[Scheme], units: Sequence[Unit], folder: Path) -> None:
    """Write the overrides of every scheme, and what was measured."""
    columns = ("layer", "group", "weights", "scheme", "bytes", "loss")
    rows = [
        (unit.layer, unit.name, unit.weights, name, unit.sizes[name], unit.losses[name])
        for unit in units
        for name in unit.sizes
    ]
    with new_directory(folder) as temporary:
        pd.DataFrame(rows, columns=columns).to_csv(temporary / "losses.csv", index=False, float_format="%.9g")
        for scheme in found:
            overrides = dict(scheme.overrides) if units else {}
            (temporary / f"{scheme.name}.json").write_text(json.dumps({"overrides": overrides}, indent=1) + "\n")


if __name__ == "__main__":
    command_line(main, __doc__, add_dry_run)
