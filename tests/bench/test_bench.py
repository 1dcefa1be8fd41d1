"""The selection of runs and the written tables of bench.ablation and bench.peers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import ablation
from bench.peers import Setup, contenders, equal_length_inputs
from bench.sections import table
from tlq.quantization.ranges import MINMAX
from tlq.recipes import Recipe, get_recipe
from tlq.samples import Sample

Runs = list[tuple[str, str, int]]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The quantizations that a study makes: choice, scheme, seed. Each only returns numbers, at once."""
    made: Runs = []

    def run_choice(_laboratory: Any, choice: Any, scheme: str, _pool: Any, seed: int) -> dict[str, float]:
        made.append((choice.name.strip(), scheme, seed))
        return {"score": 90.0, "nll": 0.1, "kl": 0.1 * (seed + 1), "items": 400, "seconds": 1.0}

    full = {"score": 91.0, "nll": 0.1, "kl": 0.0, "items": 400, "seconds": 1.0}
    monkeypatch.setattr(ablation, "Laboratory", lambda items, folder: SimpleNamespace(full=full))
    monkeypatch.setattr(ablation, "Pool", lambda *arguments: None)
    monkeypatch.setattr(ablation, "run_choice", run_choice)
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(ablation, "DOCS", tmp_path / "docs")
    return made


@pytest.mark.parametrize("recipe", [get_recipe("tlq"), replace(get_recipe("tlq-c"), ranges=MINMAX)])
def test_choices_differ_from_the_base_in_one_field(recipe: Recipe) -> None:
    names = [choice.name for choice in ablation.study()]
    assert len(names) == len(set(names))
    base, *others = ablation.choices(recipe)
    for choice in others:
        fields = ("recipe", "weighting", "budget", "samples")
        changed = 2 if choice.level.endswith(", uniform") else 1  # at every budget by width, both importances
        assert sum(getattr(choice, field) != getattr(base, field) for field in fields) == changed, choice.name


def test_a_study_started_again_runs_only_the_missing_seeds(runs: Runs) -> None:
    ablation.run_study([0], ["w3a16"], 400, ["mbq: default"])
    ablation.run_study([0, 1], ["w3a16"], 400, ["mbq: default"])
    assert runs == [("mbq: default", "w3a16", 0), ("mbq: default", "w3a16", 1)]


def test_the_summary_has_means_over_seeds_with_intervals(runs: Runs, tmp_path: Path) -> None:
    ablation.run_study([0, 1, 2], ["w3a16"], 400, ["mbq: default"])
    ablation.summarise()
    text = (tmp_path / "docs/ablation.md").read_text()
    assert "| mbq | default | 0.2000 ± 0.2484 | 0.1000 | 90.0 | 3 |" in text
    assert (tmp_path / "docs/ablation.png").read_bytes().startswith(b"\x89PNG")


def test_peer_inputs_have_no_padding(tiny_processor: Any, samples: list[Sample]) -> None:
    image_id = tiny_processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    batches = equal_length_inputs(samples, tiny_processor, image_id)
    assert all(bool(inputs["attention_mask"].all()) for inputs in batches)
    assert sum(len(inputs["input_ids"]) for inputs in batches) == len(samples)


def test_contenders_share_model_scheme_and_dtype(tmp_path: Path) -> None:
    setup = Setup(Path("model"), 2, 64, Path("peers/python"), ("tlq",), "cuda")
    commands = dict(contenders(setup, tmp_path))
    assert list(commands) == ["llm-compressor awq", "llm-compressor gptq", "tlq"]
    for command in commands.values():
        words = command[command.index("--model") :]
        options = dict(zip(words[::2], words[1::2], strict=True))
        assert (options["--model"], options["--dtype"]) == ("model", "bfloat16")
        assert options.get("--bits") == "2" or options["--scheme"] == "w2a16"


def test_table_keeps_columns_and_rows_in_order() -> None:
    rows = [{"contender": "tlq", "KL": "0.1"}, {"KL": "0.2", "contender": "awq"}]
    assert table(rows) == ["| contender | KL |", "|---|---|", "| tlq | 0.1 |", "| awq | 0.2 |"]
