"""Presets change params.yaml, keep its layout, and pin every download."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.harness import FOLDER
from tasks.config import presets as module
from tasks.config.params import ParamsError, section
from tasks.config.presets import KINDS, PRESETS, applied, available, check, main, named, pin
from tasks.config.sections import Download, PrepareParams, RegisterParams
from tlq.models.families import FAMILIES

ROOT = Path(__file__).parents[3]
SHIPPED = (ROOT / "params.yaml").read_text()
COMMIT = "f" * 40
ALL = available(ROOT / PRESETS)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shipped params.yaml and presets, and a hub with one commit."""
    shutil.copytree(ROOT / PRESETS, tmp_path / PRESETS)
    (tmp_path / "params.yaml").write_text(SHIPPED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "newest_commit", lambda repo, kind: COMMIT)
    return tmp_path


def apply(monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, Any]:
    """Content of params.yaml after the command."""
    monkeypatch.setattr(sys, "argv", ["preset", *words])
    main()
    content: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text())
    return content


def squeezed(text: str) -> str:
    """The text without blanks before comments, because a longer value moves its comment to the right."""
    return re.sub(r" +#", " #", text)


def test_one_preset_sets_the_model(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = apply(monkeypatch, "qwen2-vl-7b", "demo")
    assert params["model"] == {"path": "data/models/qwen2-vl-7b", "dtype": "bfloat16"}
    entry = params["fetch"]["qwen2-vl-7b"]
    assert (entry["repo"], entry["out"]) == ("Qwen/Qwen2-VL-7B-Instruct", params["model"]["path"])
    assert params["prepare"]["path"].startswith("data/demo")


def test_several_presets_set_model_data_and_benchmarks(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = apply(monkeypatch, "llava-onevision-0.5b", "sharegpt4v", "benchmarks")
    assert {entry["kind"] for entry in params["fetch"].values()} == set(KINDS)
    assert params["prepare"]["kind"] == "llava_json"
    assert params["prepare"]["samples"] == params["importance"]["samples"] == 128
    assert len(params["evaluate"]["benchmarks"]) == 6
    assert "columns" not in params["prepare"]


def test_a_preset_replaces_the_earlier_one_completely(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(monkeypatch, "qwen2-vl-7b", "textvqa-train", "demo")
    params = apply(monkeypatch, "qwen2-vl-2b", "sharegpt4v", "demo")
    assert list(params["fetch"]) == ["qwen2-vl-2b", "sharegpt4v"]
    assert "split" not in params["prepare"]


def test_demo_restores_params_yaml_with_comments_and_layout(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(monkeypatch, "qwen2-vl-7b", "sharegpt4v", "benchmarks")
    there = Path("params.yaml").read_text()
    comments = [line.split("#", 1)[1] for line in SHIPPED.splitlines() if "#" in line]
    assert all(f"#{comment}" in there for comment in comments)
    apply(monkeypatch, "demo")
    assert squeezed(Path("params.yaml").read_text()) == squeezed(SHIPPED)


def test_a_benchmark_preset_replaces_the_floors(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's floors name tasks that a real benchmark run does not score: no version could pass."""
    params = apply(monkeypatch, "text-benchmarks")
    assert params["register"]["floors"] == {}
    assert params["register"]["min_retention"] == 95
    params = apply(monkeypatch, "demo")
    assert params["register"]["floors"] == {
        "demo_textvqa": 90,
        "demo_chartqa": 90,
        "demo_ocrbench": 85,
        "demo_mmmu": 80,
    }


def test_a_file_without_a_registry_stays_without_one(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = yaml.safe_load(SHIPPED)
    del params["register"]
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert "register" not in apply(monkeypatch, "qwen2-vl-2b", "textvqa-train", "text-benchmarks")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["qwen2-vl-2b"],
            r"data/models/qwen2-vl-2b would be calibrated on demo data .* and scored on demo benchmarks .*; also "
            r"name a preset of calibration \(sharegpt4v or textvqa-train\) and one of benchmarks \(benchmarks or text-",
        ),
        (
            ["qwen2-vl-2b", "textvqa-train"],
            r"scored on demo benchmarks \(demo_textvqa, .*of benchmarks .*, or `demo` to",
        ),
        (["qwen2-vl-2b", "text-benchmarks"], r"calibrated on demo data \(data/demo/world/calibration.parquet\); also"),
        (["--model", "maker/Small-VL"], r"data/models/small-vl would be calibrated on demo data"),
    ],
)
def test_a_real_model_meets_demo_inputs_only_if_demo_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    with pytest.raises(ParamsError, match=message):
        apply(monkeypatch, *words)
    assert Path("params.yaml").read_text() == SHIPPED
    assert apply(monkeypatch, *words, "demo")["model"]["path"] != "data/demo/model"


def test_a_model_may_change_alone_once_its_inputs_are_real(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(monkeypatch, "qwen2-vl-2b", "textvqa-train", "text-benchmarks")
    assert apply(monkeypatch, "qwen2-vl-7b")["model"]["path"] == "data/models/qwen2-vl-7b"


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "register",
            {"floors": {"textvqa": 80, "mean": 80}},
            r"register.floors: textvqa not among evaluate.benchmarks \(demo_textvqa, .*; remove the floor",
        ),
        ("evaluate", {"limit": 99}, r"evaluate.limit: the limit is 99 items, register.min_items needs at least 100"),
        (
            "evaluate",
            {"benchmarks": [{"task": "demo_mmmu", "limit": 9}]},
            r"demo_mmmu: the limit is 9 items, register.min_items needs at least 100",
        ),
    ],
)
def test_a_gate_that_no_version_can_pass_is_refused(section: str, values: dict[str, Any], message: str) -> None:
    params = yaml.safe_load(SHIPPED)
    check(yaml.safe_dump(params))
    params[section] |= values
    if section == "evaluate":
        params["register"]["floors"] = {}
    with pytest.raises(ParamsError, match=message):
        check(yaml.safe_dump(params))


def test_a_run_that_does_not_promote_may_score_few_items() -> None:
    params = yaml.safe_load(SHIPPED)
    params["evaluate"]["limit"] = 8
    params["register"]["promote"] = False
    check(yaml.safe_dump(params))


def test_demo_covers_the_kinds_that_no_other_preset_covers(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(monkeypatch, "qwen2-vl-7b", "textvqa-train", "benchmarks")
    params = apply(monkeypatch, "qwen2-vl-2b", "demo")
    assert list(params["fetch"]) == ["qwen2-vl-2b"]
    assert params["evaluate"]["data"] == "data/demo/world"


def test_changes_are_printed(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apply(monkeypatch, "qwen2-vl-7b", "demo")
    lines = capsys.readouterr().out.splitlines()
    assert "model.path: data/demo/model -> data/models/qwen2-vl-7b" in lines
    assert any(line.startswith("fetch.qwen2-vl-7b: Qwen/Qwen2-VL-7B-Instruct at eed13092ef92") for line in lines)
    apply(monkeypatch, "qwen2-vl-7b", "demo")
    assert capsys.readouterr().out == "nothing changes\n"


def test_a_dry_run_writes_nothing(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply(monkeypatch, "qwen2-vl-7b", "demo", "--dry-run")
    assert Path("params.yaml").read_text() == SHIPPED


def test_presets_are_listed_without_a_name(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apply(monkeypatch)
    listed = capsys.readouterr().out
    assert all(f" {preset.name} " in listed for preset in ALL)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["qwen9"], r"unknown preset 'qwen9'; choose one of demo, .*qwen2-vl-7b.*--model or --dataset"),
        (["qwen2-vl-2b", "qwen2-vl-7b"], r"qwen2-vl-2b and qwen2-vl-7b are all model presets; choose one"),
        (["qwen2-vl-2b", "--revision", "Qwen/Qwen2-VL-2B-Instruct=main"], r"is 'main', must be a commit"),
        (["--dataset", "a/b", "--columns", "answer"], r"--columns 'answer': must be NAME=VALUE"),
        (["--dataset", "a/b", "--columns", "picture=image"], r"prepare\.columns\.picture: unknown key"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(
    project: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    with pytest.raises(ParamsError, match=message):
        apply(monkeypatch, *words)
    assert Path("params.yaml").read_text() == SHIPPED


def test_any_model_and_data_set_of_the_hub(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model", "maker/Small-VL", "--dataset", "maker/Photos", "--columns", "answer=caption", "--samples", "64"]
    params = apply(monkeypatch, "text-benchmarks", *words)
    assert params["model"]["path"] == "data/models/small-vl"
    assert section("prepare", PrepareParams).columns.answer == "caption"
    assert params["importance"]["samples"] == 64
    found = {entry["revision"] for entry in params["fetch"].values() if entry["kind"] != "benchmarks"}
    assert found == {COMMIT}


def test_a_revision_on_the_command_line_replaces_the_presets(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "a" * 40
    params = apply(monkeypatch, "qwen2-vl-2b", "demo", "--revision", f"Qwen/Qwen2-VL-2B-Instruct={own}")
    assert params["fetch"]["qwen2-vl-2b"]["revision"] == own


def test_only_a_missing_revision_is_looked_up_on_the_hub() -> None:
    asked: list[tuple[str, str]] = []

    def newest(repo: str, kind: str) -> str:
        asked.append((repo, kind))
        return COMMIT

    known, open_one = named(["qwen2-vl-7b", "sharegpt4v"], ALL)
    assert pin(known, {}, newest)["qwen2-vl-7b"]["revision"] != COMMIT
    assert pin(open_one, {}, newest)["sharegpt4v"]["revision"] == COMMIT
    assert asked == [("Lin-Chen/ShareGPT4V", "dataset")]


def test_a_comment_after_a_removed_last_key_stays() -> None:
    text = (
        "prepare:\n  kind: parquet\n  path: a\n  samples: 1\n  odd: 1\n\n# What follows.\nimportance:\n  samples: 1\n"
    )
    (preset,) = named(["sharegpt4v"], ALL)
    assert "\n\n# What follows.\nimportance:" in applied(text, [preset], {})


@pytest.mark.parametrize("preset", ALL, ids=lambda preset: f"{preset.kind}-{preset.name}")
def test_every_preset_is_usable(preset: module.Preset, tmp_path: Path) -> None:
    entries = pin(preset, {}, lambda repo, kind: COMMIT)
    text = applied(SHIPPED, [preset], {preset.kind: entries})
    check(text)
    (tmp_path / "params.yaml").write_text(text)
    section("register", RegisterParams, tmp_path / "params.yaml")
    content = yaml.safe_load(text)
    for entry in content["fetch"].values():
        assert Download(**entry).kind == preset.kind
    if preset.kind == "model" and preset.name != "demo":
        assert content["model"]["path"] == content["fetch"][preset.name]["out"]
    if preset.kind == "benchmarks":
        tasks = {path.stem for path in FOLDER.rglob("*.yaml")}
        assert {source["task"] for source in content["evaluate"]["benchmarks"]} <= tasks


def test_every_model_preset_has_a_supported_family() -> None:
    families = {
        "qwen2.5-vl": "qwen2_5_vl",
        "qwen3-vl-30b": "qwen3_vl_moe",
        "qwen3.5": "qwen3_5",
        "qwen3.6": "qwen3_5",
        "qwen3.6-35b": "qwen3_5_moe",
        "gemma-4": "gemma4",
        "gemma-4-26b": "gemma4",
    }
    for preset in ALL:
        if preset.kind == "model" and preset.name != "demo":
            family = preset.name.rsplit("-", 1)[0]
            assert families.get(family, family.replace("-", "_")) in FAMILIES
