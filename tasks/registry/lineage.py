"""Record where results come from: git commit, package versions, DVC hashes, params."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from tasks.config.params import PARAMS

LOCK = Path("dvc.lock")
PACKAGES = ("torch", "transformers", "compressed-tensors", "accelerate", "lm-eval", "datasets", "dvc")
#: Sections of params.yaml that the report shows; dvc.yaml declares them as its parameters.
SECTIONS = ("model", "prepare", "importance", "calibset", "calibrate", "variants", "evaluate", "report")


@dataclass(frozen=True)
class Output:
    """An output of a stage, read from dvc.lock."""

    stage: str
    path: str
    md5: str
    size: int | None


@dataclass(frozen=True)
class Lineage:
    """Where the results of a report come from.

    Attributes:
        commit: git commit; None outside a repository.
        changed: tracked files that differ from the commit; dvc.lock and metrics files differ while a pipeline runs.
        versions: versions of Python and of ``PACKAGES`` in the process that made the report.
        outputs: outputs of stages, from dvc.lock; empty without that file.
        params: the sections of params.yaml that the report depends on, as YAML.
    """

    commit: str | None
    changed: list[str]
    versions: dict[str, str]
    outputs: list[Output]
    params: str


def read_lineage(variants: Sequence[str]) -> Lineage:
    """The lineage of these variants; stages of other variants are left out."""
    return Lineage(
        commit=_git("rev-parse", "HEAD"),
        changed=changed_files(),
        versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        outputs=locked_outputs(variants),
        params=_params(),
    )


def changed_files() -> list[str]:
    """Tracked files that differ from HEAD."""
    return sorted((_git("diff", "--name-only", "HEAD") or "").splitlines())


def locked_outputs(variants: Sequence[str], lock: Path = LOCK) -> list[Output]:
    """Outputs in dvc.lock of the stages that a report on ``variants`` is made from."""
    stages: dict[str, Any] = yaml.safe_load(lock.read_text())["stages"] if lock.exists() else {}
    return [
        Output(stage, out["path"], out["md5"], out.get("size"))
        for stage, entry in stages.items()
        if stage not in ("register", "report") and ("@" not in stage or stage.split("@", 1)[1] in variants)
        for out in entry.get("outs", [])
    ]


def _params() -> str:
    content = yaml.safe_load(PARAMS.read_text())
    return yaml.safe_dump({name: content[name] for name in SECTIONS if name in content}, sort_keys=False)


def _git(*arguments: str) -> str | None:
    """Output of a git command; None if the command fails, as outside a repository or before the first commit."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
