"""Stage `calibrate`: quantize the decoder with one recipe and scheme, and export the checkpoint.

Reads data/prepared, data/importance, data/calibset and data/allocation. Writes models/<recipe>-<scheme>/, a Hugging
Face checkpoint in compressed-tensors format with its processor. Its file calibration.json holds per layer and group the
chosen exponent, errors before and after, tokens and seconds.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

from tasks.cluster.launch import meeting_place, on_ranks, ranks_wanted
from tasks.command import command_line, device
from tasks.config.consistency import check_served
from tasks.config.params import ParamsError, read, recipe, section
from tasks.config.sections import CalibrateParams, CalibsetParams, ModelParams
from tasks.files import (
    ALLOCATION,
    CALIBSET,
    IMPORTANCE,
    MODELS,
    PREPARED,
    read_allocation,
    read_importance,
    read_pool,
    read_samples,
    read_token_weights,
)
from tasks.planning import add_dry_run, show_plan, speed_of
from tasks.registry.tracking import tracked_calibration
from tlq.calibration.job import CalibrationJob
from tlq.importance.pool import PoolWeights, TokenPool
from tlq.importance.token_weights import all_tokens, to_batches
from tlq.importance.weighting import loss_of
from tlq.job import calibration_batches, quantize_checkpoint
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks, joined_ranks
from tlq.plan.duration import time_calibration
from tlq.plan.needs import plan_calibration
from tlq.plan.speed import Probe
from tlq.quantization.formats import SCHEMES, WeightQuantizer
from tlq.recipes import RECIPES, Recipe
from tlq.samples import Sample

logger = logging.getLogger("tlq.calibrate")


def weights_of(
    recipe: Recipe, calibset: CalibsetParams, pool: TokenPool, importance: Path, tokens: Path
) -> PoolWeights:
    """The token weights that a recipe calibrates with: of all tokens, or of the token-level calibration set.

    Raises:
        ParamsError: the set was chosen by another importance than the recipe uses.
    """
    if recipe.tokens == "all":
        scores = read_importance(importance, loss_of(recipe.importance))
        return all_tokens(scores, pool, recipe.importance, calibset.weighting)
    if recipe.importance != calibset.source:
        raise ParamsError(
            f"params.yaml: recipe {recipe.name} weighs tokens by {recipe.importance} importance, the token set was "
            f"chosen by {calibset.source}; make recipes.{recipe.name}.importance and calibset.source equal"
        )
    return read_token_weights(tokens, pool)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, help=f"quantization method: {', '.join(RECIPES)}")
    parser.add_argument("--scheme", required=True, help=f"number format: {', '.join(SCHEMES)}, or a mix: mix3.5")
    add_dry_run(parser)


def main(recipe: str, scheme: str, dry_run: bool = False) -> None:
    if dry_run:
        quantize(recipe, scheme, dry_run)
    else:
        words = ["--recipe", recipe, "--scheme", scheme]
        on_ranks("tasks.stages.calibrate", words, lambda: quantize(recipe, scheme))


def quantize(recipe_name: str, scheme_name: str, dry_run: bool = False) -> None:
    """Compute this process's share of one variant, or only print the plan."""
    model_params = section("model", ModelParams)
    params = section("calibrate", CalibrateParams)
    row = recipe(recipe_name)
    scheme = read_allocation(params.scheme(scheme_name), ALLOCATION)
    check_served(read(), [scheme_name])
    samples: list[Sample] = []
    longest = 0
    weights = PoolWeights.empty()
    if row.needs_data(scheme):
        pool = read_pool(IMPORTANCE)
        samples, longest = read_samples(PREPARED / "calibration.parquet", pool.samples), int(pool.lengths.max())
        weights = weights_of(row, section("calibset", CalibsetParams), pool, IMPORTANCE, CALIBSET / "tokens.parquet")

    model = StreamedModel(model_params.path, model_params.torch_dtype, device())
    check_served(read(), [scheme_name], model.architecture.experts is not None, model.architecture.joined)
    out = MODELS / f"{row.name}-{scheme.name}"
    batches = calibration_batches(model, samples, row, params.batch_size, longest, scheme)
    quantizer = WeightQuantizer(scheme, model.checkpoint_dtype)
    job = CalibrationJob(row, quantizer, batches, to_batches(weights, batches))
    if dry_run:
        ranks = Ranks(size=ranks_wanted(), device=model.device)
        job = replace(job, ranks=ranks)
        plan = plan_calibration(model, job)
        speed = speed_of([plan], model, Probe(samples, params.batch_size, longest, gradients=False), ranks)
        show_plan(plan if speed is None else time_calibration(plan, model, job, speed), out, ranks)
        return
    with (
        joined_ranks(device(), meeting_place()) as ranks,
        tracked_calibration(out, model.folder, row, scheme, ranks.leads) as on_layer,
    ):
        quantize_checkpoint(model, out, replace(job, ranks=ranks), on_layer=on_layer)
    if ranks.leads:
        logger.info("%s-%s exported", row.name, scheme.name)


if __name__ == "__main__":
    command_line(main, __doc__, add_options)
