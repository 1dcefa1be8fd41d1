"""The project in DVC: complete dependencies, readable tables, and results that a clone can pull."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.documents import blocks, run_shell
from support.quick_project import ROOT, QuickProject

from tasks.config.presets import PRESETS, applied, available, named, pin

STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PACKAGES = ("tlq", "tasks", "benchmarks", "demo")

#: Code that no result depends on: it decides where and how a stage runs, reads its parameters (which are dependencies
#: themselves), stores unfinished work, measures times, or records. Its imports are no dependencies either.
BESIDE_RESULTS = (
    "tasks/cluster/",
    "tasks/config/",
    "tasks/registry/",
    "tasks/command.py",
    "tasks/errors.py",
    "tasks/plan.py",
    "tasks/planning.py",
    "tlq/plan",
    "tlq/runtime/",
)
#: Exceptions: the report shows the result of the gate.
DECIDING = ("tasks/registry/gate.py",)
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
    """Every file of the project that the result of a stage's module can depend on."""
    seen: set[str] = set()
    waiting = [path]
    while waiting:
        file = waiting.pop()
        beside = file.startswith(BESIDE_RESULTS) and file not in DECIDING
        if file in seen or beside or Path(file).name == "__init__.py":
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
def test_dependencies_of_a_stage_exist(stage: str) -> None:
    outs = [
        str(out if isinstance(out, str) else next(iter(out)))
        for each in STAGES.values()
        for out in each.get("outs", [])
    ]
    for dep in STAGES[stage]["deps"]:
        if "${" not in dep:
            assert (ROOT / dep).exists() or any(out.startswith(dep) for out in outs) or dep == "evaluation", dep


@dataclass(frozen=True)
class Reproduced:
    """A quick project after the steps of docs/reproduce.md, and the output of its commands."""

    project: QuickProject
    outputs: dict[str, str]

    def output(self, part: str) -> str:
        """Output of the only command that contains ``part``."""
        (found,) = [output for command, output in self.outputs.items() if part in command]
        return found


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Reproduced:
    project = QuickProject.made(tmp_path_factory.mktemp("quick"))
    outputs: dict[str, str] = {}
    for block in blocks("sh", documents=[ROOT / "docs/reproduce.md"]):
        if block.needs is None:
            outputs |= run_shell(block, project)
    return Reproduced(project, outputs)


@pytest.fixture
def project(reproduced: Reproduced) -> Iterator[QuickProject]:
    """The project as it was last committed."""
    reproduced.project.run("git", "checkout", "--quiet", ".")
    reproduced.project.dvc("checkout")
    yield reproduced.project
    reproduced.project.run("git", "checkout", "--quiet", ".")


def test_only_what_decides_a_result_makes_a_stage_stale(project: QuickProject) -> None:
    for name in ("benchmarks/textvqa/README.md", "tasks/command.py", "tlq/runtime/clock.py"):
        (project.folder / name).write_text("changed\n")
    assert "up to date" in project.dvc("status")
    (project.folder / "tlq/importance/gradients.py").write_text("changed\n")
    stale = set(yaml.safe_load(project.dvc("status", "--json")))
    assert "importance" in stale
    assert not stale & {"demo", "prepare", "baseline"}


def test_another_token_set_makes_only_the_recipes_stale_that_use_it(project: QuickProject) -> None:
    params = project.folder / "params.yaml"
    values = yaml.safe_load(params.read_text())
    values["calibset"]["seed"] = 9
    params.write_text(yaml.safe_dump(values, sort_keys=False))
    project.dvc("repro", "calibset")
    stale = set(yaml.safe_load(project.dvc("status", "--json")))
    assert "calibrate@tlq-w3a16" in stale
    assert "calibrate@rtn-w3a16" not in stale


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


def test_experiments_are_listed_in_one_table(reproduced: Reproduced) -> None:
    """One row per experiment, the parameters that differ, KL and retention of the variants they touch."""
    lines = reproduced.output("exp show").splitlines()
    header, *rows = [line.split() for line in lines if line.strip() and "\u2500" * 10 not in line]
    assert header == [
        "Experiment",
        "evaluation/tlq-w3a16/summary.json:retention",
        "evaluation/tlq-w3a16/summary.json:kl",
        "calibset.budget.tokens_per_layer",
        "calibset.seed",
    ]
    assert rows[0][0] == "main"
    named = {row[2]: row[-4:] for row in rows[1:]}
    assert named["[other-tokens]"][2:] == ["4096", "1"]
    assert sorted(row[2] for row in named.values()) == ["1024", "2048", "4096"]
    assert len({tuple(row[:2]) for row in [rows[0][-4:], *named.values()]}) == 4


def test_metrics_are_a_row_for_each_variant(reproduced: Reproduced) -> None:
    rows = [line.split()[0] for line in reproduced.output("metrics show").splitlines() if line.strip()]
    assert rows == ["Path", *(f"evaluation/{name}/summary.json" for name in ("full", "rtn-w3a16", "tlq-w3a16"))]


def test_the_second_repro_of_a_stage_runs_nothing(reproduced: Reproduced) -> None:
    assert "Running stage" not in reproduced.output("repro calibset")
    assert "Running stage" not in reproduced.output("calibrate@tlq-w3a16")


def test_a_clone_pulls_the_results_and_computes_nothing(project: QuickProject, tmp_path: Path) -> None:
    clone = project.clone(tmp_path / "clone")
    shutil.copytree(project.folder.parent / "storage", tmp_path / "storage")  # the remote is named relative to a clone
    assert "deleted" in clone.dvc("status")
    clone.dvc("pull")
    assert (clone.folder / "models/tlq-w3a16/config.json").is_file()
    assert "up to date" in clone.dvc("status")
    assert "Running stage" not in clone.dvc("repro")
