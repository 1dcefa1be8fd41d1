"""The form of a flow: types of its parameters with their menus, and the groups of further options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from flows.stages import ROOT
from tlq.quantization.formats import SCHEMES
from tlq.recipes import RECIPES

PRESETS = ROOT / "presets"

#: Stages of dvc.yaml, the names that `force` takes; `fetch`, `calibrate` and `evaluate` stand for all their entries.
STAGES: tuple[str, ...] = tuple(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])

#: Field of the form by kind of preset.
FIELDS = {"model": "model", "calibration": "data", "benchmarks": "benchmarks"}


def preset_names(kind: str) -> list[str]:
    """Names of the presets of a kind."""
    return sorted(path.stem for path in (PRESETS / kind).glob("*.yaml"))


#: Mixes in the menu; `variants.schemes` and the command take any size.
_MIXES = ("mix2.5", "mix3", "mix3.5", "mix4.5")

# Prefect's form shows an `enum` as a menu, and takes descriptions from the flow's docstring.
RecipeName = Annotated[str, Field(json_schema_extra={"enum": [*RECIPES]})]
SchemeName = Annotated[str, Field(json_schema_extra={"enum": [*SCHEMES, *_MIXES]})]
StageName = Annotated[str, Field(json_schema_extra={"enum": [*STAGES]})]
DataName = Annotated[str, Field(json_schema_extra={"enum": ["", *preset_names("calibration")]})]
BenchmarksName = Annotated[str, Field(json_schema_extra={"enum": ["", *preset_names("benchmarks")]})]
StudyName = Annotated[str, Field(json_schema_extra={"enum": ["", *preset_names("sweep")]})]
Limit = Annotated[int, Field(ge=0)]


class Options(BaseModel):
    """Further choices of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: dict[str, Any] = Field(
        default_factory=dict, description='Any other values of params.yaml by dotted name, {"calibset.seed": 1}.'
    )
    promote: bool | None = Field(
        default=None,
        description="Let the versions of this run become champion. Empty: yes for a run with the values of "
        "params.yaml, no for a run with other values.",
    )


class QuantizeOptions(Options):
    """Further choices of a run of flow `quantize`."""

    name: str = Field(
        default="",
        description="Registered models are called `<name>-<scheme>`. Empty: the model's name if one is given, else "
        "`register.model_name` of params.yaml.",
    )
    force: tuple[StageName, ...] = Field(default=(), description="Stages to run even if they are not stale.")


@dataclass(frozen=True)
class Inputs:
    """The model of a run, its calibration data and its benchmarks; empty texts keep the values of params.yaml.

    Attributes:
        model: name of a preset, which also sets the name of its registered models, or folder of a checkpoint.
        data: name of a preset of calibration data.
        benchmarks: name of a preset of benchmarks.
    """

    model: str = ""
    data: str = ""
    benchmarks: str = ""

    @property
    def presets(self) -> dict[str, str]:
        """Name of the preset by kind."""
        model = self.model if self.model in preset_names("model") else ""
        chosen = {"model": model, "calibration": self.data, "benchmarks": self.benchmarks}
        return {kind: name for kind, name in chosen.items() if name}

    @property
    def folder(self) -> str:
        """Folder of the checkpoint, empty for a preset."""
        return "" if "model" in self.presets else self.model
