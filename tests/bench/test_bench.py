"""The selection of runs and the written tables of bench.ablation and bench.peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import ablation
from bench.peers import Setup, contenders, equal_length_inputs
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


def test_ablation_changes_one_choice_at_a_time() -> None:
    names = [choice.name for choice in ablation.study()]
    assert len(names) == len(set(names))
    base, *others = ablation.choices(ablation.get_recipe("tlq-c"))
    for choice in others:
        fields = ("recipe", "weighting", "budget", "samples")
        assert sum(getattr(choice, field) != getattr(base, field) for field in fields) == 1, choice.name


def test_remaining_runs_skip_runs_with_a_result(results: Path) -> None:
    ablation.append_result(row("mbq", 0, 0.1), set())
    remaining = list(ablation.remaining_runs([0, 1], ["w3a16"], ablation.finished_runs(), "mbq: default"))
    assert [(seed, [choice.name for choice, _ in runs]) for seed, _, runs in remaining] == [(1, ["mbq: default "])]


def test_summary_has_means_over_seeds_with_intervals(results: Path) -> None:
    done: set[tuple[Any, ...]] = set()
    ablation.append_result({**row("full", 0, 0.0), "factor": "", "scheme": ""}, done)
    for seed, kl in enumerate((0.1, 0.2, 0.3)):
        ablation.append_result(row("mbq", seed, kl), done)
    ablation.append_result(row("mbq", 2, 9.9), done)  # a run that has a result
    ablation.summarise()
    text = (results / "docs/ablation.md").read_text()
    assert "| mbq | default | 0.2000 ± 0.2484 | 0.1000 | 90.0 | 3 |" in text
    assert (results / "docs/ablation.png").read_bytes().startswith(b"\x89PNG")


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
