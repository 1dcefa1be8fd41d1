"""The order of packages and folders: a module imports only from its own folder and from lower ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Rooms of a package from the ground floor up. A module may import from its own room and from rooms named before it.
FLOORS: dict[str, tuple[str, ...]] = {
    "tlq": (
        "runtime",
        "parallel",
        "inputs",
        "samples",
        "models",
        "quantization",
        "importance",
        "recipes",
        "results",
        "calibration",
        "plan",
        "export",
        "job",
        "data",
        "api",
        "cli",
    ),
    "tasks": (
        "config",
        "cluster",
        "errors",
        "command",
        "files",
        "planning",
        "registry",
        "report",
        "stages",
        "plan",
        "preset",
        "reproduce",
    ),
}

#: What may import a package: the library imports none of the pipeline's packages.
BELOW: dict[str, tuple[str, ...]] = {
    "tlq": (),
    "benchmarks": ("tlq",),
    "demo": ("tlq",),
    "tasks": ("tlq", "benchmarks"),
    "services": ("tlq", "tasks"),
    "flows": ("tlq", "tasks", "benchmarks", "services"),
}


def imports(file: Path) -> Iterator[str]:
    """Modules that a file imports, by their full names; ``from package import module`` names the module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if (ROOT / node.module.replace(".", "/")).is_dir():
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def sources(package: str) -> list[Path]:
    return sorted(file for file in (ROOT / package).rglob("*.py") if file != ROOT / package / "__init__.py")


def room_of(module: str) -> str:
    """The second part of a module's name; empty for a name that the package itself offers."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return room if any((ROOT / package / name).exists() for name in (room, f"{room}.py")) else ""


@pytest.mark.parametrize("package", FLOORS)
def test_a_room_imports_only_from_rooms_below_it(package: str) -> None:
    floors = FLOORS[package]
    upward = []
    for file in sources(package):
        own = room_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
        if own.startswith("__"):
            continue
        assert own in floors, f"{file.relative_to(ROOT)}: name its room in FLOORS"
        for module in imports(file):
            if module.split(".")[0] == package and room_of(module) not in ("", own):
                target = room_of(module)
                if target not in floors or floors.index(target) > floors.index(own):
                    upward.append(f"{file.relative_to(ROOT)} imports {module}")
    assert not upward


@pytest.mark.parametrize("package", BELOW)
def test_a_package_imports_only_from_packages_below_it(package: str) -> None:
    upward = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in sources(package)
        for module in imports(file)
        if module.split(".")[0] in BELOW and module.split(".")[0] not in (package, *BELOW[package])
    ]
    assert not upward


@pytest.mark.parametrize("package", BELOW)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    """Imports inside functions and those for types alone count too."""
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in sources(package)}
    graph = {name: {module for module in imported(file) if module in modules} for name, file in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def imported(file: Path) -> Iterator[str]:
    """As ``imports``; the module itself where a name of a module is imported from it."""
    for module in imports(file):
        yield module
        yield module.rpartition(".")[0]
