"""Stage `calibset`: choose the tokens whose error counts in calibration.

Reads data/importance. Writes data/calibset/tokens.parquet (layer, group, sample, position, token_id, is_image, weight),
summary.csv (per layer and group: tokens, effective tokens, image share), and recipes/<recipe>.json, which identifies
what a recipe calibrates with: `calibrate` depends on it alone, so that another token set makes no variant stale that
does not use it. A warning names every set with fewer effective tokens than calibset.weighting.least_effective.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tasks.command import command_line
from tasks.config.params import read_recipe, section
from tasks.config.sections import CalibsetParams
from tasks.files import CALIBSET, IMPORTANCE, PREPARED, read_importance, read_pool, read_widths, write_parquet
from tlq.importance.pool import GroupKey, Importance, TokenPool, WeightedTokens
from tlq.importance.token_set import effective_sample_size
from tlq.importance.token_weights import token_set
from tlq.importance.weighting import loss_of
from tlq.models.linear_groups import is_expert
from tlq.recipes import RECIPES, Recipe
from tlq.runtime.files import new_directory, write_text

logger = logging.getLogger("tlq.calibset")


def build(
    scores: Importance, pool: TokenPool, params: CalibsetParams, widths: Mapping[GroupKey, int] | None = None
) -> pd.DataFrame:
    """The token-level calibration set of every layer and group, one row per chosen token."""
    weights = token_set(scores, pool, params.source, params.weighting, params.budget, params.seed, widths)
    return pd.concat([_rows(*key, tokens, pool) for key, tokens in weights.groups.items()], ignore_index=True)


def _rows(layer: int, group: str, tokens: WeightedTokens, pool: TokenPool) -> pd.DataFrame:
    """The set of one layer and group, in order of sample and position."""
    sample, position = pool.positions(tokens.indices)
    columns = {
        "layer": np.int32(layer),
        "group": group,
        "sample": sample.astype(np.int32),
        "position": position.astype(np.int32),
        "token_id": pool.token_ids[tokens.indices],
        "is_image": pool.is_image[tokens.indices],
        "weight": tokens.weights,
    }
    return pd.DataFrame(columns)


def summarise(tokens: pd.DataFrame) -> pd.DataFrame:
    """Per layer and group: chosen tokens, (sum w)^2 / sum w^2, share of weight on image tokens."""
    rows = [
        {
            "layer": layer,
            "group": group,
            "tokens": len(part),
            "effective_tokens": round(effective_sample_size(part["weight"].to_numpy()), 1),
            "image_weight": round(float(part.loc[part["is_image"], "weight"].sum() / part["weight"].sum()), 4),
        }
        for (layer, group), part in tokens.groupby(["layer", "group"], sort=True)
    ]
    return pd.DataFrame(rows)


def warn_of_few(summary: pd.DataFrame, least_effective: int) -> None:
    """Log every set with fewer effective tokens than required; floors, caps and the source can cause this."""
    few = summary[(summary["effective_tokens"] < least_effective) & ~summary["group"].map(is_expert)]
    for row in few.to_dict("records"):  # experts get further tokens when they are calibrated
        logger.warning(
            "layer %d, group %s: %.1f effective tokens, fewer than calibset.weighting.least_effective %d; raise "
            "calibset.budget.tokens_per_layer (or per_width in its place) or importance.samples",
            row["layer"],
            row["group"],
            row["effective_tokens"],
            least_effective,
        )


def used_by(recipe: Recipe, params: CalibsetParams, digests: Mapping[str, str]) -> dict[str, Any]:
    """Digests of the files, and the parameters of this stage, that the result of ``recipe`` depends on.

    See ``tasks.stages.calibrate.weights_of``, which reads them.

    Args:
        digests: of the `samples`, the `pool`, its `scores`, and the `tokens` of the token-level calibration set.
    """
    if not recipe.needs_data():
        return {}
    used = {name: digests[name] for name in ("samples", "pool")}
    if recipe.tokens == "set":
        return {**used, "source": params.source, "tokens": digests["tokens"]}
    if recipe.importance == "uniform":
        return used
    return {**used, "scores": digests["scores"], "weighting": asdict(params.weighting)}


def digests_of(tokens: Path) -> dict[str, str]:
    """SHA-256 of every file that a recipe may calibrate with, see ``used_by``; ``tokens`` is the token set."""
    files = {
        "samples": PREPARED / "calibration.parquet",
        "pool": IMPORTANCE / "sequences.parquet",
        "scores": IMPORTANCE / "scores.parquet",
        "tokens": tokens,
    }
    digests = {}
    for name, path in files.items():
        with path.open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def main() -> None:
    params = section("calibset", CalibsetParams)
    scores = read_importance(IMPORTANCE, loss_of(params.source))
    tokens = build(scores, read_pool(IMPORTANCE), params, read_widths(IMPORTANCE))
    summary = summarise(tokens)
    warn_of_few(summary, params.weighting.least_effective)
    with new_directory(Path(CALIBSET)) as folder:
        write_parquet(tokens, folder / "tokens.parquet")
        write_text(summary.to_csv(index=False), folder / "summary.csv")
        digests = digests_of(folder / "tokens.parquet")
        for name in RECIPES:
            used = used_by(read_recipe(name), params, digests)
            write_text(json.dumps(used, indent=1) + "\n", folder / "recipes" / f"{name}.json")


if __name__ == "__main__":
    command_line(main, __doc__)
