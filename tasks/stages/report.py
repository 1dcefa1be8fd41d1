"""Stage `report`: show the loss from quantization on a page, in pictures, and on a model card in every checkpoint.

Reads models/, evaluation/, data/prepared, data/importance, data/calibset, the full-precision model, and the questions
and pictures of local benchmark files. Writes report/:

- index.html: all results on one self-contained page;
- scores.txt, scores.csv and means.csv (for `dvc plots`): the scores;
- scores.png, sizes.png, errors-<variant>.png, exponents-<variant>.png, importance.png, shares.png, times.png: the
  pictures of the page;
- cards/<variant>.md: model cards, which are copied into the checkpoints as README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.compare import scores_table
from tasks.command import command_line
from tasks.config.params import section
from tasks.config.sections import (
    EvaluateParams,
    ModelParams,
    PrepareParams,
    RegisterParams,
    ReportParams,
    VariantParams,
)
from tasks.files import EVALUATION, MODELS, REPORT
from tasks.registry.lineage import read_lineage
from tasks.report.answers import read_changed_answers
from tasks.report.cards import CalibrationData, place_cards, read_base, render_card
from tasks.report.charts import (
    STYLE,
    Look,
    draw_all_scores,
    draw_exponents,
    draw_importance,
    draw_layer_errors,
    draw_shares,
    draw_sizes,
    draw_times,
)
from tasks.report.page import render_page
from tasks.report.results import Results, read_results
from tasks.report.tokens import SampleTokens, TokenData, read_token_data, show_samples
from tlq.models.processor import load_processor
from tlq.runtime.files import new_directory, write_text


def gather_scores(variants: list[str]) -> pd.DataFrame:
    """Scores of every variant: variant, benchmark, score, low, high."""
    return pd.concat([pd.read_csv(EVALUATION / name / "scores.csv") for name in variants], ignore_index=True)


def figures(results: Results, samples: list[SampleTokens], shares: pd.DataFrame) -> Iterator[tuple[str, Figure | None]]:
    """The page's charts by file name; None for a chart without data."""
    look = Look(results.recipes)
    yield "scores", draw_all_scores(results)
    yield "sizes", draw_sizes(results)
    for variant in results.variants:
        if variant.has_errors:
            yield f"errors-{variant.name}", draw_layer_errors(variant, look.color(variant.recipe.name))
        if variant.has_exponents:
            yield f"exponents-{variant.name}", draw_exponents(variant)
    yield "importance", draw_importance(samples)
    yield "shares", draw_shares(shares)
    yield "times", draw_times(results)


def write_scores(results: Results, variants: list[str], folder: Path) -> None:
    """Write the tables of scores, in the order of params.yaml."""
    scores = gather_scores(["full", *variants])
    metrics = sorted(results.metrics[1:], key=lambda each: variants.index(each.variant))
    write_text(scores.to_csv(index=False), folder / "scores.csv")
    write_text(scores[scores["benchmark"] == "mean"].to_csv(index=False), folder / "means.csv")
    write_text(scores_table([results.full, *metrics]) + "\n", folder / "scores.txt")


def write_pictures(results: Results, samples: list[SampleTokens], shares: pd.DataFrame, folder: Path) -> None:
    with mpl.rc_context(STYLE):
        for name, figure in figures(results, samples, shares):
            if figure is not None:
                figure.savefig(folder / f"{name}.png", dpi=160, metadata={"Software": None})


def write_cards(results: Results, data: TokenData, params: ReportParams, model: str, folder: Path) -> None:
    base = read_base(model, params.base_model)
    calibration = CalibrationData.of(section("prepare", PrepareParams), data)
    backend = section("evaluate", EvaluateParams).backend
    for variant in results.variants:
        text = render_card(variant, results, base, calibration, MODELS / variant.name, backend)
        write_text(text, folder / f"{variant.name}.md")


def main() -> None:
    params = section("report", ReportParams)
    model = section("model", ModelParams).path
    variants = section("variants", VariantParams)
    results = read_results(variants, Path(model))
    data = read_token_data()
    samples = show_samples(data, params.token_samples, load_processor(model).tokenizer)
    lineage = read_lineage(variants.names)
    bounds = section("register", RegisterParams)
    answers = read_changed_answers(
        variants.names, section("evaluate", EvaluateParams).benchmarks, params.changed_answers
    )
    page = render_page(results, samples, data.shares, lineage, params.base_model or model, bounds, answers)
    with new_directory(REPORT) as folder:
        write_scores(results, variants.names, folder)
        write_pictures(results, samples, data.shares, folder)
        write_text(page, folder / "index.html")
        write_cards(results, data, params, model, folder / "cards")
    place_cards()


if __name__ == "__main__":
    command_line(main, __doc__)
