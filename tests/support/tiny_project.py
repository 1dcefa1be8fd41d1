"""A copy of the project with parameters so small that the whole pipeline runs in a test, and its servers."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
CODE = (
    "benchmarks",
    "demo",
    "flows",
    "presets",
    "services",
    "tasks",
    "tlq",
    ".dvc/config",
    ".dvcignore",
    ".gitignore",
    "dvc.yaml",
    "params.yaml",
    "prefect.yaml",
)
VARIANTS = ("rtn-w3a16", "tlq-w3a16")

#: Variables that name ports and servers; the tests do not use those of the user's environment.
_FOREIGN = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "TLQ_DATABASE_URL", "TLQ_PARALLEL")


def make_project(folder: Path) -> Path:
    """Copy code, demo model and small parameters to ``folder``, and commit them to a new git repository."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in CODE:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copyfile(source, target)
    shutil.copytree(ROOT / "data/demo/model", folder / "data/demo/model")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["prepare"]["samples"] = params["importance"]["samples"] = 16
    params["calibset"]["budget"]["tokens_per_layer"] = 512
    params["variants"] = {"recipes": ["rtn", "tlq"], "schemes": ["w3a16"]}
    params["evaluate"]["limit"] = 6
    # So few items say nothing about quality: whatever is made passes the gate.
    params["register"].update(min_retention=0, max_flips=100, floors={}, min_items=1)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    run(folder, "git", "init", "--quiet", ".")
    run(folder, "git", "config", "user.name", "t")
    run(folder, "git", "config", "user.email", "t@localhost")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "--quiet", "-m", "project")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """This process's environment, for a command that uses the code and the Prefect home of ``folder``."""
    own = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    return own | {
        "PREFECT_HOME": str(folder / ".prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
    }


def run(folder: Path, *command: str) -> str:
    """Output of a command in ``folder``; fails the test if it fails."""
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def dvc(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Services:
    """`python -m services` of a project, and its addresses."""

    def __init__(self, folder: Path, process: subprocess.Popen[str], ports: tuple[int, int]) -> None:
        self.folder = folder
        self.process = process
        self.prefect = f"http://127.0.0.1:{ports[0]}"
        self.mlflow = f"http://127.0.0.1:{ports[1]}"

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        """Send SIGTERM; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=120)


@contextmanager
def serving(folder: Path, extra: Mapping[str, str] | None = None, what: str = "serve") -> Iterator[Services]:
    """The services of ``folder`` on free ports, stopped afterwards."""
    ports = free_port(), free_port()
    command = [sys.executable, "-m", "services", what]
    command += ["--prefect-port", str(ports[0]), "--mlflow-port", str(ports[1])]
    log = folder / "services.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env={**environment(folder), **(extra or {})}, stdout=stream, stderr=stream, text=True
        )
    services = Services(folder, process, ports)
    try:
        _wait_until_ready(process, log)
        yield services
    finally:
        services.stop()


def _wait_until_ready(process: subprocess.Popen[str], log: Path, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while "Ctrl-C stops everything" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, f"not ready after {seconds} s:\n{log.read_text()}"
        time.sleep(0.2)
