"""Blocks of code in README.md and docs/, and running them."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.quick_project import QuickProject

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>.+?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        document: path from the project's top folder.
        line: number of its first line of code, from 1.
        needs: a need that a test cannot meet, so that the block is only checked; None if the block is run.
    """

    document: str
    line: int
    language: str
    code: str
    needs: str | None

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Lines of shell, continued ones joined, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def blocks(*languages: str, documents: list[Path] = DOCUMENTS) -> Iterator[Block]:
    for path in documents:
        text = path.read_text()
        for found in _BLOCK.finditer(text):
            if found["language"] in languages:
                line = text.count("\n", 0, found.start("code")) + 1
                name = str(path.relative_to(ROOT))
                yield Block(name, line, found["language"], found["code"], found["needs"])


def words_of(command: str) -> tuple[dict[str, str], list[str]]:
    """A simple command as its assignments and its words, redirections and a background mark left out."""
    words = [word for word in shlex.split(command, comments=True) if word != "&" and not re.match(r"\d?[<>]", word)]
    assignments = {}
    while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0], re.DOTALL):
        name, _, value = words.pop(0).partition("=")
        assignments[name] = value
    return assignments, words


def run_shell(block: Block, project: QuickProject) -> dict[str, str]:
    """Run the commands of a block in a project; returns the output of each.

    Modules of this project run in this process, because their imports take seconds.
    """
    outputs = {}
    for command in block.commands:
        assignments, words = words_of(command)
        program = Path(words[0]).name
        if program == "python":
            outputs[command] = _run_module(words[2], words[3:], project.folder)
        elif program == "tlq":
            outputs[command] = _run_module("tlq", words[1:], project.folder)
        elif program == "dvc":
            outputs[command] = project.dvc(*words[1:], **assignments)
            if words[1:3] == ["queue", "start"]:
                project.wait_for_queue()
        else:
            outputs[command] = project.run(*words, **assignments)
    return outputs


def _run_module(module: str, arguments: list[str], folder: Path) -> str:
    """Output of ``python -m module`` in ``folder``."""
    printed = io.StringIO()
    status: object = None
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [module, *arguments])
        patch.delitem(sys.modules, module, raising=False)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stopped:
            status = stopped.code
    assert not status, f"{module} {' '.join(arguments)}: exit status {status}"
    return printed.getvalue()
