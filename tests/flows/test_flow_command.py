"""What a flow prints in a terminal: what it waits for, the champions, and commands that can be pasted."""

from __future__ import annotations

import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from benchmarks.results import Summary
from flows import command, next_steps

ROWS = [
    {"variant": "full", "model": None, "version": None, "gate": None, "aliases": []},
    {"variant": "rtn-w3a16", "model": "demo-w3a16", "version": 3, "gate": {"passed": True}, "aliases": []},
    {"variant": "tlq-w3a16", "model": "demo-w3a16", "version": 4, "gate": {"passed": True}, "aliases": ["champion"]},
    {"variant": "rtn-w4a8", "model": "demo-w4a8", "version": 2, "gate": {"passed": True}, "aliases": []},
    {"variant": "rtn-w2a16", "model": "demo-w2a16", "version": 1, "gate": {"passed": False}, "aliases": []},
]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with its environment and the results of a run; the shell is in it."""
    (tmp_path / "registry.json").write_text(json.dumps(ROWS))
    Summary(97.52, {}, 24, 0, retention=98.04).save(made(tmp_path / "evaluation/tlq-w3a16") / "summary.json")
    made(tmp_path / ".venv/bin")
    monkeypatch.setattr(next_steps, "ROOT", tmp_path)
    monkeypatch.setattr(next_steps.sys, "executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def commands() -> list[str]:
    """The lines that can be pasted."""
    return [line.strip() for line in next_steps.next_steps() if line.startswith("  ")]


def test_champions_are_named_with_version_and_score() -> None:
    assert next_steps.champions() == [
        "Champions",
        "  demo-w3a16 version 4: tlq-w3a16, score 97.5, 98.0 % of full precision",
        "  demo-w4a8: the champion is an earlier version; rtn-w4a8 passed the gate but is no better",
        "  demo-w2a16: no version of this run passes the gate; registry.json has the reasons",
    ]


def test_the_commands_run_in_the_shell_of_the_demo(root: Path) -> None:
    with temporary_settings({PREFECT_API_URL: None, PREFECT_HOME: root / ".prefect"}):
        lines = commands()
    assert lines == [
        '.venv/bin/python -m webbrowser -t "file://$PWD/report/index.html"',
        ".venv/bin/python -m mlflow ui --backend-store-uri sqlite:///mlflow.db",
        "PREFECT_HOME=.prefect .venv/bin/python -m prefect server start",
        ".venv/bin/python -m dvc metrics show",
        "ls models",
    ]
    modules = [words[words.index("-m") + 1] for line in lines if "-m" in (words := shlex.split(line))]
    assert all(find_spec(module) for module in modules)


def test_servers_that_run_are_named_by_their_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://head:5000")
    with temporary_settings({PREFECT_API_URL: "http://head:4200/api"}):
        lines = next_steps.next_steps()
    assert "Runs and registered models: http://head:5000" in lines
    assert "This run in Prefect: http://head:4200" in lines


def test_from_another_folder_the_first_command_goes_to_the_project(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert commands()[0] == f"cd {root}"


def test_a_flow_says_what_it_waits_for_and_ends_with_champions_and_commands(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def quantize() -> str:
        return "the table"

    monkeypatch.setattr(command.sys, "argv", ["quantize"])
    monkeypatch.setattr(command, "watch_this_process", lambda: None)  # this test's executable does not exist
    command.main(quantize, None)
    shown = capsys.readouterr()
    url = PREFECT_API_URL.value()
    first, second = shown.err.splitlines()
    assert first == f"waiting for Prefect at {url}"
    assert second.startswith("Prefect is there after ")
    assert second.endswith(f" s: {url}/")
    assert shown.out.startswith("\nthe table\n\nChampions\n  demo-w3a16 version 4: ")
    assert shown.out.endswith("Checkpoints\n  ls models\n")


def test_a_temporary_server_is_waited_for_at_most_for_its_timeout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: Any) -> None:
        raise RuntimeError("Timed out while attempting to connect to ephemeral Prefect API server.")

    monkeypatch.setattr(command, "get_client", fails)
    setting = command.PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS
    with (
        temporary_settings({PREFECT_API_URL: None, setting: 120}),
        pytest.raises(SystemExit, match="Set PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS to more than 120"),
    ):
        command.wait_for_prefect()
    assert capsys.readouterr().err == "waiting for a temporary Prefect server (up to 120 s)\n"
