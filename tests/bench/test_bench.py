"""The selection of runs and the written tables of bench.ablation and bench.peers."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bench import ablation, ablation_page, ablation_peers, laboratory
from bench.ablation_page import Claim, Variant
from bench.ablation_peers import PEERS
from bench.peers import Setup, contenders, equal_length_inputs
from bench.sections import table
from tasks.files import write_parquet
from tlq.quantization.formats import get_scheme
from tlq.quantization.ranges import MINMAX
from tlq.recipes import Recipe, get_recipe
from tlq.samples import Sample

Runs = list[tuple[str, str, int]]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The quantizations that a study makes: choice, scheme, seed. Each only returns numbers, at once."""
    made: Runs = []

    def run_choice(_laboratory: Any, choice: Any, scheme: str, _pool: Any, seed: int) -> dict[str, float]:
        made.append((choice.name.strip(), scheme, seed))
        return {"score": 90.0, "nll": 0.1, "kl": 0.1 * (seed + 1), "items": 400, "seconds": 1.0}

    full = {"score": 91.0, "nll": 0.1, "kl": 0.0, "items": 400, "seconds": 1.0}
    monkeypatch.setattr(ablation, "Laboratory", lambda *arguments: SimpleNamespace(full=full))
    monkeypatch.setattr(ablation, "calibration_samples", lambda *arguments: [])
    monkeypatch.setattr(ablation, "Pool", lambda *arguments: None)
    monkeypatch.setattr(ablation, "run_choice", run_choice)
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


@pytest.fixture
def subject(tmp_path: Path) -> ablation.Subject:
    return ablation.Subject("tiny", tmp_path / "model", tmp_path / "results.csv", "Choices")


def test_calibration_samples_can_be_of_some_kinds_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    kinds = ["demo-signs", "demo-text", "demo-chart", "demo-shapes"] * 5
    rows = {"id": [f"{number}" for number in range(20)], "image": [picture.getvalue()] * 20, "question": ["what?"] * 20}
    write_parquet(pd.DataFrame({**rows, "answer": ["that"] * 20, "source": kinds}), tmp_path / "calibration.parquet")
    monkeypatch.setattr(laboratory, "WORLD", tmp_path)
    samples = laboratory.calibration_samples(6, seed=1, sources=("demo-signs", "demo-chart"))
    assert len(samples) == 6
    assert {sample.source for sample in samples} == {"demo-signs", "demo-chart"}
    assert {sample.source for sample in laboratory.calibration_samples(20)} == set(laboratory.SOURCES)


def test_a_study_started_again_runs_only_the_missing_seeds(runs: Runs, subject: ablation.Subject) -> None:
    ablation.run_study(subject, [0], ["w3a16"], 400, ["mbq: default"])
    ablation.run_study(subject, [0, 1], ["w3a16"], 400, ["mbq: default"])
    assert runs == [("mbq: default", "w3a16", 0), ("mbq: default", "w3a16", 1)]


def test_the_summary_has_means_over_seeds_with_intervals(runs: Runs, subject: ablation.Subject, tmp_path: Path) -> None:
    ablation.run_study(subject, [0, 1, 2], ["w3a16"], 400, ["mbq: default"])
    frame = ablation_page.results_of(subject)
    assert frame is not None
    ablation_page.summarise(subject, frame, ["", "claims"], tmp_path / "docs")
    text = (tmp_path / "docs/results.md").read_text()
    assert "| mbq | default | 0.2000 ± 0.2484 | 0.1000 | 90.0 | 3 |" in text
    assert "\nclaims\n" in text
    assert (tmp_path / "docs/results.png").read_bytes().startswith(b"\x89PNG")


def test_a_claim_compares_the_seeds_that_both_variants_have() -> None:
    """The ratios are 0.5, 0.5 and 0.125; the seed that one of them lacks does not count."""
    rows = [("tlq", seed, kl) for seed, kl in enumerate((1.0, 2.0, 0.5))]
    rows += [("mbq", seed, kl) for seed, kl in enumerate((2.0, 4.0, 4.0, 9.0))]
    frame = pd.DataFrame(rows, columns=["recipe", "seed", "kl"]).assign(scheme="w3a16", factor="default", level="")
    claim = Claim("", Variant("tlq", "w3a16"), Variant("mbq", "w3a16"))
    found = ablation_page.ratio(frame, claim)
    assert found is not None
    assert found[0] == pytest.approx((0.5 * 0.5 * 0.125) ** (1 / 3))
    spread = float(np.log([0.5, 0.5, 0.125]).std(ddof=1))
    assert found[2] / found[0] == pytest.approx(np.exp(4.302653 * spread / 3**0.5), rel=1e-6)
    assert found[3] == 3
    assert ablation_page.ratio(frame, Claim("", Variant("awq", "w3a16"), Variant("mbq", "w3a16"))) is None


def test_every_claim_is_about_choices_of_the_study() -> None:
    names = ablation_page.variants()
    for claim in ablation_page.claims():
        for variant in (claim.first, claim.second):
            assert (variant.recipe, variant.factor, variant.level) in names, claim.words


def test_peer_inputs_have_no_padding(tiny_processor: Any, samples: list[Sample]) -> None:
    image_id = tiny_processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    batches = equal_length_inputs(samples, tiny_processor, image_id)
    assert all(bool(inputs["attention_mask"].all()) for inputs in batches)
    assert sum(len(inputs["input_ids"]) for inputs in batches) == len(samples)


def test_contenders_share_model_scheme_and_dtype(tmp_path: Path) -> None:
    setup = Setup(Path("model"), get_scheme("w2a16"), Path("peers/python"), ("tlq",), "cuda")
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


def test_peers_quantize_with_the_scheme_that_is_named() -> None:
    commands = {
        (peer.name, name): peer.command(Path("python"), Path("model"), "Layer", get_scheme(name))
        for peer in PEERS
        for name in ("w3a16", "w4a8")
    }
    assert {command[command.index("--method") + 1] for command in commands.values()} == {"awq", "gptq", "autoround"}
    grouped = commands["llm-compressor gptq with observer mse", "w3a16"]
    assert grouped[grouped.index("--bits") :] == ["--bits", "3", "--group-size", "128", "--observer", "mse"]
    channels = commands["llm-compressor gptq", "w4a8"]
    assert channels[channels.index("--bits") :] == ["--bits", "4", "--symmetric", "--activation-bits", "8"]


def test_a_peer_that_has_results_does_not_run_again(subject: ablation.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = replace(subject, name="qwen2_vl")
    started: list[str] = []

    def run_contender(name: str, command: list[str]) -> tuple[dict[str, float], Path]:
        started.append(name)
        return {"seconds": 1.0}, Path(command[-1])

    measured = {"score": 90.0, "nll": 0.1, "kl": 0.2, "items": 4}
    laboratory = SimpleNamespace(measure=lambda _model, _reader: measured, reader=None)
    monkeypatch.setattr(ablation_peers, "Laboratory", lambda *_arguments: laboratory)
    monkeypatch.setattr(ablation_peers, "run_contender", run_contender)
    for name in ("calibration_samples", "write_inputs", "load_dequantized", "load_model"):
        monkeypatch.setattr(ablation_peers, name, lambda *_arguments: None)
    ablation_peers.run_study(subject, Path("python"), [0], ["w3a16"], 1, ["auto-round", "awq"])
    assert started == [
        "llm-compressor awq, w3a16, seed 0",
        "llm-compressor awq with observer mse, w3a16, seed 0",
        "auto-round, w3a16, seed 0",
    ]
    ablation_peers.run_study(subject, Path("python"), [0], ["w3a16"], 1, ["auto-round", "awq"])
    assert len(started) == 3
    frame = ablation_page.results_of(subject)
    assert frame is not None
    assert list(frame["level"]) == ["", "mse", ""]
