"""What DVC makes of the project: dependencies that are whole, tables one can read, results that travel."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from quick_project import ROOT, QuickProject

from tasks.preset import PRESETS, applied, available, named, pin

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PACKAGES = ("tlq", "tasks", "benchmarks", "demo")

#: Code that no result depends on: it decides where and how a stage runs, reads its parameters (which are dependencies
#: themselves), keeps what is unfinished, takes times. What it imports counts no more than itself.
BESIDE_RESULTS = {
    "tasks/cli.py",
    "tasks/launch.py",
    "tasks/params.py",
    "tlq/activations.py",
    "tlq/clock.py",
    "tlq/files.py",
    "tlq/plan.py",
    "tlq/state.py",
}
#: Formats of the files between stages: a dependency, but the types it imports are not.
FORMATS = "tasks/files.py"


def module_file(name: str) -> str | None:
    """Path of a project module, None for anything else."""
    if name.split(".")[0] not in PACKAGES:
        return None
    places = (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py")
    return next((place for place in places if (ROOT / place).is_file()), None)


def imported(path: str) -> Iterator[str]:
    """Project files that a file imports; of ``tasks.files``, names of places (in capitals) are none."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            of_module = [alias.name for alias in node.names]
            if node.module != "tasks.files" or not all(name.isupper() for name in of_module):
                names = [node.module, *(f"{node.module}.{name}" for name in of_module)]
        yield from filter(None, map(module_file, names))


def code_behind(path: str) -> set[str]:
    """Every file of the project that what a stage's module computes can depend on."""
    seen: set[str] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        if file in seen or file in BESIDE_RESULTS or Path(file).name == "__init__.py":
            continue
        seen.add(file)
        if file != FORMATS:
            waiting += imported(file)
    return seen


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "fetch"])
def test_a_stage_depends_on_all_code_that_decides_its_result(stage: str) -> None:
    module = STAGES[stage]["cmd"].split()[2].replace(".", "/")
    start = f"{module}.py" if (ROOT / f"{module}.py").is_file() else f"{module}/__main__.py"
    declared = STAGES[stage]["deps"]
    missing = {
        file for file in code_behind(start) if not any(file == dep or file.startswith(f"{dep}/") for dep in declared)
    }
    assert not missing, f"add to the deps of {stage} in dvc.yaml, or to BESIDE_RESULTS here: {sorted(missing)}"


@pytest.mark.parametrize("stage", [name for name in STAGES if name != "fetch"])
def test_what_a_stage_depends_on_is_there(stage: str) -> None:
    outs = [
        str(out if isinstance(out, str) else next(iter(out)))
        for each in STAGES.values()
        for out in each.get("outs", [])
    ]
    for dep in STAGES[stage]["deps"]:
        if "${" not in dep:
            assert (ROOT / dep).exists() or any(out.startswith(dep) for out in outs) or dep == "evaluation", dep


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> QuickProject:
    """A quick project that has run once, its lock file committed."""
    project = QuickProject.made(tmp_path_factory.mktemp("quick"))
    project.dvc("repro")
    project.commit("run")
    return project


def test_only_what_decides_a_result_makes_a_stage_stale(project: QuickProject) -> None:
    for name in ("benchmarks/textvqa/README.md", "tasks/cli.py", "tlq/clock.py"):
        (project.folder / name).write_text("changed\n")
    assert "up to date" in project.dvc("status")
    (project.folder / "tlq/scoring.py").write_text("changed\n")
    stale = set(yaml.safe_load(project.dvc("status", "--json")))
    project.run("git", "checkout", "--quiet", ".")
    assert "importance" in stale
    assert not stale & {"demo", "prepare", "calibset", "baseline"}


def test_presets_put_downloads_before_the_stages_that_need_them(tmp_path: Path) -> None:
    project = QuickProject.made(tmp_path)
    chosen = named(["qwen2.5-vl-7b", "textvqa-train", "text-benchmarks"], available(ROOT / PRESETS))
    fetched = {preset.kind: pin(preset, {}, lambda repo, kind: "f" * 40) for preset in chosen}
    params = project.folder / "params.yaml"
    params.write_text(applied(params.read_text(), chosen, fetched))
    graph = project.dvc("dag", "--mermaid")
    name_of = dict(re.findall(r'(node\d+)\["(.*?)"\]', graph))
    edges = {(name_of[first], name_of[second]) for first, second in re.findall(r"(node\d+)-->(node\d+)", graph)}
    assert ("fetch@textvqa-train", "prepare") in edges
    for stage in ("importance", "calibrate@tlq-w3a16", "baseline"):
        assert ("fetch@qwen2.5-vl-7b", stage) in edges
    for benchmark in ("textvqa", "chartqa", "mmmu", "ocrbench"):
        assert (f"fetch@{benchmark}", "evaluate@tlq-w3a16") in edges
    project.dvc("repro", "importance")
    assert "up to date" in project.dvc("status", "importance", "fetch@qwen2.5-vl-7b", "prepare")


TABLE = re.search(r"exp show (--only-changed.*?)\n", (ROOT / "docs/reproduce.md").read_text())


def test_experiments_are_a_table_one_can_read(project: QuickProject) -> None:
    """The command of docs/reproduce.md: one row per experiment, what was changed, KL and retention of the variants."""
    project.dvc("exp", "run", "--name", "other-seed", "--set-param", "calibset.seed=1", "evaluate@tlq-w3a16")
    project.run("git", "checkout", "--quiet", ".")
    project.dvc("exp", "run", "--queue", "--name", "fewer", "-S", "calibset.budget.tokens_per_layer=64", "evaluate")
    project.dvc("exp", "run", "--run-all")
    assert TABLE is not None
    options = [option.strip("'") for option in re.findall(r"'[^']*'|\S+", TABLE.group(1))]
    lines = project.dvc("exp", "show", "--md", *options).splitlines()
    columns = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert columns == [
        "Experiment",
        "evaluation/tlq-w3a16/summary.json:retention",
        "evaluation/tlq-w3a16/summary.json:kl",
        "calibset.budget.tokens_per_layer",
        "calibset.seed",
    ]
    rows = {line.split("|")[1].strip().split("[")[-1].rstrip("]"): line for line in lines[2:] if line}
    assert list(rows) == ["main", "fewer", "other-seed"]
    assert rows["fewer"].split("|")[4].strip() == "64"
    assert len({line.split("|")[3] for line in rows.values()}) == 3


def test_a_clone_pulls_the_results_and_computes_nothing(project: QuickProject, tmp_path: Path) -> None:
    project.dvc("remote", "add", "--default", "storage", str(tmp_path / "storage"))
    project.commit("remote")
    project.dvc("push")
    clone = project.clone(tmp_path / "clone")
    clone.dvc("pull")
    assert (clone.folder / "models/tlq-w3a16/config.json").is_file()
    assert "up to date" in clone.dvc("status")
    assert "Running stage" not in clone.dvc("repro")
