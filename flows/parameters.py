"""Parameters of a flow run, and how they replace values of params.yaml.

A run without parameters uses params.yaml. Parameters replace values of params.yaml for that run, as `dvc exp run -S`
does. The run is saved as a DVC experiment under its own name, and params.yaml is restored. Such a run registers its
versions and moves no alias unless it is asked to promote.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from dvc.repo import Repo
from prefect import get_run_logger

from flows.form import FIELDS, PRESETS, Inputs, Options, QuantizeOptions, preset_names
from flows.names import experiment_name
from flows.stages import ROOT
from tasks.config.consistency import check_gate, check_served, demo_inputs
from tasks.config.editor import EditError, ParamsEditor
from tlq.runtime.files import write_text

PARAMS = ROOT / "params.yaml"
#: Key of the presets among the overrides: a mapping from kind to name. Presets are applied first, so the other
#: overrides take precedence.
PRESET = "preset"
DEMO = "demo"
_PROMOTE = "register.promote"


class ParametersError(ValueError):
    """A flow cannot run with its parameters."""


def overrides(
    inputs: Inputs = Inputs(),
    recipes: Sequence[str] = (),
    schemes: Sequence[str] = (),
    limit: int | None = None,
    options: Options = Options(),
) -> dict[str, Any]:
    """Values of params.yaml by dotted name, from the flow parameters that are not empty.

    A run with any values gets `register.promote: false` unless its options ask to promote.

    Raises:
        ParametersError: an input is neither a preset nor, for the model, a folder.
    """
    _check_inputs(inputs)
    name = options.name if isinstance(options, QuantizeOptions) else ""
    chosen: dict[str, Any] = {
        PRESET: inputs.presets,
        "model.path": inputs.folder,
        "register.model_name": name or Path(inputs.folder).name,
        "variants.recipes": list(recipes),
        "variants.schemes": list(schemes),
    }
    chosen = {key: value for key, value in chosen.items() if value}
    if limit is not None:
        chosen["evaluate.limit"] = limit or None
    chosen |= options.settings
    if options.promote is not None:
        chosen[_PROMOTE] = options.promote
    elif chosen:
        chosen.setdefault(_PROMOTE, False)
    return chosen


def _check_inputs(inputs: Inputs) -> None:
    for kind, name in inputs.presets.items():
        if name not in preset_names(kind):
            raise ParametersError(f"{FIELDS[kind]} {name}: no preset; choose one of {', '.join(preset_names(kind))}")
    if inputs.folder and not (ROOT / inputs.folder).is_dir():
        raise ParametersError(
            f"model {inputs.folder}: neither a preset nor a folder; give one of presets/model, or a checkpoint"
        )


def with_overrides(text: str, values: Mapping[str, Any]) -> str:
    """Set ``values`` by dotted name in the text of a params file; comments stay.

    Raises:
        ParametersError: the file has no such section, or a name continues below a plain value.
    """
    values = dict(values)
    if presets := values.pop(PRESET, {}):
        text = with_presets(text, presets)
    editor = ParamsEditor(text)
    if "register" not in editor.sections:  # nothing is recorded, so there is nothing to promote
        values.pop(_PROMOTE, None)
    try:
        for name, value in values.items():
            editor.set(name, value)
    except EditError as error:
        raise ParametersError(str(error)) from error
    return editor.text


def with_presets(text: str, names: Mapping[str, str]) -> str:
    """Apply presets, given by kind, to the text of a params file, with their downloads at pinned commits."""
    from tasks.config.presets import applied, available, newest_commit, pin

    chosen = [preset for preset in available(PRESETS) if names.get(preset.kind) == preset.name]
    return applied(text, chosen, {preset.kind: pin(preset, {}, newest_commit) for preset in chosen})


def check(text: str, values: Mapping[str, Any]) -> None:
    """Refuse parameters that would waste a run, before its first stage.

    Args:
        text: the params file of the run.
        values: the overrides that are in ``text`` already.

    Raises:
        ParamsError: no version can pass the gate, or the engine that will serve them does not run a scheme.
        ParametersError: the run names a real model and leaves it demo data or demo benchmarks. The same in params.yaml
            itself is a warning.
    """
    content = yaml.safe_load(text)
    check_gate(content)
    check_served(content)
    presets = values.get(PRESET, {})
    inputs = {kind: what for kind, what in demo_inputs(content).items() if presets.get(kind) != DEMO}
    if not inputs:
        return
    cures = [
        f"{FIELDS[kind]} ({' or '.join(name for name in preset_names(kind) if name != DEMO)}; {DEMO} keeps the demo's)"
        for kind in inputs
    ]
    message = f"{content['model']['path']} is {' and '.join(inputs.values())}; choose {' and '.join(cures)}"
    if "model" in presets or "model.path" in values:
        raise ParametersError(message)
    get_run_logger().warning(message)


@contextmanager
def overridden(values: Mapping[str, Any]) -> Iterator[None]:
    """Set ``values`` in params.yaml during the block, and save the workspace as an experiment if the block succeeds.

    Afterwards params.yaml is restored, unless another process or a user has changed it in the meantime.

    Raises:
        ParamsError, ParametersError: see ``check``.
    """
    before = PARAMS.read_text()
    if not values:
        check(before, values)
        yield
        return
    check_identity()
    during = with_overrides(before, values)
    check(during, values)
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
