"""What can be filled in when a flow is started, and how it gets into params.yaml.

params.yaml is the truth: a run without parameters does what it says. Whatever is filled in replaces values of
params.yaml for that run, as `dvc exp run -S` would; the run is saved as a DVC experiment under its own name, and then
params.yaml is as it was.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

from dvc.repo import Repo
from dvc.utils.serialize import parse_yaml_for_update
from prefect import get_run_logger
from prefect.runtime import flow_run
from pydantic import Field
from ruamel.yaml import YAML

from flows.stages import ROOT
from tlq.quantization.formats import SCHEMES
from tlq.recipes import RECIPES
from tlq.runtime.files import write_text

PARAMS = ROOT / "params.yaml"
PRESETS = ROOT / "presets"

#: Stands among the overrides for the preset of a model; everything the preset sets is below the other overrides.
PRESET = "preset"

#: Stages by the names that `force` takes; `calibrate` and `evaluate` stand for all their variants.
STAGES = (
    "demo",
    "fetch",
    "baseline",
    "prepare",
    "importance",
    "calibset",
    "calibrate",
    "evaluate",
    "register",
    "report",
)

# Prefect's form shows an `enum` as a menu, and takes descriptions from the flow's docstring.
RecipeName = Annotated[str, Field(json_schema_extra={"enum": [*RECIPES]})]
SchemeName = Annotated[str, Field(json_schema_extra={"enum": [*SCHEMES]})]
StageName = Annotated[str, Field(json_schema_extra={"enum": [*STAGES]})]
Limit = Annotated[int, Field(ge=0)]

_LINE_WIDTH = 160  # of params.yaml, so that long rows stay rows


class ParametersError(ValueError):
    """A flow was started with something that params.yaml does not have."""


def overrides(
    model: str = "",
    name: str = "",
    recipes: Sequence[str] = (),
    schemes: Sequence[str] = (),
    limit: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Values of params.yaml by dotted name, from a flow's parameters; those left empty are not in it.

    Args:
        model: name of a preset, which also says what its models are registered as, or folder of a checkpoint.

    Raises:
        ParametersError: ``model`` is neither.
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
    """A params file's text with ``values`` put in by dotted name; comments stay.

    Raises:
        ParametersError: a section that the file does not have, or a name that goes on below a plain value.
    """
    values = dict(values)
    if preset := values.pop(PRESET, ""):
        text = with_preset(text, preset)
    params = parse_yaml_for_update(text, PARAMS)
    for name, value in values.items():
        *path, key = name.split(".")
        if not path or path[0] not in params:
            raise ParametersError(f"{name}: no such section in params.yaml; choose one of {', '.join(params)}")
        place = params
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ParametersError(f"{name}: {part} is a plain value in params.yaml; name it without what follows")
        place[key] = value
    stream = StringIO()
    writer = YAML()
    writer.width = _LINE_WIDTH
    writer.dump(params, stream)
    return stream.getvalue()


def with_preset(text: str, name: str) -> str:
    """A params file's text with a model's preset in it, download at the preset's commit included."""
    from tasks.config.presets import applied, available, named, newest_commit, pin

    chosen = [preset for preset in named([name], available(PRESETS)) if preset.kind == "model"]
    return applied(text, chosen, {preset.kind: pin(preset, {}, newest_commit) for preset in chosen})


@contextmanager
def overridden(values: Mapping[str, Any]) -> Iterator[None]:
    """params.yaml with ``values`` in it; when the block ends well the workspace is saved as an experiment.

    Afterwards params.yaml is as it was, unless somebody else has changed it meanwhile.
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
        save_experiment(flow_run.name)
    finally:
        if PARAMS.read_text() == during:
            write_text(before, PARAMS)
        else:
            get_run_logger().warning("params.yaml was changed during the run and stays as it is")


def check_identity() -> None:
    """Refuse before the long work what saving the experiment would refuse after it.

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
    """The workspace as a DVC experiment: params, dvc.lock, metrics; outputs are in DVC's cache already.

    Raises:
        ParametersError: DVC cannot save it, for instance because this is no git repository.
    """
    command = [sys.executable, "-m", "dvc", "exp", "save", "--force", "--name", name]
    for metrics in _metric_files():  # `exp save` takes only what git knows
        command += ["--include-untracked", metrics]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ParametersError(f"experiment {name} cannot be saved: {done.stderr.strip() or done.stdout.strip()}")
    get_run_logger().info("Saved as experiment %s: `dvc exp show`, `dvc exp apply %s`", name, name)


def _metric_files() -> list[str]:
    """Files with metrics that exist, relative to the project's folder."""
    with Repo(str(ROOT)) as repo:
        paths = [Path(out.fs_path) for out in repo.index.outs if out.metric and not out.use_cache]
    return [str(path.relative_to(ROOT)) for path in paths if path.exists()]
