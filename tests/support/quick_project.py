"""A copy of the project whose stages take no time, to test the graph and the parameters with DVC."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("benchmarks", "demo", "presets", "tasks", "tlq", ".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml")


class QuickProject:
    """A separate git repository with the project's code and graph, and a quick `python` (stand_in_stages).

    Attributes:
        folder: folder of the repository.
        tools: folder with the quick `python`, outside the project.
    """

    def __init__(self, folder: Path, tools: Path) -> None:
        self.folder, self.tools = folder, tools

    @classmethod
    def made(cls, place: Path) -> QuickProject:
        """Create a committed project with the recipes rtn and tlq at one scheme; no stage has run."""
        project = cls(place / "project", place / "tools")
        for name in COPIED:
            target = project.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(ROOT / name, target)
        (project.folder / "data/demo/model").mkdir(parents=True)
        (project.folder / "data/demo/model/config.json").write_text("{}")
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params["variants"] = {"recipes": ["rtn", "tlq"], "schemes": ["w3a16"]}
        (project.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        project.tools.mkdir()
        stages = Path(__file__).with_name("stand_in_stages.py")
        quick = project.tools / "python"
        quick.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{stages}" "$@"\n')
        quick.chmod(0o755)
        project.run("git", "init", "--quiet", "--initial-branch", "main", ".")
        project.commit("project")
        return project

    def clone(self, folder: Path) -> QuickProject:
        self.run("git", "clone", "--quiet", str(self.folder), str(folder))
        return QuickProject(folder, self.tools)

    def commit(self, message: str) -> None:
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)

    def dvc(self, *arguments: str, **variables: str) -> str:
        return self.run(sys.executable, "-m", "dvc", *arguments, **variables)

    def wait_for_queue(self, seconds: float = 600) -> None:
        """Wait until no queued experiment is left; experiments run in the background."""
        until = time.monotonic() + seconds
        while re.search(r"\b(Queued|Running)\b", status := self.dvc("queue", "status")):
            assert time.monotonic() < until, f"not done after {seconds} s:\n{status}"
            time.sleep(1)
        assert "Failed" not in status, status

    def run(self, *command: str, **variables: str) -> str:
        """Output of a command in the project, with more environment variables; fails the test if it fails."""
        identity = {
            f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
        }
        path = os.pathsep.join([str(self.tools), str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {**os.environ, **identity, "PATH": path, **variables}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout
