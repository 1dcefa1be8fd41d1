"""Draw the pictures of docs/how-tlq-works.md from a pipeline run with the recipes tlq and tlq-c at W3A16.

    dvc exp run -S 'variants.recipes=[tlq,tlq-c]' -S 'variants.schemes=[w3a16]' calibrate
    python -m bench.docs_pictures

Reads data/prepared, data/importance, data/calibset and models; writes docs/how-*.png.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from tasks.config.params import section
from tasks.config.sections import ModelParams
from tasks.files import IMPORTANCE, MODELS, read_importance
from tasks.report.charts import GROUPS, INK, MUTED, SERIES, STYLE, draw_importance, new_figure
from tasks.report.tokens import read_token_data, show_samples
from tlq.importance.pool import Importance
from tlq.models.processor import load_processor

DOCS = Path("docs")
SCHEME = "w3a16"
RECIPES = ("tlq", "tlq-c")


def concentration(values: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the total importance that the most important tokens hold, for each share of tokens in ``points``."""
    ordered = np.sort(values)[::-1]
    held = np.concatenate([[0.0], np.cumsum(ordered) / ordered.sum()])
    return np.interp(points, np.linspace(0, 1, len(held)), held)


def draw_concentration(scores: Importance) -> Figure:
    """Cumulative share of importance over tokens, most important first, by linear group, mean over layers."""
    figure = new_figure(5.2, 3.4)
    axes = figure.subplots()
    points = np.geomspace(5e-4, 1, 300)
    for color, group in zip(GROUPS, dict.fromkeys(group for _, group in scores), strict=False):
        layers = [values.astype(np.float64) for (_, name), values in scores.items() if name == group]
        curve = np.mean([concentration(values, points) for values in layers], axis=0)
        axes.plot(100 * points, 100 * curve, color=color, linewidth=2, label=group)
    axes.plot(100 * points, 100 * points, color=MUTED, linestyle="--", linewidth=1, label="all alike")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("tokens, % (most important first)")
    axes.set_ylabel("importance that they hold, %")
    axes.set_ylim(0, 102)
    axes.legend()
    return figure


def read_errors(variant: str) -> pd.DataFrame:
    """Errors of a checkpoint with columns layer, group, error_before, error_after."""
    path = MODELS / variant / "calibration.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; run the commands in the docstring of this module first")
    return pd.DataFrame(json.loads(path.read_text())["groups"])


def draw_gains(errors: Mapping[str, pd.DataFrame]) -> Figure:
    """Remaining share of plain rounding's error, layer by layer, for each recipe; one panel per linear group."""
    groups: Sequence[str] = list(dict.fromkeys(next(iter(errors.values()))["group"]))
    figure = new_figure(9.6, 2.9)
    panels = figure.subplots(1, len(groups), sharey=True)
    for axes, group in zip(panels, groups, strict=True):
        for (recipe, frame), color in zip(errors.items(), SERIES, strict=False):
            part = frame[frame["group"] == group].sort_values("layer")
            remaining = 100 * part["error_after"] / part["error_before"]
            axes.plot(part["layer"], remaining, "o-", color=color, markersize=5, label=recipe)
        axes.axhline(100, color=MUTED, linewidth=1, linestyle="--")
        axes.set_title(group, color=INK)
        axes.set_xlabel("layer")
    panels[0].set_ylim(0, 108)
    panels[0].set_ylabel("error, % of plain rounding's")
    panels[0].legend()
    return figure


def main() -> None:
    tokenizer = load_processor(section("model", ModelParams).path).tokenizer
    data = read_token_data()
    with mpl.rc_context(STYLE):
        pictures = {
            "how-importance": draw_importance(show_samples(data, 3, tokenizer)),
            "how-concentration": draw_concentration(read_importance(IMPORTANCE)),
            "how-errors": draw_gains({recipe: read_errors(f"{recipe}-{SCHEME}") for recipe in RECIPES}),
        }
        for name, figure in pictures.items():
            if figure is not None:
                figure.savefig(DOCS / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
                sys.stdout.write(f"{DOCS / name}.png\n")


if __name__ == "__main__":
    main()
