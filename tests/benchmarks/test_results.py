"""metrics.json and summary.json: round trips, old files, and files that cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import BenchmarkMetrics, Comparison, EvaluationRun, Metrics, Part, Summary

BENCHMARK = BenchmarkMetrics(91.25, 86.0, 95.0, 40, 41, kl=0.1, skipped=1, empty_replies=2, parts={"a": Part(0.5, 2)})
METRICS = Metrics("tlq-w3a16", {"demo_mmmu": BENCHMARK}, Comparison(91.25, 86.0, 95.0, 40, 41, retention=98.0, kl=0.1))


def test_metrics_are_the_same_after_save_and_load(tmp_path: Path) -> None:
    METRICS.save(tmp_path / "metrics.json")
    assert Metrics.load(tmp_path / "metrics.json") == METRICS
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_the_file_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    METRICS.save(tmp_path / "metrics.json")
    mean = json.loads((tmp_path / "metrics.json").read_text())["mean"]
    assert mean == {"score": 91.25, "low": 86.0, "high": 95.0, "n": 40, "asked": 41, "retention": 98.0, "kl": 0.1}


def test_metrics_without_empty_replies_and_parts_load(tmp_path: Path) -> None:
    entry = {"score": 90, "low": 80, "high": 95, "n": 10, "asked": 10}
    content = {"variant": "full", "benchmarks": {"a": entry}, "mean": entry}
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    loaded = Metrics.load(tmp_path / "metrics.json")
    assert (loaded.benchmarks["a"].empty_replies, loaded.benchmarks["a"].skipped) == (None, 0)
    assert loaded.mean.to_dict() == entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": {}}, "metrics.json: mean: no score, low, high, n, asked; evaluate the variant again"),
        ({"mean": {**METRICS.mean.to_dict(), "score": "97"}}, "mean: score is '97', needs a number"),
        ({"benchmarks": {"a": {"scores": 1}}}, "metrics.json: a: unknown key scores"),
        ({"benchmarks": None}, "; evaluate the variant again"),
    ],
)
def test_invalid_metrics_are_refused_with_file_and_entry(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS.to_dict() | change))
    with pytest.raises(ValueError, match=message):
        Metrics.load(tmp_path / "metrics.json")


def test_the_summary_is_one_flat_row(tmp_path: Path) -> None:
    METRICS.summary().save(tmp_path / "summary.json")
    row = {"score": 91.25, "demo_mmmu": 91.25, "retention": 98.0, "kl": 0.1, "n": 40, "skipped": 1}
    assert list(json.loads((tmp_path / "summary.json").read_text()).items()) == list(row.items())
    assert Summary.load(tmp_path / "summary.json") == METRICS.summary()


def test_percentages_keep_hundredths_and_nats_six_places() -> None:
    rounded = Comparison(1 / 3, 1 / 3, 1 / 3, 3, 3, kl=1 / 3, kl_low=1 / 3, mcnemar_p=1 / 3).rounded()
    assert (rounded.score, rounded.kl, rounded.mcnemar_p, rounded.n) == (0.33, 0.333333, 0.333333, 3)
    assert rounded.kl_low == 0.333333


# --- The run ------------------------------------------------------------------------------------------------------

RUN = EvaluationRun("2026-11-27T06:24:42Z", "CPU", "hf", items=30, seconds=12.0, peak_memory_bytes=10**9)


def test_a_run_is_the_same_after_save_and_load(tmp_path: Path) -> None:
    RUN.save(tmp_path / "run.json")
    assert EvaluationRun.load(tmp_path / "run.json") == RUN


def test_items_per_second_need_an_item() -> None:
    assert RUN.items_per_second == 2.5
    assert replace(RUN, items=0).items_per_second is None


@pytest.mark.parametrize("text", ["{", "[]", '{"finished": "2026-11-27T06:24:42Z"}', '{"speed": 1}'])
def test_an_invalid_run_is_refused_with_its_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json: .*; evaluate the variant again"):
        EvaluationRun.load(tmp_path / "run.json")
