"""Stage `calibset`: one set of tokens per layer and group, reproducible, with a summary."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from support.pools import pool_of

from tasks.config.sections import CalibsetParams
from tasks.files import IMPORTANCE, PREPARED, write_importance
from tasks.stages import calibset
from tasks.stages.calibset import build, summarise
from tlq.importance.pool import Importance, TokenPool
from tlq.importance.token_set import TokenBudget, effective_sample_size
from tlq.importance.weighting import Weighting, token_weights
from tlq.recipes import RECIPES

LENGTHS = [30, 22, 41]


@pytest.fixture
def scored() -> tuple[Importance, TokenPool]:
    generator = np.random.default_rng(0)
    scores = {
        (layer, group): np.concatenate([generator.lognormal(-9, 2, length).astype(np.float32) for length in LENGTHS])
        for layer in range(2)
        for group in ("qkv", "down")
    }
    token_ids = [generator.integers(0, 500, length).astype(np.int32) for length in LENGTHS]
    positions = [np.arange(length) for length in LENGTHS]
    is_image = [position < len(position) // 2 for position in positions]
    is_answer = [position >= len(position) - 3 for position in positions]
    return scores, pool_of(is_image, is_answer, token_ids)


@pytest.mark.parametrize("selection", ["top", "sample"])
def test_rows_point_at_the_tokens_that_they_describe(scored: tuple[Importance, TokenPool], selection: str) -> None:
    scores, pool = scored
    tokens = build(scores, pool, CalibsetParams(budget=TokenBudget(20, selection)))  # type: ignore[arg-type]
    assert tokens.groupby(["layer", "group"]).ngroups == 4
    assert tokens.groupby(["layer", "group"]).size().max() <= 20
    for row in tokens.to_dict("records"):
        index = pool.cu_seqlens[row["sample"]] + row["position"]
        assert index < pool.cu_seqlens[row["sample"] + 1]
        assert row["token_id"] == pool.token_ids[index]
        assert row["is_image"] == pool.is_image[index]
    assert not tokens.duplicated(["layer", "group", "sample", "position"]).any()
    assert np.allclose(tokens.groupby(["layer", "group"])["weight"].mean(), 1, atol=1e-4)


def test_top_weights_are_the_importance(scored: tuple[Importance, TokenPool]) -> None:
    scores, pool = scored
    weighting = Weighting(power=0.5, clip_quantile=1)
    tokens = build(scores, pool, CalibsetParams(budget=TokenBudget(20, "top"), weighting=weighting))
    part = tokens[(tokens["layer"] == 1) & (tokens["group"] == "down")]
    weights = pool.split(token_weights(scores[1, "down"], pool, "token", weighting))
    expected = np.array([weights[row["sample"]][row["position"]] for row in part.to_dict("records")])
    np.testing.assert_allclose(part["weight"], expected / expected.mean(), rtol=1e-5)


def test_draws_differ_between_layers_and_seeds(scored: tuple[Importance, TokenPool]) -> None:
    """Uniform importance everywhere: only the random numbers can differ between groups, and must."""
    scores, pool = scored
    draws = {
        seed: build(scores, pool, CalibsetParams(budget=TokenBudget(20), source="uniform", seed=seed))
        for seed in (0, 1)
    }
    assert build(scores, pool, CalibsetParams(budget=TokenBudget(20), source="uniform", seed=0)).equals(draws[0])
    assert not draws[0].equals(draws[1])
    columns = ["sample", "position"]
    one, other = (draws[0][draws[0]["layer"] == layer][columns].to_numpy().tolist() for layer in (0, 1))
    assert one != other


def write_inputs(scores: Importance, pool: TokenPool) -> None:
    """What the stage reads, in the current folder."""
    write_importance({"answer": scores}, pool, IMPORTANCE)
    PREPARED.mkdir(parents=True)
    (PREPARED / "calibration.parquet").write_bytes(b"samples")


WEIGHTED, SET = {"mbq"}, {"tlq", "tlq-c"}
DATA = {"smoothquant", "awq", "gptq"} | WEIGHTED | SET


@pytest.mark.parametrize(
    ("change", "affected"),
    [
        ({"calibset": {"seed": 5}}, SET),
        ({"calibset": {"budget": {"tokens_per_layer": 20}}}, SET),
        ({"calibset": {"weighting": {"power": 0.5}}}, WEIGHTED | SET),
        ({"recipes": {"rtn": {"importance": "token"}}}, set()),
        ({}, set()),
        ("scores", WEIGHTED | SET),
        ("samples", DATA),
    ],
)
def test_a_change_affects_the_recipes_that_use_it(
    scored: tuple[Importance, TokenPool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Any,
    affected: set[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    params = {"calibset": {"budget": {"tokens_per_layer": 25}, "seed": 4}}
    write_inputs(*scored)
    found = []
    for changed in (False, True):
        if changed and isinstance(change, dict):
            params |= {name: {**params.get(name, {}), **values} for name, values in change.items()}
        elif changed and change == "scores":
            scores = {key: values * values for key, values in scored[0].items()}
            write_importance({"answer": scores}, scored[1], IMPORTANCE)
        elif changed:
            (PREPARED / "calibration.parquet").write_bytes(b"others")
        Path("params.yaml").write_text(yaml.safe_dump(params))
        calibset.main()
        found.append({path.stem: path.read_text() for path in Path("data/calibset/recipes").iterdir()})
    assert set(found[0]) == set(RECIPES)
    assert {name for name in RECIPES if found[0][name] != found[1][name]} == affected


def test_summary(scored: tuple[Importance, TokenPool]) -> None:
    tokens = build(*scored, CalibsetParams(budget=TokenBudget(20, "top")))
    summary = summarise(tokens).set_index(["layer", "group"])
    assert len(summary) == 4
    part = tokens[(tokens["layer"] == 0) & (tokens["group"] == "qkv")]
    row: dict[str, Any] = summary.loc[(0, "qkv")].to_dict()  # type: ignore[union-attr]
    assert row["tokens"] == len(part) == 20
    assert row["effective_tokens"] == pytest.approx(effective_sample_size(part["weight"].to_numpy()), abs=0.1)
    assert row["image_weight"] == pytest.approx(part[part["is_image"]]["weight"].sum() / part["weight"].sum(), abs=1e-3)


def test_the_stage_twice_writes_the_same_bytes(
    scored: tuple[Importance, TokenPool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump({"calibset": {"budget": {"tokens_per_layer": 25}, "seed": 4}}))
    write_inputs(scored[0], scored[1])
    written = []
    for _ in range(2):
        calibset.main()
        written.append({str(path): path.read_bytes() for path in Path("data/calibset").rglob("*") if path.is_file()})
    names = {Path(path).name for path in written[0]}
    assert names == {"summary.csv", "tokens.parquet", *(f"{name}.json" for name in RECIPES)}
    assert written[0] == written[1]
    assert len(pd.read_csv("data/calibset/summary.csv")) == 4


def test_sets_with_too_few_effective_tokens_are_warned_of(
    scored: tuple[Importance, TokenPool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where images weigh far more than text, half the tokens count; MBQ's weights are not evened out."""
    monkeypatch.chdir(tmp_path)
    pool = scored[1]
    scores = {(layer, "o_proj" if group == "qkv" else group): values for (layer, group), values in scored[0].items()}
    for values in scores.values():
        values[pool.is_image] *= 1000
    write_inputs(scores, pool)
    for source, warned in (("token", 0), ("modality", 4)):
        params = {"source": source, "budget": {"tokens_per_layer": 400}, "weighting": {"least_effective": 60}}
        Path("params.yaml").write_text(yaml.safe_dump({"calibset": params}))
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tlq"):
            calibset.main()
        assert len(caplog.messages) == warned
    few = pd.read_csv("data/calibset/summary.csv").iloc[0]
    assert caplog.messages[0].startswith(
        f"layer 0, group down: {few['effective_tokens']} effective tokens, fewer than "
        "calibset.weighting.least_effective 60; raise calibset.budget.tokens_per_layer"
    )
