"""Names of flow runs and of the experiments that they are saved as."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from prefect.runtime import flow_run

from services.processes import ROOT
from tasks.config.params import ParamsError, section
from tasks.config.sections import VariantParams

#: A longer list is named by its length: `7 recipes`.
_MOST = 4


def run_name() -> str:
    """The name of the current run of `quantize` or `sweep`: its models, recipes and schemes, and the date."""
    return name_of(flow_run.parameters, date.today())


def evaluation_name() -> str:
    """The name of the current run of `evaluate`: its registered models, else all recipes and schemes, and the date."""
    return name_of(flow_run.parameters, date.today(), variants=not flow_run.parameters.get("models"))


def name_of(parameters: Mapping[str, Any], day: date, variants: bool = True) -> str:
    """The name of a run: `rtn w4a16 2026-11-27`, `qwen2-vl-2b rtn+tlq w3a16 2026-11-27`.

    Args:
        parameters: of the flow. Recipes and schemes that they leave out are those of params.yaml; the model, or the
            study of a sweep, is named if it is given.
        variants: whether to name recipes and schemes.
    """
    settings = parameters.get("settings") or {}
    model = parameters.get("study") or parameters.get("model") or settings.get("model.path")
    words = [_joined([_short(each) for each in parameters.get("models") or [*filter(None, [model])]], "models")]
    if variants:
        default = _variants()
        for part in ("recipes", "schemes"):
            chosen: Sequence[str] = (
                parameters.get(part) or settings.get(f"variants.{part}") or getattr(default, part, None) or ()
            )
            words.append(_joined(chosen, part))
    return " ".join([*filter(None, words), day.isoformat()])


def _variants() -> VariantParams | None:
    """Recipes and schemes of params.yaml; None if it cannot be read, which the flow itself reports as its failure."""
    try:
        return section("variants", VariantParams, ROOT / "params.yaml")
    except (OSError, ParamsError):
        return None


def _short(model: str) -> str:
    """A checkpoint's folder by its last part; presets and registered models (`demo-w3a16/2`) as they are."""
    return Path(model).name if (ROOT / model).is_dir() else model


def _joined(words: Sequence[str], what: str) -> str:
    return "+".join(words) if len(words) <= _MOST else f"{len(words)} {what}"


def experiment_name() -> str:
    """The DVC experiment of the current flow run: its name in the letters that git allows, and the run's own suffix.

    The suffix keeps two runs of one day apart.
    """
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', flow_run.name).strip('-.')}-{str(flow_run.id)[-4:]}"
