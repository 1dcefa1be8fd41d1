"""Studies: sweeps by name, presets/sweep/<name>.yaml, whose results stay in sweeps/<name>.csv while models come and go.

A sweep that is run again continues: a model with a row for full precision and for every variant is not run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.form import PRESETS, preset_names
from flows.parameters import ParametersError
from flows.stages import ROOT
from tlq.runtime.files import write_text

#: Columns of the table after model and variant, where they were measured.
_SHOWN = ("score", "retention", "kl")


class Study(BaseModel):
    """What a sweep runs.

    Attributes:
        models: presets or folders of checkpoints.
        data, benchmarks: presets.
        published: published scores by benchmark, as text, for a row of the table.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...] = Field(min_length=1)
    data: str
    benchmarks: str
    recipes: tuple[str, ...] = Field(min_length=1)
    schemes: tuple[str, ...] = Field(min_length=1)
    published: Mapping[str, str] = Field(default_factory=dict)

    @classmethod
    def read(cls, name: str) -> Study:
        """The study called ``name``. Raises ParametersError if there is none or its file has a mistake."""
        if name not in (known := preset_names("sweep")):
            raise ParametersError(f"study {name}: no preset; choose one of {', '.join(known)}")
        path = PRESETS / "sweep" / f"{name}.yaml"
        try:
            return cls(**yaml.safe_load(path.read_text()))
        except (ValidationError, TypeError, yaml.YAMLError) as error:
            raise ParametersError(f"{path}: {' '.join(str(error).split())}") from error


class Results:
    """The rows of a sweep: in memory, and in a file if the sweep has a name."""

    def __init__(self, name: str = "") -> None:
        self._file = ROOT / "sweeps" / f"{name}.csv" if name else None
        self.rows: list[dict[str, Any]] = []
        if self._file is not None and self._file.exists():
            frame = pd.read_csv(
                self._file, keep_default_na=False, na_values={"kl": [""], "retention": [""], "nll": [""]}
            )
            self.rows = [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]

    def has(self, model: str, variants: set[str]) -> bool:
        """Whether there is a row for each of these variants of a model."""
        return bool(variants) and variants <= {row["variant"] for row in self.rows if row["model"] == model}

    def put(self, model: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Put the rows of a model in the place of its older ones."""
        self.rows = [row for row in self.rows if row["model"] != model]
        self.rows += [{"model": model, **row} for row in rows]
        if self._file is not None:
            self._file.parent.mkdir(exist_ok=True)
            write_text(pd.DataFrame(self.rows).to_csv(index=False), self._file)

    def table(self, published: Mapping[str, str]) -> str:
        """All rows as text, with a row of published scores below if there are any."""
        if not self.rows:
            return "no model has results yet"
        frame = pd.DataFrame(self.rows)
        fixed = ("model", "variant", "registered", "n", "skipped", "nll", *_SHOWN)
        benchmarks = [name for name in frame.columns if name not in fixed]
        columns = ["model", "variant", *(name for name in _SHOWN if name in frame.columns), *benchmarks]
        shown = frame[columns].map(_text)
        if published:
            row = {"model": "published", "variant": "TLQ", **published}
            shown = pd.concat([shown, pd.DataFrame([row])]).reindex(columns=columns).fillna("")
        return str(shown.to_string(index=False))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return str(value)


def model_name(model: str) -> str:
    """A preset's name, or the last part of a checkpoint's folder."""
    return Path(model).name
