"""Stage `allocate`: the bits of a mix for the stages after it, and nothing to do without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tasks.stages import allocate, calibrate
from tlq.export.quantized import QuantizedCheckpoint
from tlq.quantization.formats import FULL_PRECISION, get_scheme

ALLOCATION = Path("data/allocation")


@pytest.fixture(autouse=True)
def workplace(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project that a test may change."""
    shutil.copytree(project / "data", tmp_path / "data")
    shutil.copyfile(project / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_schemes(*schemes: str, **sections: Any) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    variants = {"recipes": ["rtn"], "schemes": list(schemes)}
    Path("params.yaml").write_text(yaml.safe_dump({**params, "variants": variants, **sections}))


def written() -> dict[str, str]:
    return {path.name: path.read_text() for path in ALLOCATION.iterdir()}


def test_without_a_mix_no_model_is_read_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the scores are, the files are the same, so that no variant becomes stale."""
    monkeypatch.setattr(allocate, "StreamedModel", None)
    with_schemes("w3a16", "w4a8", calibrate={"overrides": {"*.layers.0.*": FULL_PRECISION}})
    allocate.main()
    files = written()
    assert sorted(files) == ["losses.csv", "w3a16.json", "w4a8.json"]
    assert json.loads(files["w3a16.json"]) == {"overrides": {}}
    shutil.rmtree("data/importance")
    allocate.main()
    assert written() == files


def test_the_dry_run_without_a_mix_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with_schemes("w3a16")
    allocate.main(dry_run=True)
    assert capsys.readouterr().out == "no scheme of the variants is a mix: nothing is computed\n"
    assert not ALLOCATION.exists()


def test_a_mix_is_calibrated_with_its_bits() -> None:
    with_schemes("w3a16", "mix3.5", "mix5")
    allocate.main()
    first = written()
    overrides = json.loads(first["mix3.5.json"])["overrides"]
    losses = pd.read_csv(ALLOCATION / "losses.csv")
    assert set(losses["scheme"]) >= set(overrides.values())
    assert json.loads(first["mix5.json"])["overrides"] != overrides
    assert json.loads(first["w3a16.json"])["overrides"] == {}
    calibrate.main("rtn", "mix3.5")
    stored = QuantizedCheckpoint.open(Path("models/rtn-mix3.5"))
    for path, name in overrides.items():
        key = path.replace("model.language_model", "model")
        expected = None if name == FULL_PRECISION else get_scheme(name).weight_bits
        assert (stored.schemes[key].weight_bits if key in stored.schemes else None) == expected
    allocate.main()
    assert written() == first


def test_the_dry_run_of_a_mix_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with_schemes("mix3.5")
    allocate.main(dry_run=True)
    assert "expected peak per rank" in capsys.readouterr().out
    assert not ALLOCATION.exists()


def test_a_mix_that_was_not_distributed_is_not_calibrated() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"data/allocation/mix3\.json: not found; run `dvc repro allocate` first"
    ):
        calibrate.main("rtn", "mix3")


def test_a_group_size_for_a_mix_is_refused() -> None:
    with_schemes("mix3", calibrate={"group_size": 64})
    with pytest.raises(ValueError, match="scheme mix3 has the groups of its parts; remove group_size: 64"):
        allocate.main()


def test_a_budget_that_is_too_small_is_refused() -> None:
    with_schemes("mix1.5")
    with pytest.raises(ValueError, match=r"scheme mix1\.5: the budget of 1\.5 bits a weight is too small"):
        allocate.main()
    assert not ALLOCATION.exists()
