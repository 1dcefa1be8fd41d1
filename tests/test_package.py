"""The wheel: its content and requirements, and that it quantizes a checkpoint without the rest of the project.

It is installed twice: beside this environment's packages, and (`make soak`) with its requirements from pip's index.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.slow import SLOW
from support.tiny import png

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "tlq"
PIPELINE = ("tasks", "flows", "services", "benchmarks", "demo", "bench")

#: Imported only where a user has them: llm-compressor in an environment of its own (`make peers-env`), Triton with
#: torch's builds for GPUs, vLLM for its backend.
ELSEWHERE = {"llmcompressor", "triton", "vllm"}

METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@cache
def distributions() -> Mapping[str, list[str]]:
    """Names of the distributions that hold a top-level module."""
    return packages_distributions()


def names_of(requirements: list[str]) -> set[str]:
    """Distributions that requirements name, including those of this project's extras."""
    names: set[str] = set()
    for requirement in requirements:
        match = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", requirement)
        assert match is not None, requirement
        if match[1] == "tlq":
            for extra in match[2].split(","):
                names |= names_of(METADATA["optional-dependencies"][extra])
        else:
            names.add(canonicalize_name(match[1]))
    return names


def imports_of(folder: str) -> dict[str, str]:
    """Top-level modules, not of Python and not of this project, and a file that imports each."""
    own = {LIBRARY, *PIPELINE, *ELSEWHERE, "tests", "support", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    imported = {}
    for path in (ROOT / folder).rglob("*.py"):
        if path.match("bench/engines/in_*.py"):  # it runs in the environment of an engine
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules = [node.module]
            for name in {module.split(".")[0] for module in modules} - own - sys.stdlib_module_names:
                imported[name] = str(path.relative_to(ROOT))
    return imported


@pytest.mark.parametrize("folder", [LIBRARY, *PIPELINE, "tests"])
def test_every_import_is_declared(folder: str) -> None:
    extras = METADATA["optional-dependencies"]
    declared = names_of(METADATA["dependencies"])
    declared |= names_of([*extras["parquet"], *extras["gguf"]] if folder == LIBRARY else extras["pipeline"])
    if folder == "tests":
        declared |= names_of(extras["dev"])
    undeclared = {
        f"{path}: {module}"
        for module, path in imports_of(folder).items()
        if not declared & {canonicalize_name(name) for name in distributions().get(module, [module])}
    }
    assert not undeclared


def locked() -> list[str]:
    """``name==version`` of every release of the locks."""
    texts = [(ROOT / name).read_text() for name in ("requirements.lock", "requirements-torch.lock")]
    return re.findall(r"^[\w.-]+==\S+", "\n".join(texts), flags=re.MULTILINE)


def test_the_lock_holds_every_requirement() -> None:
    required = names_of(METADATA["dependencies"]) | names_of(METADATA["optional-dependencies"]["dev"])
    assert required <= {canonicalize_name(line.split("==")[0]) for line in locked()}


@pytest.mark.parametrize("python", ["3.11.2", "3.11.9", "3.12.1", "3.13.0"])
def test_the_lock_holds_what_installed_packages_need_on_any_python(python: str) -> None:
    """On Linux; not what torch's own builds need, which are installed with it."""
    here = {"python_version": ".".join(python.split(".")[:2]), "python_full_version": python, "extra": ""}

    def applies(requirement: Requirement) -> bool:
        return requirement.marker is None or requirement.marker.evaluate(here)

    entries = (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines()
    releases = [Requirement(entry.split(" --hash")[0]) for entry in entries]
    held = {canonicalize_name(release.name) for release in releases if applies(release)}
    lacking = set()
    for name in held:
        with suppress(PackageNotFoundError):  # it is for another release of Python
            needed = map(Requirement, requires(name) or ())
            lacking |= {each.name for each in needed if applies(each) and canonicalize_name(each.name) not in held}
    assert lacking <= {"torch"}


def test_every_release_of_the_lock_has_hashes() -> None:
    for entry in (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines():
        assert re.search(r" --hash=sha256:[0-9a-f]{64}", entry), entry


def test_the_set_up_installs_nothing_without_its_hash() -> None:
    """Except torch: which build is right depends on the machine."""
    lines = [
        line
        for line in (ROOT / "Makefile").read_text().splitlines()
        if "requirements" in line and "pip install" in line
    ]
    assert [("--require-hashes" in line, "torch" in line) for line in lines if ".venv-peers" not in line] == [
        (True, False),
        (False, True),
    ]


def test_places_of_slow_tests_exist() -> None:
    assert not [place for place in SLOW if not (ROOT / "tests" / place).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git tracks, with this environment's setuptools: needs no network."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--", "tlq", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (built,) = (source / "dist").glob("tlq-*.whl")
    return built


def test_the_wheel_holds_the_library_with_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"tlq", f"tlq-{METADATA['version']}.dist-info"}
    assert {"tlq/py.typed", "tlq/templates/card.md.j2"} <= names
    listed = subprocess.run(["git", "ls-files", "tlq"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name for name in listed.stdout.split() if (ROOT / name).exists()} <= names


@pytest.fixture(scope="module", params=["lent", pytest.param("index", marks=pytest.mark.soak)])
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The ``bin`` of an environment with the wheel and its requirements, lent from this one or from pip's index."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--no-compile"]
    if request.param == "lent":
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "lent.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        pip += ["--no-deps", "--force-reinstall"]
    else:
        (folder / "constraints.txt").write_text("\n".join(locked()))
        pip += ["--constraint", "constraints.txt"]
    done = subprocess.run([*pip, str(wheel)], cwd=folder, env=clean(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "bin"


def clean() -> dict[str, str]:
    """This environment without paths to the checkout and without the hub."""
    names = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**names, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def test_the_installed_command_quantizes_outside_of_the_checkout(
    installed: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, str]] = []
    for index in range(4):
        (tmp_path / f"{index}.png").write_bytes(png(index))
        rows.append({"image": f"{index}.png", "question": "Which?", "answer": f"number {index}"})
    (tmp_path / "samples.json").write_text(json.dumps(rows))
    command = [str(installed / "tlq"), "quantize", str(tiny_checkpoint), "--data", "samples.json", "--scheme", "w4a8"]
    done = subprocess.run(
        [*command, "--out", "out", "--tokens", "64", "--device", "cpu"],
        cwd=tmp_path,
        env=clean(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "out\n"
    code = (
        "import sys, tlq; from pathlib import Path; assert tlq.load_model('out').config.quantization_config; "
        "assert Path(sys.prefix) in Path(tlq.__file__).parents"
    )
    subprocess.run([str(installed / "python"), "-c", code], cwd=tmp_path, env=clean(), check=True)
