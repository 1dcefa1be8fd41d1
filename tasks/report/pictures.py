"""Pictures of the report: scores by variant, and which tokens mattered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

_HEAT = "inferno"


@dataclass(frozen=True)
class TokenPicture:
    """One sample as the picture shows it.

    Attributes:
        title: what it is.
        image: the image, or None.
        image_values: importance of its image tokens, in reading order, 1 is the mean over all tokens.
        texts: text tokens as strings.
        text_values: their importance.
        chosen_image, chosen_texts: which tokens are in the token-level set of any layer.
    """

    title: str
    image: Image.Image | None
    image_values: NDArray[np.float32]
    texts: list[str]
    text_values: NDArray[np.float32]
    chosen_image: NDArray[np.bool_]
    chosen_texts: NDArray[np.bool_]


def grid_shape(tokens: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of an image's token grid: the factors of ``tokens`` closest to the image's aspect ratio."""
    factors = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    return min(factors, key=lambda shape: abs(np.log(shape[1] / shape[0]) - np.log(width / height)))


def draw_tokens(pictures: Sequence[TokenPicture]) -> Figure:
    """Importance of every token: as heat over the image, and as the colour behind each text token."""
    figure = Figure(figsize=(13, 2.6 * len(pictures) + 0.6), layout="constrained")
    axes = figure.subplots(len(pictures), 2, squeeze=False, width_ratios=(1, 1.3))
    for (left, right), picture in zip(axes, pictures, strict=True):
        values = np.concatenate([picture.image_values, picture.text_values])
        norm = mpl.colors.LogNorm(max(float(np.quantile(values, 0.02)), 1e-3), float(values.max()))
        _draw_image(left, picture, norm)
        _draw_text(right, picture, norm)
        figure.colorbar(mpl.cm.ScalarMappable(norm, _HEAT), ax=right, label="importance (mean 1)", shrink=0.9)
    figure.suptitle("Which tokens mattered: mean over layers and linear groups; outlined tokens are in the token set")
    return figure


def _draw_image(axes: Axes, picture: TokenPicture, norm: mpl.colors.Normalize) -> None:
    axes.set_title(picture.title, loc="left", fontsize=10)
    axes.set_axis_off()
    if picture.image is None or not len(picture.image_values):
        return
    width, height = picture.image.size
    rows, columns = grid_shape(len(picture.image_values), width, height)
    axes.imshow(picture.image, extent=(0, columns, rows, 0))
    heat = picture.image_values.reshape(rows, columns)
    axes.imshow(heat, cmap=_HEAT, norm=norm, alpha=0.45, extent=(0, columns, rows, 0))
    for index in np.flatnonzero(picture.chosen_image):
        corner = (index % columns + 0.04, index // columns + 0.04)
        axes.add_patch(mpl.patches.Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="white", linewidth=0.8))


def _draw_text(axes: Axes, picture: TokenPicture, norm: mpl.colors.Normalize) -> None:
    axes.set_axis_off()
    line_width, x, y = 58.0, 0.0, 0.0
    colors = mpl.colormaps[_HEAT]
    for text, value, chosen in zip(picture.texts, picture.text_values, picture.chosen_texts, strict=True):
        shown = text.replace("\n", "⏎").replace(" ", "␣") if not text.strip() else text.strip()
        width = len(shown) + 1.0
        if x + width > line_width:
            x, y = 0.0, y + 1.0
        color = colors(norm(max(value, norm.vmin or 1e-3)))
        dark = sum(color[:3]) < 1.3
        edge = "black" if chosen else "none"
        axes.add_patch(mpl.patches.Rectangle((x, y + 0.06), width - 0.15, 0.88, facecolor=color, edgecolor=edge))
        axes.text(
            x + width / 2 - 0.07,
            y + 0.5,
            shown,
            ha="center",
            va="center",
            fontsize=7.5,
            family="monospace",
            color="white" if dark else "black",
        )
        x += width
    axes.set_xlim(0, line_width)
    axes.set_ylim(max(y + 1.0, 4.0), 0)


def draw_scores(scores: pd.DataFrame) -> Figure:
    """Scores with confidence intervals: one panel per benchmark, one bar per variant.

    Args:
        scores: columns variant, benchmark, score, low, high (percent).
    """
    benchmarks = list(dict.fromkeys(scores["benchmark"]))
    variants = list(dict.fromkeys(scores["variant"]))
    colors = {name: ("0.35" if name == "full" else f"C{number}") for number, name in enumerate(variants)}
    figure = Figure(figsize=(2.6 * len(benchmarks) + 1, 0.34 * len(variants) + 1.6), layout="constrained")
    panels = figure.subplots(1, len(benchmarks), sharey=True, squeeze=False)[0]
    for axes, benchmark in zip(panels, benchmarks, strict=True):
        part = scores[scores["benchmark"] == benchmark].set_index("variant").reindex(variants)
        spread = np.abs(part[["low", "high"]].to_numpy().T - part["score"].to_numpy())
        axes.barh(variants, part["score"], xerr=spread, color=[colors[name] for name in variants], capsize=2)
        axes.set_title(benchmark, fontsize=10)
        axes.set_xlim(0, 100)
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.supxlabel("score, % (95% interval)", fontsize=9)
    return figure
