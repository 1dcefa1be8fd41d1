"""Stage `calibrate`: quantize the decoder with one recipe and scheme, export the checkpoint.

Reads data/prepared, data/importance and data/calibset; writes models/<recipe>-<scheme>/, a Hugging Face checkpoint in
compressed-tensors form with its processor, and calibration.json in it: per layer and group the chosen exponent, errors
before and after, tokens and seconds.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

from tasks.cluster.launch import on_ranks, ranks_wanted
from tasks.config.params import CalibrateParams, CalibsetParams, ModelParams, ParamsError, recipe, section
from tasks.registry.tracking import tracked_calibration
from tasks.stages.command import device, run
from tasks.stages.files import (
    CALIBSET,
    IMPORTANCE,
    MODELS,
    PREPARED,
    read_importance,
    read_pool,
    read_samples,
    read_token_weights,
)
from tasks.stages.planning import show_plan
from tlq.calibration.job import CalibrationJob
from tlq.importance.pool import PoolWeights, TokenPool
from tlq.importance.token_weights import all_tokens, to_batches
from tlq.importance.weighting import loss_of
from tlq.job import calibration_batches, quantize_checkpoint
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks, joined_ranks
from tlq.plan import plan_calibration
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import Recipe
from tlq.samples import Sample

logger = logging.getLogger("tlq.calibrate")


def weights_of(
    recipe: Recipe, calibset: CalibsetParams, pool: TokenPool, importance: Path, tokens: Path
) -> PoolWeights:
    """The token weights that a recipe calibrates with: of all tokens, or of the token-level calibration set.

    Raises:
        ParamsError: the set was chosen by another importance than the recipe's.
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


def main() -> None:
    arguments = _arguments()
    if arguments.dry_run:
        quantize()
    else:
        on_ranks("tasks.stages.calibrate", sys.argv[1:], quantize)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--scheme", required=True)
    parser.add_argument("--dry-run", action="store_true", help="print what the job will need, and do nothing")
    return parser.parse_args()


def quantize() -> None:
    """Make one variant on this process's share of the work."""
    arguments = _arguments()
    model_params = section("model", ModelParams)
    params = section("calibrate", CalibrateParams)
    row = recipe(arguments.recipe)
    scheme = get_scheme(arguments.scheme)
    if scheme.group_size is not None:
        scheme = get_scheme(arguments.scheme, params.group_size)
    scheme = replace(scheme, overrides=tuple(params.overrides.items()))
    samples: list[Sample] = []
    longest = 0
    weights = PoolWeights.empty()
    if row.needs_data:
        pool = read_pool(IMPORTANCE)
        samples, longest = read_samples(PREPARED / "calibration.parquet", pool.samples), int(pool.lengths.max())
        weights = weights_of(row, section("calibset", CalibsetParams), pool, IMPORTANCE, CALIBSET / "tokens.parquet")

    model = StreamedModel(model_params.path, model_params.torch_dtype, device())
    out = MODELS / f"{row.name}-{scheme.name}"
    batches = calibration_batches(model, samples, row, params.batch_size, longest)
    quantizer = WeightQuantizer(scheme, model.checkpoint_dtype)
    job = CalibrationJob(row, quantizer, batches, to_batches(weights, batches))
    if arguments.dry_run:
        ranks = Ranks(size=ranks_wanted(), device=model.device)
        show_plan(plan_calibration(model, replace(job, ranks=ranks)), out, ranks)
        return
    with (
        joined_ranks(device()) as ranks,
        tracked_calibration(out, model.folder, row, scheme, ranks.leads) as on_layer,
    ):
        quantize_checkpoint(model, out, replace(job, ranks=ranks), on_layer=on_layer)
    if ranks.leads:
        logger.info("%s-%s exported", row.name, scheme.name)


if __name__ == "__main__":
    run(main)
