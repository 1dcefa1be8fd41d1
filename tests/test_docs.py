"""README.md and docs/: blocks of shell and Python are run, or only checked if they need something that a test lacks.

A comment before a block names its needs, ``<!-- needs: the hub -->``. Blocks without such a comment run in the order of
their document: shell in a copy of the project whose stages take no time (quick_project), Python in a folder with the
demo model. The names of the tests (``pytest -v``) say which blocks are run, and why others are only checked.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from support.documents import DOCUMENTS, ROOT, Block, blocks, run_shell, words_of
from support.quick_project import QuickProject

PROJECT = ("tlq", "tasks", "flows", "services", "benchmarks", "demo", "bench")

#: Folders whose files documents may name; a path in ``data`` or ``models`` is made by a run.
FOLDERS = (*PROJECT, "docs", "presets", "tests")

#: Programs that are never run here: why.
NEVER_RUN = {"make": "builds an environment", "pip": "changes the environment"}

#: Programs that documents call and that are not in the project's environment.
OUTSIDE = {
    "aws",
    "cd",
    "curl",
    "docker",
    "export",
    "git",
    "kill",
    "llama-server",
    "mkdir",
    "mlx_vlm",
    "nvidia-smi",
    "scp",
    "ssh",
    "unzip",
    "vllm",
}


def why_not_run(block: Block) -> str | None:
    """Why a block is checked and not run; None if it is run here."""
    if block.needs is not None:
        return f"needs {block.needs}"
    if block.document == "docs/reproduce.md":
        return "run by test_dvc"
    if block.language == "python":
        return "run by test_pipeline" if "models:/" in block.code else None
    programs = {program(command) for command in block.commands} & set(NEVER_RUN)
    return f"{min(programs)} {NEVER_RUN[min(programs)]}" if programs else None


def program(command: str) -> str:
    return Path(words_of(command)[1][0]).name


def label(block: Block) -> str:
    return f"{block.place} {why_not_run(block) or 'run'}"


ALL = list(blocks("sh", "python"))


SHELL = [block for block in ALL if block.language == "sh"]
RUNNING = [block for block in SHELL if why_not_run(block) is None]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> QuickProject:
    return QuickProject.made(tmp_path_factory.mktemp("quick"))


@pytest.mark.parametrize("document", dict.fromkeys(block.document for block in RUNNING))
def test_shell_of_a_document_runs(document: str, project: QuickProject) -> None:
    project.run("git", "checkout", "--quiet", ".")
    for block in RUNNING:
        if block.document == document:
            run_shell(block, project)


@pytest.mark.parametrize("block", SHELL, ids=label)
def test_documented_commands_and_options_exist(block: Block) -> None:
    """The program, module or make target exists, has the options used, and reads the variables of this project."""
    for command in block.commands:
        assignments, words = words_of(command)
        for name in assignments:
            assert not name.startswith("TLQ_") or name in code(), f"{block.place}: nothing reads {name}"
        if words:
            check_command(words, block.place)


def check_command(words: list[str], place: str) -> None:
    name, options = Path(words[0]).name, [word.split("=")[0] for word in words if re.match(r"--[a-z]", word)]
    if name == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(words[1:]) <= targets | {word for word in words[1:] if "=" in word}, f"{place}: {words}"
    elif name == "python":
        assert words[1] == "-m", f"{place}: {' '.join(words)}: run modules, not files"
        check_module(words[2], options, place)
    elif name == "tlq":
        check_module("tlq.cli", options, place)
    elif name in OUTSIDE:
        return
    else:
        assert (Path(sys.executable).parent / name).exists(), f"{place}: there is no program {name}"
        text = help_of(name, *(word for word in words[1:] if re.fullmatch(r"[a-z][a-z-]*", word)))
        absent = [option for option in options if option not in text]
        assert not absent, f"{place}: {name} knows no {', '.join(absent)}"


def check_module(module: str, options: list[str], place: str) -> None:
    if module.split(".")[0] in OUTSIDE:
        return
    assert find_spec(module) is not None, f"{place}: there is no module {module}"
    if module.split(".")[0] in PROJECT:
        text = source_of(module)
        text += "".join(
            source_of(each) for each in re.findall(r"^from ((?:tasks|flows)[\w.]+) import .*$", text, re.MULTILINE)
        )
        absent = [option for option in options if f'"{option}"' not in text]
        assert not absent, f"{place}: {module} knows no {', '.join(absent)}"


def source_of(module: str) -> str:
    source = ROOT / f"{module.replace('.', '/')}.py"
    return (source if source.exists() else source.with_suffix("") / "__main__.py").read_text()


@cache
def help_of(name: str, *words: str) -> str:
    """The help text of a program, or of a subcommand if the first words name one."""
    command = [str(Path(sys.executable).parent / name)]
    for count in (3, 2, 1, 0):
        done = subprocess.run([*command, *words[:count], "--help"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout
    raise AssertionError(f"{name} {' '.join(words)} --help fails: {done.stderr[-500:]}")


@cache
def code() -> str:
    """All Python of the project, and the Makefile."""
    files = [path for folder in PROJECT for path in (ROOT / folder).rglob("*.py")]
    return "\n".join(path.read_text() for path in [*files, ROOT / "Makefile"])


PYTHON = [block for block in ALL if block.language == "python" and why_not_run(block) is None]


@pytest.mark.parametrize("document", dict.fromkeys(block.document for block in PYTHON))
def test_python_of_a_document_runs(document: str, tmp_path: Path) -> None:
    """All blocks of a document run in one process, because importing the project takes longer than the blocks."""
    (tmp_path / "data/demo").mkdir(parents=True)
    (tmp_path / "data/demo/model").symlink_to(ROOT / "data/demo/model")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    code = [block.code for block in PYTHON if block.document == document]
    script = f"for code in {code!r}:\n    exec(compile(code, 'block', 'exec'), {{'__name__': 'block'}})\n"
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{document}: {done.stderr[-3000:]}"


@pytest.mark.parametrize("block", list(blocks("yaml", "json")), ids=lambda block: block.place)
def test_parameters_in_examples_exist(block: Block) -> None:
    content = yaml.safe_load(block.code)
    known = yaml.safe_load((ROOT / "params.yaml").read_text())
    if block.language == "yaml":
        assert set(content) <= set(known), f"{block.place}: no such section of params.yaml"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_have_existing_targets(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text())
    absent = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert not absent


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_and_modules_in_documents_exist(path: Path) -> None:
    """Every file or folder of the project in back-ticks, and every module after ``python -m``."""
    text = path.read_text()
    files = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)
    modules = re.findall(r"python -m ([\w.]+\w)", text)
    assert not [name for name in files if not (ROOT / name).exists()]
    assert not [name for name in modules if name.split(".")[0] not in OUTSIDE and find_spec(name) is None]


def test_docs_index_links_every_page() -> None:
    index = ROOT / "docs/README.md"
    linked = set(re.findall(r"\]\(([\w-]+\.md)", index.read_text()))
    pages = {path.name for path in index.parent.glob("*.md")} - {index.name}
    assert linked == pages
    assert not [name for name in pages if "(README.md)" not in (index.parent / name).read_text()]


def messages_of_code() -> set[str]:
    """The texts of the project's errors and warnings, with variable parts as `…`."""
    found = set()
    for folder in PROJECT:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr | ast.Constant):
                    found.add(template(node))
    return found


def template(node: ast.JoinedStr | ast.Constant) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
    return " ".join(re.sub(r"%[-.\d]*[a-z]", "…", text).split())


def documented_messages() -> list[str]:
    """First cells of the tables of docs/troubleshooting.md about this project's own messages."""
    text = (ROOT / "docs/troubleshooting.md").read_text().split("## DVC, Prefect")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def says(message: str, documented: str) -> bool:
    """Whether the parts of a documented message occur in a message of the code, in their order."""
    parts = [re.escape(part.strip()) for part in documented.split("…") if part.strip()]
    return re.search(".*".join(parts), message) is not None


def test_documented_messages_are_those_of_the_code() -> None:
    code_messages = messages_of_code()
    unknown = [each for each in documented_messages() if not any(says(message, each) for message in code_messages)]
    assert documented_messages(), "docs/troubleshooting.md: no table of messages"
    assert not unknown, f"docs/troubleshooting.md: no longer raised: {unknown}"
