"""Stage `calibrate`: quantize the decoder with one recipe and scheme, and export the checkpoint.

Reads data/prepared, data/importance, data/calibset and data/allocation. Writes models/<recipe>-<scheme>/, a Hugging
Face checkpoint in compressed-tensors format with its processor. Its file calibration.json holds per layer and group the
chosen exponent, errors before and after, tokens and seconds.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from dataclasses import replace

from tasks.cluster.launch import meeting_place, ranks_wanted, shared_by_ranks
from tasks.command import command_line, device
from tasks.config.consistency import check_served
from tasks.config.params import ParamsError, read, read_recipe, section
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
from tlq.job import quantize_checkpoint
from tlq.models.batches import calibration_batches
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks, joined_ranks
from tlq.plan.duration import time_calibration
from tlq.plan.needs import Plan, plan_calibration
from tlq.plan.speed import Probe
from tlq.quantization.formats import SCHEMES, WeightQuantizer
from tlq.recipes import RECIPES, Recipe

logger = logging.getLogger("tlq.calibrate")


def weights_of(recipe: Recipe, calibset: CalibsetParams, pool: TokenPool) -> PoolWeights:
    """The token weights that a recipe calibrates with: of all tokens, or of the token-level calibration set.

    Raises:
        ParamsError: the set was chosen by another importance than the recipe uses.
    """
    if recipe.tokens == "all":
        scores = read_importance(IMPORTANCE, loss_of(recipe.importance))
        return all_tokens(scores, pool, recipe.importance, calibset.weighting)
    if recipe.importance != calibset.source:
        raise ParamsError(
            f"params.yaml: recipe {recipe.name} weighs tokens by {recipe.importance} importance, the token set was "
            f"chosen by {calibset.source}; make recipes.{recipe.name}.importance and calibset.source equal"
        )
    return read_token_weights(CALIBSET / "tokens.parquet", pool)


class VariantJob:
    """The model, the calibration job and the folder of one variant."""

    def __init__(self, recipe: str, scheme: str) -> None:
        model_params, params, content = section("model", ModelParams), section("calibrate", CalibrateParams), read()
        row = read_recipe(recipe)
        number_format = read_allocation(params.scheme(scheme), ALLOCATION)
        check_served(content, [scheme])
        self.model = StreamedModel(model_params.path, model_params.torch_dtype, device())
        job = CalibrationJob(row, WeightQuantizer(number_format, self.model.checkpoint_dtype))
        check_served(content, [scheme], self.model.architecture)
        self.out = MODELS / f"{job.recipe.name}-{job.scheme.name}"
        self.probe = Probe([], params.batch_size, 0, gradients=False)
        if job.needs_data:
            pool = read_pool(IMPORTANCE)
            longest = int(pool.lengths.max())
            samples = read_samples(PREPARED / "calibration.parquet", pool.samples)
            weights = weights_of(job.recipe, section("calibset", CalibsetParams), pool)
            batches = calibration_batches(self.model, samples, params.batch_size, longest)
            job = replace(job, batches=batches, weights=to_batches(weights, batches))
            self.probe = replace(self.probe, samples=samples, max_tokens=longest)
        self.job = job

    def timed_plan(self, ranks: Ranks) -> Plan:
        """The plan for one of ``ranks``, with its seconds if this machine can be measured."""
        job = replace(self.job, ranks=ranks)
        plan = plan_calibration(self.model, job)
        speed = speed_of([plan], self.model, self.probe, ranks)
        return plan if speed is None else time_calibration(plan, self.model, job, speed)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--recipe", required=True, help=f"quantization method: {', '.join(RECIPES)}")
    parser.add_argument("--scheme", required=True, help=f"number format: {', '.join(SCHEMES)}, or a mix: mix3.5")
    add_dry_run(parser)


def main(recipe: str, scheme: str, dry_run: bool = False) -> None:
    if dry_run:
        variant = VariantJob(recipe, scheme)
        ranks = Ranks(size=ranks_wanted(), device=variant.model.device)
        show_plan(variant.timed_plan(ranks), variant.out, ranks)
    else:
        quantize(recipe, scheme)


@shared_by_ranks("tasks.stages.calibrate")
def quantize(recipe: str, scheme: str) -> None:
    """Compute this process's share of one variant."""
    variant = VariantJob(recipe, scheme)
    with joined_ranks(device(), meeting_place()) as ranks:
        job = replace(variant.job, ranks=ranks)
        with tracked_calibration(variant.out, variant.model.folder, job) as on_layer:
            quantize_checkpoint(variant.model, variant.out, job, on_layer=on_layer)
    if ranks.leads:
        logger.info("%s exported", variant.out.name)


if __name__ == "__main__":
    command_line(main, __doc__, add_options)
