"""Draw the charts of the report. Each recipe has a colour and a marker; full precision is grey."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from tasks.report.results import Results, Variant, scheme_title, size_unit
from tasks.report.tokens import HEAT, SET_COLORS, SampleTokens, heat_norm, heat_picture, plain_picture, set_picture

#: Colours of a figure; `inline` replaces each by a colour of the page's light or dark scheme.
INK, MUTED, GRID, SURFACE = "#16181d", "#5b616e", "#dfe2e8", "#ffffff"
SERIES = ("#2a78d6", "#e0592a", "#128a62", "#b07a00", "#c7437f", "#6a4fd0", "#3f7d20")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
#: Colours of letters on coloured cells; they differ from the colours above, so that `inline` keeps them.
ON_DARK, ON_LIGHT = "#fefefe", "#0b1b33"
#: Exponents from 0 to 1.
RAMP = mpl.colors.LinearSegmentedColormap.from_list("exponent", ["#eef4fc", "#86b6ef", "#2a78d6", "#0d366b"])
#: Colours of linear groups.
GROUPS = ("#1f5fae", "#5a9be4", "#94c0f1", "#c9def8")
#: Width of a panel in inches; it fits a phone with readable letters.
PANEL = 4.1
_NUMBERED_LAYERS = 12

STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "ytick.minor.size": 0,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": SURFACE,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Look:
    """Colour and marker of every recipe, the same in all charts."""

    recipes: Sequence[str]

    def color(self, recipe: str) -> str:
        return SERIES[self.recipes.index(recipe) % len(SERIES)]

    def marker(self, recipe: str) -> str:
        return MARKERS[self.recipes.index(recipe) % len(MARKERS)]


def new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


# --- Scores -------------------------------------------------------------------------------------------------------


def draw_benchmark(axes: Axes, results: Results, benchmark: str, low: float) -> None:
    """Score of every variant on one benchmark (or `mean`) with its interval; full precision as a band."""
    look = Look(results.recipes)
    full = results.full.entry(benchmark)
    axes.axvspan(full.low, full.high, color=MUTED, alpha=0.18, linewidth=0)
    axes.axvline(full.score, color=MUTED, linewidth=1.2)
    for row, variant in enumerate(results.variants):
        entry, recipe = variant.metrics.entry(benchmark), variant.recipe.name
        axes.errorbar(
            entry.score,
            row,
            xerr=[[max(entry.score - entry.low, 0)], [max(entry.high - entry.score, 0)]],
            fmt=look.marker(recipe),
            color=look.color(recipe),
            markersize=7,
            elinewidth=2,
            capsize=0,
        )
    names = [variant.name for variant in results.variants]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(low, 100 + 0.03 * (100 - low))
    axes.grid(axis="y", visible=False)
    axes.set_title(benchmark)


def lowest_score(results: Results) -> float:
    """Start of the axis of scores: the multiple of ten below every interval."""
    lows = [entry.low for metrics in results.metrics for _, entry in metrics.entries]
    return max(0.0, 10 * np.floor(min(lows) / 10 - 0.01))


def score_panels(results: Results) -> list[Figure]:
    """A figure per benchmark, the mean first."""
    figures = []
    for name in ("mean", *results.benchmarks):
        figure = new_figure(PANEL, 0.32 * len(results.variants) + 0.75)
        draw_benchmark(figure.subplots(), results, name, lowest_score(results))
        figures.append(figure)
    return figures


def draw_all_scores(results: Results) -> Figure:
    names = ("mean", *results.benchmarks)
    figure = new_figure(2.9 * len(names) + 1, 0.34 * len(results.variants) + 1.2)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        draw_benchmark(axes, results, name, lowest_score(results))
    figure.supxlabel("score in percent with 95 % interval; grey: full precision", color=MUTED, fontsize=9.5)
    return figure


# --- Size ---------------------------------------------------------------------------------------------------------


def draw_sizes(results: Results) -> Figure:
    """Retention against the size of the weights; variants of equal size are drawn side by side."""
    figure = new_figure(PANEL, 3.4)
    axes = figure.subplots()
    unit, name = size_unit(results.full_bytes)
    look = Look(results.recipes)
    kept = [(variant, interval) for variant in results.variants if (interval := variant.mean.retention_interval)]
    variants = [variant for variant, _ in kept]
    for (variant, (retention, low, high)), offset in zip(kept, _side_by_side(variants), strict=True):
        recipe = variant.recipe.name
        spread = [[max(retention - low, 0)], [max(high - retention, 0)]]
        shift = mpl.transforms.ScaledTranslation(offset / 72, 0, figure.dpi_scale_trans)
        axes.errorbar(
            variant.weight_bytes / unit,
            retention,
            yerr=spread,
            fmt=look.marker(recipe),
            color=look.color(recipe),
            markersize=7,
            elinewidth=2,
            transform=axes.transData + shift,
            label=recipe if variant.scheme.name == _first_scheme(variants, recipe) else None,
        )
    axes.axhline(100, color=MUTED, linewidth=1.2)
    axes.plot(results.full_bytes / unit, 100, "*", color=MUTED, markersize=11, label="full precision")
    _name_sizes(axes, variants, unit)
    axes.set_xlim(0, 1.12 * results.full_bytes / unit)
    lows = [low for _, (_, low, _) in kept]
    axes.set_ylim(max(0.0, 5 * np.floor(min(lows, default=95) / 5) - 2), 102.5)
    axes.set_xlabel(f"weights on disk, {name}")
    axes.set_ylabel("retention, % of full precision")
    figure.legend(loc="outside lower center", ncols=4, handletextpad=0.3, columnspacing=1.2)
    return figure


def _side_by_side(variants: Sequence[Variant], step: float = 11.0) -> list[float]:
    """Horizontal offset of each variant in points; variants of equal size are spread evenly about it."""
    sizes = [scheme_title(variant.scheme) for variant in variants]
    offsets = []
    for index, size in enumerate(sizes):
        offsets.append(step * (sizes[:index].count(size) - (sizes.count(size) - 1) / 2))
    return offsets


def _first_scheme(variants: Sequence[Variant], recipe: str) -> str:
    return next(variant.scheme.name for variant in variants if variant.recipe.name == recipe)


def _name_sizes(axes: Axes, variants: Sequence[Variant], unit: float) -> None:
    """Write each scheme's name under its points."""
    for scheme in dict.fromkeys(scheme_title(variant.scheme) for variant in variants):
        size = next(variant.weight_bytes for variant in variants if scheme_title(variant.scheme) == scheme)
        at = mpl.transforms.blended_transform_factory(axes.transData, axes.transAxes)
        axes.text(size / unit, 0.02, scheme, transform=at, ha="center", fontsize=9, fontweight="bold")


# --- Calibration, by layer ----------------------------------------------------------------------------------------


def draw_layer_errors(variant: Variant, color: str) -> Figure:
    """Error of every group before and after calibration, by layer, on a logarithmic axis."""
    groups = list(dict.fromkeys(variant.groups["group"]))
    rows = -(-len(groups) // 2)
    figure = new_figure(PANEL, 1.55 * rows + 0.75)
    panels = figure.subplots(rows, 2, sharex=True, squeeze=False).ravel()
    for axes, group in zip(panels, groups, strict=False):
        part = variant.groups[variant.groups["group"] == group].sort_values("layer")
        axes.vlines(part["layer"], part["error_after"], part["error_before"], color=GRID, linewidth=2)
        axes.plot(part["layer"], part["error_before"], "o", color=MUTED, mfc=SURFACE, markersize=6.5, label="before")
        axes.plot(part["layer"], part["error_after"], "o", color=color, markersize=5, label="after")
        _log_axis(axes, part[["error_before", "error_after"]])
        _layer_axis(axes, part["layer"])
        axes.set_title(group)
    _finish_panels(panels, len(groups))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _log_axis(axes: Axes, values: pd.DataFrame) -> None:
    """Make the axis logarithmic if all values are positive, with few, plain labels."""
    if not (values.to_numpy() > 0).all():
        return
    axes.set_yscale("log")
    low, high = float(values.to_numpy().min()), float(values.to_numpy().max())
    axes.set_ylim(low / 1.6, high * 1.6)
    decades = np.log10(high / low) + 0.4
    subs = (1.0,) if decades > 2 else (1.0, 3.0) if decades > 1 else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _finish_panels(panels: NDArray[Any], used: int) -> None:
    """Label the axis below the last row of panels, and remove an unused panel."""
    for axes in panels[max(used - 2, 0) : used]:
        axes.set_xlabel("layer")
        axes.tick_params(labelbottom=True)
    for axes in panels[used:]:
        axes.set_axis_off()


def _layer_axis(axes: Axes, layers: pd.Series) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlim(layers.min() - 0.5, layers.max() + 0.5)


def draw_exponents(variant: Variant) -> Figure:
    """The chosen exponent of every layer and group; a dot marks exponents that also use the weights' magnitude."""
    groups = list(dict.fromkeys(variant.groups["group"]))
    layers = sorted(variant.groups["layer"].unique())
    table = variant.groups.pivot(index="group", columns="layer", values="alpha").loc[groups].to_numpy(float)
    duo = variant.groups.pivot(index="group", columns="layer", values="duo").loc[groups].to_numpy(bool)
    figure = new_figure(PANEL, 0.42 * len(groups) + 0.7)
    axes = figure.subplots()
    edges = np.arange(len(layers) + 1) - 0.5, np.arange(len(groups) + 1) - 0.5
    axes.pcolormesh(*edges, table, cmap=RAMP, vmin=0, vmax=1, edgecolor=SURFACE, linewidth=1.5)
    for row, column in np.ndindex(*table.shape):
        value = float(table[row, column])
        ink = ON_DARK if value > 0.45 else ON_LIGHT
        if len(layers) <= _NUMBERED_LAYERS:
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
        if duo[row, column]:
            at = (column + 0.4, row - 0.36) if len(layers) <= _NUMBERED_LAYERS else (column, row)
            axes.plot(*at, "o", color=ink, markersize=2.2)
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(min(len(layers), 12), integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _layer_name(layers, value)))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("layer")
    return figure


def _layer_name(layers: Sequence[int], position: float) -> str:
    return str(layers[int(position)]) if 0 <= position < len(layers) else ""


# --- Modality -----------------------------------------------------------------------------------------------------


def draw_shares(shares: pd.DataFrame) -> Figure:
    """Share of image tokens in importance and in the token-level set, in percent, by layer, one panel per group."""
    groups = list(dict.fromkeys(shares["group"]))
    rows = -(-len(groups) // 2)
    figure = new_figure(PANEL, 1.6 * rows + 0.85)
    panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, group in zip(panels, groups, strict=False):
        part = shares[shares["group"] == group].sort_values("layer")
        axes.plot(part["layer"], part["tokens"], "--", color=MUTED, linewidth=1.3, label="all tokens")
        axes.plot(part["layer"], part["importance"], "-o", color=SERIES[4], markersize=4.5, label="importance")
        axes.plot(part["layer"], part["chosen"], "-s", color=SERIES[5], markersize=4.5, label="token-level set")
        _layer_axis(axes, part["layer"])
        axes.set_ylim(0, 100)
        axes.set_title(group)
    _finish_panels(panels, len(groups))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, columnspacing=1.2)
    figure.supylabel("image tokens, %", color=MUTED, fontsize=9.5)
    return figure


# --- Time ---------------------------------------------------------------------------------------------------------


def draw_times(results: Results) -> Figure | None:
    """Seconds of calibration by variant, split into linear groups; None if no file recorded them."""
    timed = [variant for variant in results.variants if variant.groups["seconds"].notna().any()]
    if not timed:
        return None
    groups = list(dict.fromkeys(name for variant in timed for name in variant.groups["group"]))
    figure = new_figure(PANEL, 0.32 * len(timed) + 1.1)
    axes = figure.subplots()
    left = np.zeros(len(timed))
    for number, group in enumerate(groups):
        sums = [variant.groups.loc[variant.groups["group"] == group, "seconds"].sum() for variant in timed]
        axes.barh(
            range(len(timed)), sums, 0.62, left, label=group, color=GROUPS[number % len(GROUPS)], edgecolor=SURFACE
        )
        left += np.asarray(sums)
    axes.set_yticks(range(len(timed)), [variant.name for variant in timed])
    axes.set_ylim(len(timed) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    figure.legend(loc="outside lower center", ncols=4, columnspacing=1.2, handlelength=1)
    return figure


# --- Tokens -------------------------------------------------------------------------------------------------------


def draw_importance(samples: Sequence[SampleTokens]) -> Figure | None:
    """Pictures, their importance and the token-level set side by side; None if no sample has a grid of image tokens."""
    shown = [sample for sample in samples if sample.grid is not None]
    if not shown:
        return None
    norm = heat_norm(list(samples))
    figure = new_figure(11, 1.9 * len(shown) + 0.9)
    axes = figure.subplots(len(shown), 3, squeeze=False)
    for row, sample in zip(axes, shown, strict=True):
        pictures = (plain_picture(sample), heat_picture(sample, norm), set_picture(sample))
        for panel, picture in zip(row, pictures, strict=True):
            panel.imshow(picture)
            panel.set_axis_off()
        row[0].set_title(sample.id)
    for panel, title in zip(axes[0][1:], ("importance", "token-level set"), strict=True):
        panel.set_title(title)
    colors = mpl.cm.ScalarMappable(norm, HEAT)
    figure.colorbar(colors, ax=axes[:, 1].tolist(), location="bottom", label="importance, mean 1", aspect=40)
    share = mpl.cm.ScalarMappable(mpl.colors.PowerNorm(0.5, 0, 100), SET_COLORS)
    figure.colorbar(share, ax=axes[:, 2].tolist(), location="bottom", label="in % of the sets", aspect=40)
    return figure
