"""Checks between sections: the engine that will serve the variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.quick_project import ROOT

from tasks.config.consistency import check_served
from tasks.config.params import ParamsError, parse, read
from tasks.config.presets import check
from tasks.config.sections import ExportParams
from tasks.stages.calibrate import main

SHIPPED: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())


def with_engine(engine: str | None, **variants: Any) -> dict[str, Any]:
    return {**SHIPPED, "export": {"engine": engine}, "variants": {**SHIPPED["variants"], **variants}}


def test_the_shipped_parameters_name_no_engine() -> None:
    check_served(SHIPPED)
    check_served({})


def test_a_scheme_that_the_engine_does_not_run_is_refused() -> None:
    check_served(with_engine("vllm"))
    with pytest.raises(ParamsError, match=r"export.engine: SGLang.* does not run w3a16 .* is w4a16; change variants"):
        check_served(with_engine("sglang"))
    with pytest.raises(ParamsError, match="does not run w3a16"):
        check(yaml.safe_dump(with_engine("sglang")))
    check_served(with_engine("sglang", schemes=["w4a16"]))
    check_served(with_engine("sglang"), ["w4a16"])


def test_group_sizes_and_overrides_count() -> None:
    content = with_engine("llama.cpp", schemes=["w4a16s"])
    check_served(content)
    content["calibrate"] = {**SHIPPED["calibrate"], "group_size": 16}
    with pytest.raises(ParamsError, match="has groups of 16, but a block of GGUF has 32 weights"):
        check_served(content)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"export.*unknown engine 'ollama'; choose one of vllm"):
        parse("export", {"engine": "ollama"}, ExportParams)


def test_the_stage_refuses_before_it_reads_anything(project: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load((project / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**content, "export": {"engine": "sglang"}}))
    with pytest.raises(ParamsError, match="does not run w3a16"):
        main("rtn", "w3a16")


def test_a_file_without_the_section_is_no_misspelling(tmp_path: Path) -> None:
    """`report` is near `export`."""
    content = {name: values for name, values in SHIPPED.items() if name != "export"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    assert "report" in read(tmp_path / "params.yaml")
