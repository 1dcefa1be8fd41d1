"""The report: its tables and pictures, its inputs, and its text for values that were not recorded."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.disks import full_disk
from support.report_results import VARIANTS, metrics, write_metrics

from tasks.config.sections import Bounds, VariantParams
from tasks.files import VariantName
from tasks.registry.lineage import Lineage, locked_outputs
from tasks.report import charts, page
from tasks.report.answers import ChangedAnswer
from tasks.report.inline import VARIABLES, svg
from tasks.report.results import Results, Variant, read_results, weight_bytes
from tasks.report.tokens import (
    SampleTokens,
    grid_shape,
    modality_shares,
    relative_importance,
    set_picture,
    set_share,
    spread,
)
from tasks.stages import report
from tlq.importance.pool import TokenPool
from tlq.quantization.formats import get_scheme
from tlq.recipes import get_recipe
from tlq.samples import Sample


class Resources(HTMLParser):
    """The references and ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.references += [values[name] or "" for name in ("src", "href", "xlink:href") if name in values]
        self.references += re.findall(r"url\((.*?)\)", values.get("style") or "")
        self.references += re.findall(r"url\((.*?)\)", values.get("clip-path") or "")
        if values.get("id"):
            self.ids.append(str(values["id"]))


def read(folder: Path, patch: pytest.MonkeyPatch) -> Results:
    patch.chdir(folder)
    return read_results(VariantParams(recipes=("rtn", "tlq"), schemes=("w4a8",)), Path("models/rtn-w4a8"))


@pytest.fixture
def copy(reported: Path, tmp_path: Path) -> Path:
    """A copy of the reported project that a test may change."""
    return Path(shutil.copytree(reported, tmp_path / "copy"))


# --- The stage ----------------------------------------------------------------------------------------------------


def test_the_page_is_self_contained(reported: Path) -> None:
    text = (reported / "report/index.html").read_text()
    found = Resources(text)
    assert not {"script", "iframe", "object"} & set(found.tags)
    assert found.references
    outside = [each for each in found.references if not each.startswith(("data:", "#"))]
    assert outside == []
    inside = {each.removeprefix("#") for each in found.references if each.startswith("#")}
    assert inside <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert "@import" not in text


def test_the_page_has_the_scores_and_where_they_come_from(reported: Path) -> None:
    text = (reported / "report/index.html").read_text()
    for expected in ("80.0 ± 4.0", "93.5 ± 4.0", "0.0215", "token_samples: 2", "rtn-w4a8: no error measured"):
        assert expected in text
    assert text.count('class="sample"') == 2


def test_demo_scores_are_called_demo(reported: Path) -> None:
    text = " ".join((reported / "report/index.html").read_text().split())
    assert "<strong>Demo benchmarks.</strong> demo_textvqa, demo_mmmu are" in text


def test_real_benchmarks_are_not_called_demo(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_metrics(copy, ("textvqa_vlm",))
    results = read(copy, monkeypatch)
    assert "demo benchmark" not in _page(results).lower()


def test_pictures_and_tables_are_written(reported: Path) -> None:
    names = {path.name for path in (reported / "report").iterdir()}
    tables = {"index.html", "cards", "scores.txt", "scores.csv", "means.csv"}
    shared = {"scores", "sizes", "importance", "shares", "times"}
    own = {"errors-tlq-w4a8", "exponents-tlq-w4a8"}
    assert names == tables | {f"{name}.png" for name in shared | own}
    assert (reported / "report/scores.txt").read_text().splitlines()[2].startswith("full ")


def test_the_same_inputs_give_the_same_page(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = read(reported, monkeypatch)
    assert _page(results) == _page(results)


def test_a_full_disk_keeps_the_old_report_and_the_same_command_continues(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copy)
    before = {path: path.read_bytes() for path in (copy / "report").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("tasks.stages.report.write_cards", full_disk)
        with pytest.raises(OSError, match="^report: cannot be written .* the same command again$"):
            report.main()
    assert {path: path.read_bytes() for path in (copy / "report").rglob("*") if path.is_file()} == before
    assert [path.name for path in copy.iterdir() if "report" in path.name] == ["report"]
    shutil.rmtree(copy / "report")
    report.main()
    assert {path.relative_to(copy) for path in before} == {
        path.relative_to(copy) for path in (copy / "report").rglob("*") if path.is_file()
    }


def _page(results: Results, bounds: Bounds = Bounds()) -> str:  # noqa: B008  frozen
    sample = SampleTokens(
        id="one",
        source="",
        image=Image.new("RGB", (64, 32), "white"),
        image_values=np.linspace(0.1, 3, 8),
        image_share=np.linspace(0, 1, 8),
        texts=["what", "\n", "<b>"],
        text_values=np.array([1.0, 0.2, 5.0]),
        text_share=np.array([1.0, 0.0, 0.5]),
    )
    shares = pd.DataFrame({"layer": [0], "group": ["qkv"], "tokens": [50.0], "importance": [20.0], "chosen": [np.nan]})
    answer = ChangedAnswer("demo_mmmu", "1", "lost", "<i>why</i>?", "A", "A", "B" * 2000, [Image.new("RGB", (8, 8))])
    answers = {"tlq-w4a8": [answer]}
    lineage = Lineage(None, [], {}, [], "model: {}")
    return page.render_page(results, [sample], shares, lineage, "some/model", bounds, answers)


def test_tokens_are_escaped(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = _page(read(reported, monkeypatch))
    assert "&lt;b&gt;</span>" in text
    assert "<b>" not in text


def test_questions_and_replies_are_escaped_and_long_ones_shortened(
    reported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _page(read(reported, monkeypatch))
    assert "&lt;i&gt;why&lt;/i&gt;?" in text
    assert f"{'B' * 400} [… 1200 characters …] {'B' * 400}" in text
    assert "B" * 401 not in text


# --- Gate, date, speed --------------------------------------------------------------------------------------------


def cells(text: str, label: str) -> list[str]:
    """The cells of a column of the tables that a phone shows as blocks, without marks."""
    found = re.findall(rf'<td[^>]*data-label="{label}">(.*?)</td>', text)
    return [re.sub(r"<.*?>", " ", cell).strip() for cell in found]


def test_the_page_shows_the_result_of_the_gate_with_reasons(reported: Path) -> None:
    text = (reported / "report/index.html").read_text()
    assert cells(text, "gate") == ["–", "fails", "passes"]
    gate = " ".join(re.sub(r"<.*?>", " ", text[text.index('id="gate"') : text.index('id="answers"')]).split())
    assert "min_retention 90 , floors.demo_mmmu 85" in gate
    assert "rtn-w4a8 fails mean retention: 81.6327 %, register.min_retention needs at least 90 %" in gate
    assert "demo_mmmu score: 80 %, register.floors.demo_mmmu needs at least 85 %" in gate
    assert "tlq-w4a8 passes" in gate


def test_a_gate_without_bounds_is_said_to_have_none(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = _page(read(reported, monkeypatch), Bounds(min_items=None, bound="low"))
    assert "sets no bounds, so every variant passes" in text
    assert cells(text, "gate") == ["–", "passes", "passes"]


def test_low_ends_are_named_where_the_gate_bounds_them(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = _page(read(reported, monkeypatch), Bounds(min_retention=90, min_items=None, bound="low"))
    assert "They bound the low ends of the intervals" in text
    assert cells(text, "gate") == ["–", "fails", "fails"]  # the low end of tlq-w4a8 is 88.5


def test_the_date_is_that_of_the_newest_evaluation(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Date of the newest evaluation: 2026-11-27 06:24 UTC." in (reported / "report/index.html").read_text()
    assert read(reported, monkeypatch).evaluated == "2026-11-27 06:24 UTC"


def test_evaluations_of_older_versions_have_no_date_and_no_speed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in copy.glob("evaluation/*/run.json"):
        path.unlink()
    text = _page(read(copy, monkeypatch))
    assert f"Date of the newest evaluation: {page.NOT_RECORDED}." in text
    assert cells(text, "items per second") == [page.NOT_RECORDED] * 3


def test_speed_and_memory_in_use_name_their_device(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (reported / "report/index.html").read_text()
    assert cells(text, "items per second") == ["3.00", "2.40", "–"]
    assert cells(text, "peak memory") == ["3.0 GB", "2.0 GB", page.NOT_RECORDED]
    assert cells(text, "device, backend") == ["NVIDIA H100, hf", "NVIDIA H100, hf", "CPU, vllm"]
    results = read(reported, monkeypatch)
    sizes = [page.bytes_text(variant.weight_bytes) for variant in results.variants]
    assert cells(text, "weights on disk")[1:] == sizes


def test_kl_has_its_interval_by_benchmark_and_for_the_mean(reported: Path) -> None:
    text = (reported / "report/index.html").read_text()
    assert cells(text, "KL") == ["0.0000", *["0.1000  0.0712 to 0.1345"] * 2]
    for label in ("demo_textvqa", "demo_mmmu", "mean"):
        assert cells(text, label)[-2:] == ["0.1000  0.0712 to 0.1345"] * 2  # the table of KL is after that of scores


# --- What was not recorded ----------------------------------------------------------------------------------------


def change_groups(folder: Path, change: Any) -> None:
    for name in VARIANTS:
        path = folder / "models" / name / "calibration.json"
        content = json.loads(path.read_text())
        for row in content["groups"]:
            change(row)
        path.write_text(json.dumps(content))


def test_missing_times_are_shown_as_not_recorded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_groups(copy, lambda row: row.pop("seconds"))
    results = read(copy, monkeypatch)
    assert charts.draw_times(results) is None
    assert [page.timing(variant).total for variant in results.variants] == [None, None]
    text = _page(results)
    assert 'id="times-' not in text
    assert text.count(f"<td>{page.NOT_RECORDED}</td>") >= 4  # seconds and memory of both variants


def test_peak_memory_is_shown_where_it_is_recorded(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_groups(copy, lambda row: row.update(peak_memory_bytes=(row["layer"] + 1) * 1_500_000_000))
    results = read(copy, monkeypatch)
    assert "<td>3.0 GB</td>" in _page(results)


def test_a_missing_column_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_groups(copy, lambda row: row.pop("error_after"))
    with pytest.raises(ValueError, match=r"models/rtn-w4a8/calibration\.json: its groups have no error_after"):
        read(copy, monkeypatch)


def test_a_stage_that_has_not_run_is_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "evaluation/tlq-w4a8/metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="run `dvc repro evaluate@tlq-w4a8` first"):
        read(copy, monkeypatch)


def test_only_weights_count_as_size(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"x" * 70)
    (tmp_path / "b.safetensors").write_bytes(b"x" * 30)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 1000)
    assert weight_bytes(tmp_path) == 100
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors or \*\.bin"):
        weight_bytes(tmp_path / "elsewhere")


def test_hashes_of_other_variants_and_of_the_report_are_left_out(tmp_path: Path) -> None:
    out = {"path": "x", "md5": "1", "size": 5}
    stages = {name: {"outs": [out]} for name in ("prepare", "calibrate@a-b", "calibrate@c-d", "register", "report")}
    lock = tmp_path / "dvc.lock"
    lock.write_text(json.dumps({"stages": stages}))
    assert [each.stage for each in locked_outputs(["a-b"], lock)] == ["prepare", "calibrate@a-b"]
    assert locked_outputs(["a-b"], tmp_path / "none") == []


# --- Scores -------------------------------------------------------------------------------------------------------


def made(name: str, score: float) -> Variant:
    recipe, scheme = VariantName.parse(name)
    return Variant(name, get_recipe(recipe), get_scheme(scheme), metrics(name, score), pd.DataFrame(), 10)


def test_variants_with_overlapping_intervals_are_rivals_of_the_best() -> None:
    variants = [made("rtn-w3a16", 70), made("mbq-w3a16", 86), made("tlq-w3a16", 90), made("rtn-w4a8", 95)]
    best = page.best_by_scheme(Results(metrics("full", 98), 20, variants))
    assert [(entry.variant.name, entry.rivals) for entry in best] == [("tlq-w3a16", ["mbq"]), ("rtn-w4a8", [])]


def test_variants_of_one_scheme_are_next_to_each_other(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reported)
    monkeypatch.setattr("tasks.report.results.read_variant", lambda name: made(name, 90))
    found = read_results(VariantParams(recipes=("rtn", "tlq"), schemes=("w4a8", "w3a16")), Path("models/rtn-w4a8"))
    assert [each.name for each in found.variants] == ["rtn-w4a8", "tlq-w4a8", "rtn-w3a16", "tlq-w3a16"]


def test_score_chart_shows_every_variant_with_its_interval() -> None:
    results = Results(metrics("full", 98), 20, [made("rtn-w3a16", 70), made("tlq-w3a16", 90)])
    for panel in charts.draw_all_scores(results).axes:
        intervals = [segment[:, 0].tolist() for bar in panel.containers for segment in bar.lines[2][0].get_segments()]
        assert intervals == [[66, 74], [86, 94]]


@pytest.mark.parametrize(
    ("value", "text"), [(0.00213, "0.0021"), (4.12, "4.1"), (161.4, "160"), (0.0, "0"), (None, "–"), (9.96, "10")]
)
def test_numbers_are_short_and_without_exponent(value: float | None, text: str) -> None:
    assert page.short(value).removesuffix(".0") == text


# --- Charts on the page -------------------------------------------------------------------------------------------


def test_a_chart_follows_the_colours_of_the_page() -> None:
    with mpl.rc_context(charts.STYLE):
        figure = charts.new_figure(2, 2)
        axes = figure.subplots()
        axes.plot([1, 2], color=charts.SERIES[0])
        axes.set_title("a < b")
        text = str(svg(figure, "one", 'what "it" shows'))
    assert not [color for color in VARIABLES if color in text]
    assert {"var(--series-1)", "var(--ink)", "var(--grid)"} <= set(re.findall(r"var\(.*?\)", text))
    assert 'aria-label="what &#34;it&#34; shows"' in text
    assert "a &lt; b" in text
    identifiers = re.findall(r'id="(.*?)"', text)
    assert identifiers
    assert all(each.startswith("one-") for each in identifiers)
    assert {each.removeprefix("#") for each in re.findall(r'url\((#.*?)\)|href="(#.*?)"', text)[0] if each} <= set(
        identifiers
    )


def test_exponents_are_numbered_and_marked(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = read(reported, monkeypatch).variants[1]
    (axes,) = charts.draw_exponents(variant).axes
    assert [text.get_text() for text in axes.texts] == [
        f"{alpha:.2f}"
        for _, part in variant.groups.groupby("group", sort=False)
        for alpha in part.sort_values("layer")["alpha"]
    ]
    assert len(axes.lines) == variant.groups["duo"].sum() > 0


def test_errors_before_and_after_are_drawn_by_layer(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = read(reported, monkeypatch).variants[1]
    axes = charts.draw_layer_errors(variant, "#000000").axes
    for panel in axes:
        part = variant.groups[variant.groups["group"] == panel.get_title()]
        before, after = panel.lines
        assert list(before.get_ydata()) == list(part["error_before"])
        assert list(after.get_ydata()) == list(part["error_after"])
    assert page.median_change(variant) < 0


# --- Tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "width", "height", "shape"),
    [(50, 160, 80, (5, 10)), (32, 128, 64, (4, 8)), (12, 30, 40, (4, 3)), (7, 100, 100, (1, 7))],
)
def test_token_grid_follows_the_aspect_ratio(tokens: int, width: int, height: int, shape: tuple[int, int]) -> None:
    rows, columns = grid_shape(tokens, width, height)
    assert {(rows, columns), (columns, rows)} >= {shape}
    assert rows * columns == tokens


def sample_of(tokens: int, image: Image.Image | None) -> SampleTokens:
    values = np.ones(tokens)
    return SampleTokens("one", "", image, values, values, [], np.empty(0), np.empty(0))


def test_tokens_that_are_no_grid_over_the_picture_get_no_heat_map() -> None:
    picture = Image.new("RGB", (160, 80))
    assert sample_of(50, picture).grid == (5, 10)
    assert sample_of(53, picture).grid is None
    assert sample_of(50, None).grid is None
    sample = page.shown_samples([sample_of(53, picture)])[0]
    assert (sample.pictures, sample.image_tokens) == ([], 53)


def test_a_token_in_every_set_is_darker_than_one_in_none() -> None:
    sample = SampleTokens(
        "one",
        "",
        Image.new("RGB", (40, 20), "white"),
        np.ones(2),
        np.array([0.0, 1.0]),
        [],
        np.empty(0),
        np.empty(0),
    )
    pixels = np.asarray(set_picture(sample)).mean(2)
    assert pixels[:, : pixels.shape[1] // 2].min() > 200 > 120 > pixels[:, pixels.shape[1] // 2 :].max()


def test_shares_of_image_tokens() -> None:
    scores = {(0, "qkv"): np.array([1, 3, 4], np.float32)}
    is_image = np.array([False, True, False])
    pool = TokenPool(np.array([0, 2, 3]), np.zeros(3, np.int32), is_image, ~is_image)
    chosen = pd.DataFrame(
        {
            "layer": 0,
            "group": "qkv",
            "sample": [0, 1],
            "position": [1, 0],
            "is_image": [True, False],
            "weight": [1.5, 0.5],
        }
    )
    (row,) = modality_shares(scores, chosen, pool).to_dict("records")
    assert row["tokens"] == pytest.approx(100 / 3)
    assert row["importance"] == pytest.approx(100 * 3 / 8)
    assert row["chosen"] == 75
    assert [share.tolist() for share in set_share(chosen, pool, 4)] == [[0, 0.25], [0.25]]
    assert [values.tolist() for values in relative_importance(scores, pool)] == [
        pytest.approx([3 / 8, 9 / 8]),
        pytest.approx([12 / 8]),
    ]


def test_samples_shown_come_from_different_sources() -> None:
    samples = [Sample(str(index), [], [], source) for index, source in enumerate("aaabbc")]
    assert spread(samples, 4) == [0, 3, 5, 1]
