"""Parameters of a flow run, and how they replace values of params.yaml.

A run without parameters uses params.yaml. Parameters replace values of params.yaml for that run, as `dvc exp run -S`
does. The run is saved as a DVC experiment under its own name, and params.yaml is restored.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import yaml
from dvc.repo import Repo
from prefect import get_run_logger
from pydantic import Field

from flows.names import experiment_name
from flows.stages import ROOT
from tasks.config.editor import EditError, ParamsEditor
from tlq.quantization.formats import SCHEMES
from tlq.recipes import RECIPES
from tlq.runtime.files import write_text

PARAMS = ROOT / "params.yaml"
PRESETS = ROOT / "presets"

#: Key of a model's preset among the overrides. The preset is applied first, so the other overrides take precedence.
PRESET = "preset"

#: Stages of dvc.yaml, the names that `force` takes; `fetch`, `calibrate` and `evaluate` stand for all their entries.
STAGES: tuple[str, ...] = tuple(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])

# Prefect's form shows an `enum` as a menu, and takes descriptions from the flow's docstring.
RecipeName = Annotated[str, Field(json_schema_extra={"enum": [*RECIPES]})]
SchemeName = Annotated[str, Field(json_schema_extra={"enum": [*SCHEMES]})]
StageName = Annotated[str, Field(json_schema_extra={"enum": [*STAGES]})]
Limit = Annotated[int, Field(ge=0)]


class ParametersError(ValueError):
    """A flow cannot run with its parameters."""


def overrides(
    model: str = "",
    name: str = "",
    recipes: Sequence[str] = (),
    schemes: Sequence[str] = (),
    limit: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Values of params.yaml by dotted name, from the flow parameters that are not empty.

    Args:
        model: name of a preset, which also sets the name of its registered models, or folder of a checkpoint.

    Raises:
        ParametersError: ``model`` is neither a preset nor a folder.
    """
    preset = model if (PRESETS / "model" / f"{model}.yaml").is_file() else ""
    path = "" if preset else model
    if path and not (ROOT / path).is_dir():
        raise ParametersError(
            f"model {model}: neither a preset nor a folder; give one of presets/model, or a checkpoint"
        )
    if path and not name:
        name = Path(path).name
    chosen: dict[str, Any] = {
        PRESET: preset,
        "model.path": path,
        "register.model_name": name,
        "variants.recipes": list(recipes),
        "variants.schemes": list(schemes),
    }
    chosen = {key: value for key, value in chosen.items() if value}
    if limit is not None:
        chosen["evaluate.limit"] = limit or None
    return chosen | dict(settings or {})


def with_overrides(text: str, values: Mapping[str, Any]) -> str:
    """Set ``values`` by dotted name in the text of a params file; comments stay.

    Raises:
        ParametersError: the file has no such section, or a name continues below a plain value.
    """
    values = dict(values)
    if preset := values.pop(PRESET, ""):
        text = with_preset(text, preset)
    editor = ParamsEditor(text)
    try:
        for name, value in values.items():
            editor.set(name, value)
    except EditError as error:
        raise ParametersError(str(error)) from error
    return editor.text


def with_preset(text: str, name: str) -> str:
    """Apply a model's preset to the text of a params file, with the download at the preset's commit."""
    from tasks.config.presets import applied, available, named, newest_commit, pin

    chosen = [preset for preset in named([name], available(PRESETS)) if preset.kind == "model"]
    return applied(text, chosen, {preset.kind: pin(preset, {}, newest_commit) for preset in chosen})


@contextmanager
def overridden(values: Mapping[str, Any]) -> Iterator[None]:
    """Set ``values`` in params.yaml during the block, and save the workspace as an experiment if the block succeeds.

    Afterwards params.yaml is restored, unless another process or a user has changed it in the meantime.
    """
    if not values:
        yield
        return
    check_identity()
    before = PARAMS.read_text()
    during = with_overrides(before, values)
    write_text(during, PARAMS)
    try:
        yield
        save_experiment(experiment_name())
    finally:
        if PARAMS.read_text() == during:
            write_text(before, PARAMS)
        else:
            get_run_logger().warning("params.yaml was changed during the run and stays as it is")


def check_identity() -> None:
    """Check before the long work that the experiment can be saved after it.

    Raises:
        ParametersError: git has no name and email for commits.
    """
    for name in ("user.name", "user.email"):
        found = subprocess.run(["git", "config", name], cwd=ROOT, capture_output=True, text=True, check=False)
        if not found.stdout.strip():
            raise ParametersError(
                f"git has no {name}, without which a run with other values cannot be saved as an experiment; "
                f"set it with `git config {name} ...`"
            )


def save_experiment(name: str) -> None:
    """Save the workspace (params, dvc.lock, metrics) as a DVC experiment; outputs are in DVC's cache already.

    Raises:
        ParametersError: DVC cannot save it, for instance because this is no git repository.
    """
    command = [sys.executable, "-m", "dvc", "exp", "save", "--force", "--name", name]
    for metrics in _metric_files():  # `exp save` takes only tracked files otherwise
        command += ["--include-untracked", metrics]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ParametersError(f"experiment {name} cannot be saved: {done.stderr.strip() or done.stdout.strip()}")
    get_run_logger().info("Saved as experiment %s: `dvc exp show`, `dvc exp apply %s`", name, name)


def _metric_files() -> list[str]:
    """Existing metrics files, relative to the project's folder."""
    with Repo(str(ROOT)) as repo:
        paths = [Path(out.fs_path) for out in repo.index.outs if out.metric and not out.use_cache]
    return [str(path.relative_to(ROOT)) for path in paths if path.exists()]
