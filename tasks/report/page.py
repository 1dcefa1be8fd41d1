"""Render report/index.html: all results on one self-contained page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tasks.config.sections import Bounds
from tasks.registry.gate import Verdict, judge
from tasks.registry.lineage import Lineage
from tasks.report.answers import ChangedAnswer
from tasks.report.charts import (
    STYLE,
    Look,
    draw_exponents,
    draw_layer_errors,
    draw_shares,
    draw_sizes,
    draw_times,
    score_panels,
)
from tasks.report.inline import jpeg_uri, png_uri, svg
from tasks.report.results import Results, Variant, is_demo, scheme_title, scheme_words, size_unit
from tasks.report.tokens import (
    HEAT,
    SET_COLORS,
    SampleTokens,
    heat_norm,
    heat_picture,
    plain_picture,
    set_picture,
    text_colors,
)
from tlq.quantization.formats import Scheme

NOT_RECORDED = "not recorded"
_LONGEST = 800  # characters of a question or a reply on the page


def environment(escape: bool) -> Environment:
    """Templates of this package; an undefined name in a template is an error."""
    made = Environment(
        loader=PackageLoader("tasks.report"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        jpeg_uri=jpeg_uri,
        shortened=shortened,
        number=number_text,
        bytes=bytes_text,
        scheme_title=scheme_title,
        scheme_words=scheme_words,
    )
    made.tests["demo"] = is_demo
    return made


# --- Numbers as text ----------------------------------------------------------------------------------------------


def number_text(value: float | None, digits: int = 4) -> str:
    return "–" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def short(value: float | None) -> str:
    """Format with two significant digits and without an exponent: 0.0021, 4.1, 160."""
    if value is None or pd.isna(value):
        return "–"
    digits = 1 - math.floor(math.log10(abs(value))) if value else 0
    return f"{round(value, digits):.{max(digits, 0)}f}"


def bytes_text(size: float | None) -> str:
    if size is None or pd.isna(size):
        return NOT_RECORDED
    unit, name = size_unit(int(size))
    return f"{size / unit:.1f} {name}"


# --- Parts of the page --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Best:
    """The variant with the highest mean score at one scheme.

    ``rivals`` are the variants whose intervals of the mean score overlap with the best one's.
    """

    scheme: Scheme
    variant: Variant
    rivals: list[str]


def best_by_scheme(results: Results) -> list[Best]:
    entries = []
    for scheme in results.schemes:
        variants = [variant for variant in results.variants if variant.scheme.name == scheme]
        best = max(variants, key=lambda variant: variant.mean.score)
        rivals = [
            variant.recipe.name for variant in variants if variant is not best and variant.mean.high >= best.mean.low
        ]
        entries.append(Best(best.scheme, best, rivals))
    return entries


def bounds_in_words(bounds: Bounds) -> list[str]:
    """The bounds of the gate that are set: ``min_retention 95``, ``floors.demo_mmmu 80``, ..."""
    values = {name: getattr(bounds, name) for name in Bounds.model_fields}
    limits = {name: value for name, value in values.items() if name not in ("bound", "floors") and value is not None}
    limits |= {f"floors.{name}": value for name, value in bounds.floors.items()}
    return [f"{name} {value:g}" for name, value in limits.items()]


def shortened(text: str) -> str:
    """The text, or its two ends where it is long: a reply's thoughts are first, and its answer is last."""
    text = text.strip()
    cut = len(text) - _LONGEST
    return text if cut <= 0 else f"{text[: _LONGEST // 2]} [… {cut} characters …] {text[-_LONGEST // 2 :]}"


@dataclass(frozen=True)
class Timing:
    """Seconds by linear group, their sum, and the highest memory peak of a variant; None if not recorded."""

    variant: str
    groups: dict[str, float | None]
    total: float | None
    peak_bytes: float | None


def timing(variant: Variant) -> Timing:
    seconds = variant.groups.groupby("group", sort=False)["seconds"].sum(min_count=1)
    total = variant.groups["seconds"].sum(min_count=1)
    peak = variant.groups["peak_memory_bytes"].max()
    return Timing(
        variant.name,
        {str(group): _known(value) for group, value in seconds.items()},
        _known(total),
        _known(peak),
    )


def _known(value: Any) -> float | None:
    return None if pd.isna(value) else float(value)


@dataclass(frozen=True)
class LayerChart:
    """A chart of one variant and its caption."""

    variant: Variant
    chart: Markup
    note: str


def error_charts(results: Results) -> list[LayerChart]:
    look = Look(results.recipes)
    return [
        LayerChart(
            variant,
            svg(
                draw_layer_errors(variant, look.color(variant.recipe.name)),
                f"error-{variant.name}",
                f"Error of {variant.name} by layer and linear group, before and after calibration",
            ),
            f"{variant.error_unit}; median change {median_change(variant):+.0f} %".replace("-", "−"),
        )
        for variant in results.variants
        if variant.has_errors
    ]


def median_change(variant: Variant) -> float:
    """Median over layers and groups of the change of error, in percent."""
    measured = variant.groups[variant.groups["error_before"] > 0]
    return float(100 * (measured["error_after"] / measured["error_before"] - 1).median())


def exponent_charts(results: Results) -> list[LayerChart]:
    return [
        LayerChart(
            variant,
            svg(
                draw_exponents(variant),
                f"exponents-{variant.name}",
                f"Equalization exponents of {variant.name} by layer and linear group",
            ),
            "",
        )
        for variant in results.variants
        if variant.has_exponents
    ]


@dataclass(frozen=True)
class ShownToken:
    text: str
    background: str
    ink: str
    percent: int
    value: str
    special: bool


@dataclass(frozen=True)
class ShownSample:
    """A sample on the page; ``pictures`` is empty if its image tokens do not form one grid over one picture."""

    id: str
    source: str
    pictures: list[tuple[str, str]]
    image_tokens: int
    image_value: str
    image_chosen: str
    tokens: list[ShownToken]


def shown_samples(samples: Sequence[SampleTokens]) -> list[ShownSample]:
    norm = heat_norm(list(samples))
    return [_shown_sample(sample, norm) for sample in samples]


def _shown_sample(sample: SampleTokens, norm: mpl.colors.LogNorm) -> ShownSample:
    pictures = []
    if sample.grid is not None:
        pictures = [
            ("picture", png_uri(plain_picture(sample))),
            ("importance", png_uri(heat_picture(sample, norm))),
            ("token-level set", png_uri(set_picture(sample))),
        ]
    count = len(sample.image_values)
    colors = text_colors(sample.text_values, norm)
    tokens = [
        ShownToken(
            text=visible(text),
            background=background,
            ink=ink,
            percent=round(100 * share),
            value=short(value),
            special=text.startswith("<|") and text.endswith("|>"),
        )
        for text, (background, ink), value, share in zip(
            sample.texts, colors, sample.text_values, sample.text_share, strict=True
        )
    ]
    return ShownSample(
        id=sample.id,
        source=sample.source,
        pictures=pictures,
        image_tokens=count,
        image_value=short(sample.image_values.mean() if count else None),
        image_chosen=f"{100 * (sample.image_share > 0).mean():.0f} %" if count else "–",
        tokens=tokens,
    )


def visible(text: str) -> str:
    """Visible form of a token: white space as symbols, without the space before a word."""
    return text.replace("\n", "⏎").replace(" ", "␣") if not text.strip() else text.strip()


def color_scales(samples: Sequence[SampleTokens]) -> dict[str, str]:
    """The colour scales as CSS gradients, and the importance at both ends of its scale."""
    norm = heat_norm(list(samples))
    return {
        "heat": _stops(mpl.colormaps[HEAT]),
        "low": short(norm.vmin),
        "high": short(norm.vmax),
        "set": _stops(SET_COLORS),
    }


def _stops(colors: mpl.colors.Colormap) -> str:
    return ", ".join(mpl.colors.to_hex(colors(step / 8)) for step in range(9))


# --- The page -----------------------------------------------------------------------------------------------------


def render_page(
    results: Results,
    samples: Sequence[SampleTokens],
    shares: pd.DataFrame,
    lineage: Lineage,
    model: str,
    bounds: Bounds,
    answers: Mapping[str, Sequence[ChangedAnswer]],
) -> str:
    """The page as HTML.

    Args:
        samples, shares: results of ``tokens.show_samples`` and ``tokens.modality_shares``.
        model: path of the full-precision model in params.yaml.
        bounds: the bounds of the gate.
        answers: changed answers by variant, see ``answers.read_changed_answers``.
    """
    verdicts: dict[str, Verdict] = {each.name: judge(each.metrics, bounds) for each in results.variants}
    with mpl.rc_context(STYLE):
        times = draw_times(results)
        charts = {
            "scores": [
                svg(figure, f"score-{name}", f"Scores by variant: {name}")
                for name, figure in zip(("mean", *results.benchmarks), score_panels(results), strict=True)
            ],
            "sizes": svg(draw_sizes(results), "sizes", "Retention against size of the weights on disk"),
            "errors": error_charts(results),
            "exponents": exponent_charts(results),
            "shares": svg(draw_shares(shares), "shares", "Share of image tokens by layer and linear group"),
            "times": None if times is None else svg(times, "times", "Seconds of calibration by variant and group"),
        }
    usage = [
        ("full precision", results.full_bytes, results.full_run),
        *((each.name, each.weight_bytes, each.run) for each in results.variants),
    ]
    return (
        environment(escape=True)
        .get_template("page.html.j2")
        .render(
            results=results,
            model=model,
            best=best_by_scheme(results),
            verdicts=verdicts,
            bounds=bounds_in_words(bounds),
            bound=bounds.bound,
            answers=answers,
            usage=usage,
            streamed=any(run is not None and run.backend == "streamed" for *_, run in usage),
            charts=charts,
            samples=shown_samples(samples),
            scales=color_scales(samples),
            shares=shares.to_dict("records"),
            timings=[timing(variant) for variant in results.variants],
            lineage=lineage,
            not_recorded=NOT_RECORDED,
        )
    )
