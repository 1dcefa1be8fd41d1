"""The parts of the comparisons that decide what is run and what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import ablation
from bench.peers import equal_length_inputs
from bench.sections import table
from tlq.samples import Sample


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(ablation, "DOCS", tmp_path / "docs")
    return tmp_path


def row(recipe: str, seed: int, kl: float, factor: str = "default", level: str = "") -> dict[str, Any]:
    names = {"recipe": recipe, "factor": factor, "level": level, "scheme": "w3a16", "seed": seed}
    return {**names, "score": 90.0, "nll": 0.1, "kl": kl, "items": 400, "seconds": 1.0}


def test_a_study_changes_one_choice_at_a_time() -> None:
    names = [choice.name for choice in ablation.study()]
    assert len(names) == len(set(names))
    base, *others = ablation.choices(ablation.get_recipe("tlq-c"))
    for choice in others:
        fields = ("recipe", "weighting", "budget", "samples")
        assert sum(getattr(choice, field) != getattr(base, field) for field in fields) == 1, choice.name


def test_what_is_done_is_not_run_again(results: Path) -> None:
    ablation._append(row("mbq", 0, 0.1), set())
    planned = list(ablation._plan([0, 1], ["w3a16"], ablation._finished(), "mbq: default"))
    assert [(seed, [choice.name for choice, _ in wanted]) for seed, _, wanted in planned] == [(1, ["mbq: default "])]


def test_the_summary_has_means_over_seeds_with_intervals(results: Path) -> None:
    done: set[tuple[Any, ...]] = set()
    ablation._append({**row("full", 0, 0.0), "factor": "", "scheme": ""}, done)
    for seed, kl in enumerate((0.1, 0.2, 0.3)):
        ablation._append(row("mbq", seed, kl), done)
    ablation._append(row("mbq", 2, 9.9), done)  # a run that is there already
    ablation.summarise()
    text = (results / "docs/ablation.md").read_text()
    assert "| mbq | default | 0.2000 ± 0.2484 | 0.1000 | 90.0 | 3 |" in text
    assert (results / "docs/ablation.png").read_bytes().startswith(b"\x89PNG")


def test_peers_get_batches_without_padding(tiny_processor: Any, samples: list[Sample]) -> None:
    image_id = tiny_processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    batches = equal_length_inputs(samples, tiny_processor, image_id)
    assert all(bool(inputs["attention_mask"].all()) for inputs in batches)
    assert sum(len(inputs["input_ids"]) for inputs in batches) == len(samples)


def test_a_table_has_a_row_per_contender() -> None:
    assert table([{"contender": "tlq", "KL": "0.1"}]) == ["| contender | KL |", "|---|---|", "| tlq | 0.1 |"]
