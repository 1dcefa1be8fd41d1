"""calibration.json: round trips, old files, and files that cannot be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tlq.quantization.formats import get_scheme
from tlq.recipes import get_recipe
from tlq.results import CalibrationReport, GroupReport, LayerReport

GROUP = GroupReport(0, "qkv", 0.5, True, 2.0, 1.0, 40, 20.5, None, 0.25, 1000)
LAYERS = [
    LayerReport(index, [replace(GROUP, layer=index)], 1.5, {"search": 1.5}, 2, peak_host_bytes=1000)
    for index in range(2)
]
SCHEME = replace(get_scheme("w4a8"), overrides=(("*.layers.0.*", "full_precision"),))
REPORT = CalibrationReport(get_recipe("tlq-c"), SCHEME, LAYERS)


def test_a_report_is_the_same_after_save_and_load(tmp_path: Path) -> None:
    REPORT.save(tmp_path / "calibration.json")
    assert CalibrationReport.load(tmp_path / "calibration.json") == REPORT


def test_a_report_of_groups_only_loads(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    REPORT.save(path)
    content = json.loads(path.read_text())
    del content["layers"], content["groups"][1]["seconds"], content["groups"][1]["peak_memory_bytes"]
    path.write_text(json.dumps(content))
    loaded = CalibrationReport.load(path)
    assert [(layer.layer, layer.seconds) for layer in loaded.layers] == [(0, None), (1, None)]
    assert loaded.groups == [GROUP, replace(GROUP, layer=1, seconds=None, peak_memory_bytes=None)]


def test_an_invalid_report_is_refused_with_file_and_key(tmp_path: Path) -> None:
    path = tmp_path / "tlq-c-w4a8" / "calibration.json"
    REPORT.save(path)
    content = json.loads(path.read_text())
    content["recipe"]["rounds"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"an unknown key rounds; make it again with `dvc repro -f calibrate@tlq-c-w4"):
        CalibrationReport.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"calibration\.json: has no recipe, scheme, groups"):
        CalibrationReport.load(path)
