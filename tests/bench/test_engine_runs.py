"""The comparison of exports in engines: what counts as a contradiction, and one run in every engine that is here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.families import TINY
from support.processors import write_processor
from support.quick_project import ROOT

from bench.engines import __main__ as runs
from bench.engines import environments, families, tiny_checkpoints
from bench.engines.__main__ import SCRIPTS, Result, contradiction
from bench.engines.families import FamilyResult
from tlq.export.containers import GGUF_FAMILIES, MLX_FAMILIES
from tlq.export.engines import ENGINES
from tlq.quantization.formats import SCHEMES


def test_a_result_that_the_table_bears_out_is_no_contradiction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "cpu_flags", lambda: {"avx512f"})
    assert contradiction(Result("w4a16", "vllm-cpu", kl=1e-5)) is None
    assert contradiction(Result("w3a16", "vllm-cpu", refused="no kernel")) is None
    assert contradiction(Result("q4_0", "llama.cpp", kl=0.01)) is None  # it rounds activations, and the table says so
    assert contradiction(Result("full", "mlx", kl=0.01)) is None


def test_contradictions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "cpu_flags", lambda: {"avx512f"})
    assert "the table says native" in str(contradiction(Result("w4a16", "vllm-cpu", refused="no kernel")))
    assert "the table says refused" in str(contradiction(Result("w3a16", "vllm-cpu")))
    assert "differs from transformers by 0.0" in str(contradiction(Result("w4a16", "mlx", kl=0.01)))
    assert "refused: bad file" in str(contradiction(Result("full", "mlx", refused="bad file")))
    monkeypatch.setattr(runs, "cpu_flags", lambda: {"avx2"})
    assert contradiction(Result("w4a16", "vllm-cpu", refused="cpu_gemm_wna16")) is None
    assert "it runs" in str(contradiction(Result("w4a16", "vllm-cpu")))


def test_divergence_is_over_the_tokens_of_the_right_answers() -> None:
    there, here = np.log([[0.5, 0.5], [0.25, 0.75]]), np.log([[0.25, 0.75], [0.25, 0.75]])

    def found(rows: Any) -> dict[str, Any]:
        measured = dict.fromkeys(("tokens_per_second", "load_seconds", "peak_mib"), 1.0)
        return {"log_probabilities": [rows.tolist()], "replies": ["yes"], **measured}

    result = runs._compared("w4a16", "mlx", found(here), found(there), [{"answer_ids": [0, 1]}], 1.0)
    expected = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert result.most_kl == pytest.approx(expected)
    assert result.kl == pytest.approx(expected / 2)
    assert result.nll == pytest.approx(-(np.log(0.25) + np.log(0.75)) / 2)
    assert (result.same_replies, result.prompts) == (1, 1)


def test_the_page_has_every_engine_and_scheme_that_were_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "PAGE", tmp_path / "page.md")
    full = Result("full", "mlx", tokens_per_second=50.0, prompts=8, same_replies=8)
    runs.summarise([full, Result("w4a16", "mlx", tokens_per_second=100.0), Result("q4_0", "mlx", refused="a | b\nc")])
    text = (tmp_path / "page.md").read_text()
    assert "100 (2.00)" in text
    assert "refuses: a \\| b c" in text


def test_the_results_in_the_repository_agree_with_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "cpu_flags", lambda: {"avx512f"})  # of the machine that measured them
    results = [Result(**row) for row in json.loads((ROOT / runs.RESULTS).read_text())]
    assert {(result.scheme, result.engine) for result in results} == {
        (scheme, engine) for scheme in runs.ROWS for engine in SCRIPTS
    }
    assert not [line for result in results if (line := contradiction(result))]


@pytest.mark.engine
@pytest.mark.parametrize("engine", [name for name in SCRIPTS if name != "transformers"])
def test_an_engine_answers_as_transformers(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    try:
        environments.python(engine)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    if not runs.WORLD.exists():
        pytest.skip("the demo's data are missing: dvc repro demo")
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results.json")
    scheme = next(name for name in ("w4a16s", "w8a8") if ENGINES[engine].of(SCHEMES[name]).needs is None)
    runs.measure([scheme], [engine], tmp_path)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert contradiction(Result(**row)) is None
    assert row["same_replies"] == row["prompts"]


def test_a_family_that_runs_has_its_divergence_in_the_table() -> None:
    result = FamilyResult("llava", "vllm-cpu", "w4a16s", text_kl=3.2e-4, text_bfloat16=2e-4, image_refused="no | a\nb")
    assert families.cell(result) == "3e-4 (2e-4) / refused"
    assert families.refusals(result) == ["an image: no \\| a b"]
    uncompared = replace(result, image_refused=f"{families.UNCOMPARED}: its processor needs torchvision")
    assert families.cell(uncompared) == "3e-4 (2e-4) / -"
    assert not families.refusals(uncompared)


def test_a_divergence_of_rounded_probabilities_is_not_negative() -> None:
    there = np.log([[0.3, 0.7], [0.25, 0.75]])
    assert families.divergence((there + 1e-4).tolist(), there.tolist()) >= 0
    expected = 0.3 * np.log(0.3 / 0.5) + 0.7 * np.log(0.7 / 0.5)
    assert families.divergence(np.log([[0.5, 0.5], [0.25, 0.75]]).tolist(), there.tolist()) == pytest.approx(expected)


def test_a_family_with_a_result_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "RESULTS", tmp_path / "results.json")
    families.keep(FamilyResult("llava", "llama.cpp", "full", text_kl=1e-5))
    families.keep(FamilyResult("llava", "mlx", "w4a16s", refused="no kernel"))
    families.keep(FamilyResult("llava", "mlx", "w4a16s", text_kl=2e-5))
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [(row["scheme"], row["text_kl"]) for row in rows] == [("full", 1e-5), ("w4a16s", 2e-5)]
    families.measure("llava", ["mlx"], ["full", "w4a16s"], tmp_path / "unused", again=False)  # builds nothing
    assert not (tmp_path / "unused").exists()


def test_the_lists_of_families_agree_with_the_results_in_the_repository() -> None:
    results = [FamilyResult(**row) for row in json.loads((ROOT / families.RESULTS).read_text())]
    assert {each.family for each in results} <= set(TINY)
    for engine, listed in (("mlx", MLX_FAMILIES), ("llama.cpp", GGUF_FAMILIES)):
        right = {
            (each.family, each.scheme)
            for each in results
            if each.engine == engine and each.text_kl is not None and each.text_kl < families.MOST_KL
        }
        for family in listed:
            assert {(family, scheme) for scheme in families.FORMS[engine]} <= right


def test_a_family_that_differs_in_vllm_has_a_note() -> None:
    results = [FamilyResult(**row) for row in json.loads((ROOT / families.RESULTS).read_text())]
    differing = {
        TINY[each.family].model_type
        for each in results
        if (each.engine, each.scheme) == ("vllm-cpu", families.FULL)
        and max(each.text_kl or 0.0, each.image_kl or 0.0) > families.MOST_KL
    }
    assert {"aya_vision", "exaone4_5"} <= differing <= set(ENGINES["vllm-cpu"].notes)


def test_a_tiny_checkpoint_states_how_pixels_are_normalized(tmp_path: Path) -> None:
    """vLLM and mlx-vlm read it from the file; transformers alone has defaults."""
    tiny_checkpoints.state_normalization(write_processor("glm4v", tmp_path))
    stated = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert set(tiny_checkpoints.NORMALIZATION) <= set(stated)
    assert stated["patch_size"] == 4


def test_a_tiny_config_has_the_published_names_of_fields(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"text_config": {"num_local_experts": 4, "hidden_size": 8}}))
    tiny_checkpoints.state_as_published(file, tiny_checkpoints.FIELDS_AS_PUBLISHED["qwen3_vl_moe"])
    assert json.loads(file.read_text()) == {"text_config": {"hidden_size": 8, "num_experts": 4}}


@pytest.mark.engine
@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_llama_cpp_computes_as_transformers_in_full_precision(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    try:
        environments.python("llama.cpp")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(families, "RESULTS", tmp_path / "results.json")
    families.measure(family, ["llama.cpp"], ["full"], tmp_path, again=True)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert max(row["text_kl"], row["image_kl"]) < 1e-4
