"""Model cards: their content and their code; DVC and the digest of a checkpoint ignore them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from support.report_results import VARIANTS, write_metrics

from tasks.config.sections import VariantParams
from tasks.report.cards import Base, CalibrationData, place_cards, read_base, render_card
from tasks.report.results import read_results
from tlq.export.engines import serving
from tlq.quantization.formats import get_scheme
from tlq.runtime.digest import checkpoint_digest
from tlq.samples import Sample

ROOT = Path(__file__).resolve().parents[3]
DATA = CalibrationData("`org/data` (split train, revision abc)", 5, {"a": 3, "b": 2}, 100, 60)
BASE = Base("models/base", "org/base", "qwen2_vl", ["en"], "other", "own-license", "https://example.org/license")


def card(reported: Path, monkeypatch: pytest.MonkeyPatch, name: str, base: Base = BASE) -> str:
    monkeypatch.chdir(reported)
    results = read_results(VariantParams(recipes=("rtn", "tlq"), schemes=("w4a8",)), Path("models/rtn-w4a8"))
    variant = next(each for each in results.variants if each.name == name)
    return render_card(variant, results, base, DATA, Path("models") / name)


# --- What they say ------------------------------------------------------------------------------------------------


def test_metadata_for_the_hub(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ModelCard(card(reported, monkeypatch, "tlq-w4a8")).data.to_dict()
    assert data == {
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "language": ["en"],
        "license": "other",
        "license_name": "own-license",
        "license_link": "https://example.org/license",
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["compressed-tensors", "quantized", "4-bit", "w4a8", "tlq", "vllm"],
    }


def test_what_the_base_models_card_does_not_state_is_left_out(reported: Path) -> None:
    data = ModelCard((reported / "report/cards/tlq-w4a8.md").read_text()).data.to_dict()
    assert not {"license", "language", "base_model", "base_model_relation"} & set(data)


@pytest.mark.parametrize(
    ("text", "license", "language"),
    [
        ("---\nlicense: apache-2.0\nlanguage: [en, de]\n---\n# Base\n", "apache-2.0", ["en", "de"]),
        ("# No metadata\n", None, None),
        ("---\nlicense: [unclosed\n---\n", None, None),
        (None, None, None),
    ],
)
def test_license_and_language_come_from_the_base_models_card(
    tmp_path: Path, text: str | None, license: str | None, language: Any
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    base = read_base(str(tmp_path), None)
    assert (base.license, base.language, base.model_type) == (license, language, "qwen2_vl")


def test_scores_recipe_and_data_are_on_the_card(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = card(reported, monkeypatch, "tlq-w4a8")
    assert "| **mean** | 98.0 ± 3.0 | **93.5 ± 4.0** | 95.4 ± 4.0 | 50 |" in text
    assert "`org/data` (split train, revision abc): 5 samples, 100 tokens, 60 of them image tokens" in text
    assert "| importance of tokens | token |" in text
    assert "| sources | a (3), b (2) |" in text
    assert "[org/base](https://huggingface.co/org/base)" in text


def test_the_card_of_a_recipe_without_data_says_so(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = card(reported, monkeypatch, "rtn-w4a8")
    assert "| calibration data | none: the recipe looks at weights only |" in text
    assert "org/data" not in text


def test_demo_benchmarks_are_called_demo(reported: Path) -> None:
    for name in VARIANTS:
        text = " ".join((reported / f"report/cards/{name}.md").read_text().split())
        assert "These are demo benchmarks:" in text
        assert "not scores on TextVQA, ChartQA, OCRBench or MMMU" in text
        assert "| demo benchmark | full precision |" in text


def test_real_benchmarks_are_not_called_demo(reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(reported, tmp_path / "copy"))
    write_metrics(copy, ("textvqa_vlm",))
    text = card(copy, monkeypatch, "tlq-w4a8")
    assert "demo" not in text
    assert "| textvqa_vlm |" in text


def test_cards_say_how_engines_run_the_scheme(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = card(reported, monkeypatch, "tlq-w4a8")
    assert serving(get_scheme("w4a8"), "qwen2_vl", "models/tlq-w4a8") in text
    assert "| vLLM, NVIDIA 0.33 | weight only | Marlin or Machete; `--linear-backend humming`" in text
    assert "tlq convert models/tlq-w4a8 --to gguf --out models/tlq-w4a8-gguf\nllama-server --model" in text
    assert "The scores above were measured with transformers" in text


# --- Their code ---------------------------------------------------------------------------------------------------


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.S)


def test_the_code_for_transformers_runs_as_written(
    reported: Path, samples: list[Sample], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(reported)
    (reported / "picture.png").write_bytes(samples[0].images[0])
    code = blocks(Path("models/tlq-w4a8/README.md").read_text())[0]
    assert 'path = "models/tlq-w4a8"' in code
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.endswith("\n")


def test_the_code_for_vllm_is_python(reported: Path) -> None:
    transformers_code, vllm_code = blocks((reported / "report/cards/tlq-w4a8.md").read_text())
    compile(vllm_code, "README.md", "exec")
    assert "from vllm import LLM" in vllm_code


def test_the_card_of_llava_at_w4a8_names_a_loader_that_works(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Base("models/base", None, "llava_next")
    assert "model = load_model(path" in blocks(card(reported, monkeypatch, "tlq-w4a8", base))[0]


# --- In the checkpoint --------------------------------------------------------------------------------------------


def test_placed_cards_do_not_change_the_digest(reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reported)
    for name in VARIANTS:
        written = (reported / "models" / name / "README.md").read_text()
        assert written == (reported / "report/cards" / f"{name}.md").read_text()
    checkpoint = reported / "models/tlq-w4a8"
    before = checkpoint_digest(checkpoint)
    (checkpoint / "README.md").unlink()
    assert checkpoint_digest(checkpoint) == before
    assert checkpoint / "README.md" in {reported / path for path in place_cards()}
    assert checkpoint_digest(checkpoint) == before


def test_a_card_is_not_put_into_another_checkpoint(
    reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(reported, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    report = copy / "models/tlq-w4a8/calibration.json"
    report.write_text(report.read_text() + " ")
    (copy / "models/tlq-w4a8/README.md").unlink()
    with pytest.raises(ValueError, match=r"tlq-w4a8\.md was made for another checkpoint than models/tlq-w4a8"):
        place_cards()
    assert not (copy / "models/tlq-w4a8/README.md").exists()


def test_a_missing_checkpoint_is_named(reported: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"bring the checkpoint back with `dvc pull .*rtn-w4a8`"):
        place_cards(reported / "report/cards", tmp_path)


def dvc(folder: Path, *arguments: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "dvc", *arguments]
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def test_dvc_ignores_cards(tmp_path: Path) -> None:
    """One stage makes a checkpoint, another writes a card into it; status, push, checkout and pull still work."""
    repo = tmp_path / "repo"
    repo.mkdir()
    for name in (".dvcignore", ".dvc/config"):
        (repo / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, repo / name)
    make = "mkdir -p models/a-b && echo weights > models/a-b/model.safetensors"
    report = "mkdir -p report && cat models/a-b/model.safetensors > report/card && cp report/card models/a-b/README.md"
    (repo / "dvc.yaml").write_text(
        f"stages:\n  calibrate:\n    cmd: {make}\n    outs: [models/a-b]\n"
        f"  report:\n    cmd: {report}\n    deps: [models]\n    outs: [report]\n"
    )
    subprocess.run(["git", "init", "--quiet", "."], cwd=repo, check=True)
    dvc(repo, "remote", "add", "--default", "--local", "here", str(tmp_path / "remote"))
    dvc(repo, "repro")
    assert (repo / "models/a-b/README.md").exists()
    assert "up to date" in dvc(repo, "status")
    dvc(repo, "push")
    dvc(repo, "checkout")
    (repo / "models/a-b/model.safetensors").unlink()
    shutil.rmtree(repo / ".dvc/cache")
    dvc(repo, "pull")
    assert (repo / "models/a-b/model.safetensors").read_text() == "weights\n"
    assert (repo / "models/a-b/README.md").exists()
    assert "up to date" in dvc(repo, "status")
