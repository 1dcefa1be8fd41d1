"""Stage `calibrate`: quantize the decoder with one recipe and scheme, export the checkpoint.

Reads data/prepared, data/importance and data/calibset; writes models/<recipe>-<scheme>/, a Hugging Face checkpoint in
compressed-tensors form with its processor, and calibration.json in it: per layer and group the chosen exponent, errors
before and after, tokens and seconds.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from tasks.calibset import CalibsetParams
from tasks.cli import device, run
from tasks.files import (
    CALIBSET,
    IMPORTANCE,
    MODELS,
    PREPARED,
    new_directory,
    read_importance,
    read_samples,
    read_sequences,
    read_tokens,
)
from tasks.params import ModelParams, ParamsError, recipe, section
from tlq.architectures import architecture_of
from tlq.calibrate import Calibrated, TokenWeights, calibrate
from tlq.checkpoint import export_checkpoint, load_model, read_config, storage_dtype
from tlq.importance import token_weights
from tlq.processor import load_processor
from tlq.quantizer import Scheme, get_scheme
from tlq.recipes import Recipe
from tlq.samples import Batch, encode_batches, image_token_id, token_rows

logger = logging.getLogger("tlq.calibrate")


@dataclass(frozen=True)
class CalibrateParams:
    """Attributes:
    batch_size: samples per micro-batch.
    group_size: replaces the group size of schemes that have one.
    """

    batch_size: int = 16
    group_size: int | None = None


def batch_weights(batches: Sequence[Batch], per_sample: dict[int, NDArray[np.float32]]) -> list[torch.Tensor]:
    """Weights of one layer and group, laid out like the micro-batches; tokens without a weight get 0."""
    weights = [torch.zeros(batch.valid.shape) for batch in batches]
    position = {id(batch): number for number, batch in enumerate(batches)}
    for sample, row, batch in token_rows(batches):
        if sample in per_sample:
            target = weights[position[id(batch)]][row]
            target[batch.valid[row]] = torch.from_numpy(per_sample[sample])
    return weights


def weights_of(
    row: Recipe, calibset: CalibsetParams, batches: Sequence[Batch], importance: Path, tokens: Path
) -> TokenWeights:
    """The token weights that a recipe calibrates with: of all tokens, or of the token-level calibration set.

    Raises:
        ParamsError: the set was chosen by another importance than the recipe's.
    """
    if not row.needs_data:
        return {}
    sequences = read_sequences(importance)
    if row.tokens == "all":
        scores = read_importance(importance)
        return {
            key: batch_weights(
                batches,
                dict(enumerate(token_weights(raw, sequences.is_image, row.importance, calibset.weighting))),
            )
            for key, raw in scores.items()
        }
    if row.importance != calibset.source:
        raise ParamsError(
            f"params.yaml: recipe {row.name} weighs tokens by {row.importance} importance, the token set was chosen "
            f"by {calibset.source}; make recipes.{row.name}.importance and calibset.source equal"
        )
    pools: dict[tuple[int, str], dict[int, NDArray[np.float32]]] = {}
    for key, chosen in read_tokens(tokens).groupby(["layer", "group", "sample"]):
        layer, group, sample = cast(tuple[int, str, int], key)
        values = np.zeros(sequences.lengths[sample], np.float32)
        values[chosen["position"].to_numpy()] = chosen["weight"].to_numpy()
        pools.setdefault((layer, group), {})[sample] = values
    return {key: batch_weights(batches, per_sample) for key, per_sample in pools.items()}


def write_report(row: Recipe, scheme: Scheme, calibrated: Calibrated, folder: Path) -> None:
    report = {"recipe": asdict(row), "scheme": asdict(scheme), "groups": calibrated.report_rows()}
    (folder / "calibration.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--scheme", required=True)
    arguments = parser.parse_args()
    model_params = section("model", ModelParams)
    params = section("calibrate", CalibrateParams)
    row = recipe(arguments.recipe)
    scheme = get_scheme(arguments.scheme, params.group_size if "a16" in arguments.scheme else None)

    model = load_model(model_params.path, model_params.torch_dtype, device())
    architecture = architecture_of(model.config)
    batches: list[Batch] = []
    if row.needs_data:
        samples = read_samples(PREPARED / "calibration.parquet", len(read_sequences(IMPORTANCE).lengths))
        processor = load_processor(model_params.path)
        longest = max(read_sequences(IMPORTANCE).lengths)
        batches = encode_batches(samples, processor, image_token_id(model.config), params.batch_size, longest)
    weights = weights_of(row, section("calibset", CalibsetParams), batches, IMPORTANCE, CALIBSET / "tokens.parquet")
    storage = storage_dtype(read_config(model_params.path))
    calibrated = calibrate(model, architecture, batches, weights, row, scheme, storage)
    with new_directory(MODELS / f"{row.name}-{scheme.name}") as folder:
        export_checkpoint(model_params.path, model, calibrated.weights, scheme, folder)
        write_report(row, scheme, calibrated, folder)
    logger.info("%s-%s exported", row.name, scheme.name)


if __name__ == "__main__":
    run(main)
