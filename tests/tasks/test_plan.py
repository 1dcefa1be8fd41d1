"""Command `tasks.plan`: the needs of all long stages of params.yaml, and the refusal of one that is too large."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from benchmarks.results import EvaluationRun
from tasks.plan import main
from tlq.runtime.clock import in_words

VARIANTS = {"recipes": ["rtn", "tlq"], "schemes": ["w3a16", "w4a8"]}


@pytest.fixture
def planned(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project with four variants, in which only `prepare` has run."""
    folder = shutil.copytree(project, tmp_path / "project")
    shutil.rmtree(folder / "data/importance")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump({**params, "variants": VARIANTS}))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TLQ_DEVICE", "cpu")
    return folder


def test_every_long_stage_has_a_row(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main()
    printed = capsys.readouterr().out
    header, *rows = printed.split("\n\n")[0].splitlines()
    assert header.split() == ["stage", "device", "host", "disk", "time"]
    names = [row.split("  ")[0] for row in rows]
    variants = [f"calibrate {recipe}-{scheme}" for recipe in VARIANTS["recipes"] for scheme in VARIANTS["schemes"]]
    assert names == ["importance", *variants]
    assert all(row.count(" GiB") == 3 for row in rows)
    assert "evaluations: their time is known when full precision has been evaluated" in printed
    assert not (planned / "data/importance").exists()
    assert not (planned / "models").exists()


def test_evaluations_take_as_long_as_that_of_full_precision(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (planned / "evaluation/full").mkdir(parents=True)
    EvaluationRun("2026-11-28T12:00:00Z", "CPU", "hf", 8, 3600.0).save(planned / "evaluation/full/run.json")
    main()
    printed = capsys.readouterr().out
    assert (
        f"evaluations: about 1 h 0 min each, as full precision took on CPU; 4 of them {in_words(4 * 3600)}" in printed
    )
    assert "all together: about 4 h" in printed


def test_a_mix_adds_the_stage_that_distributes_it(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = yaml.safe_load((planned / "params.yaml").read_text())
    params["variants"] = {"recipes": ["rtn"], "schemes": ["mix4"]}
    (planned / "params.yaml").write_text(yaml.safe_dump(params))
    main()
    rows = capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]
    assert [row.split("  ")[0] for row in rows] == ["importance", "allocate", "calibrate rtn-mix4"]
    assert not any("unknown" in row for row in rows)


def test_a_stage_that_is_too_large_is_refused_by_name(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLQ_DEVICE_MEMORY", "0.0001")
    with pytest.raises(MemoryError, match="importance: one rank needs at least"):
        main()
