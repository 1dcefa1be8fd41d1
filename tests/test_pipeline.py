"""The whole pipeline in a fresh copy of the project: flow, stages, registry, report, and what DVC thinks of it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from documents import blocks

ROOT = Path(__file__).resolve().parent.parent
CODE = (
    "benchmarks",
    "demo",
    "flows",
    "tasks",
    "tlq",
    ".dvc/config",
    ".dvcignore",
    ".gitignore",
    "dvc.yaml",
    "params.yaml",
)
VARIANTS = ("rtn-w3a16", "tlq-w3a16")


def run(folder: Path, *command: str) -> str:
    """Output of a command of this Python in ``folder``; fails the test if it fails."""
    environment = {
        **os.environ,
        "PREFECT_HOME": str(folder / ".prefect"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
    }
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def dvc(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with small parameters, after one run of the flow."""
    folder = tmp_path_factory.mktemp("project")
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
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    run(folder, "git", "init", "--quiet", ".")
    run(folder, "git", "add", "--all")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "project")
    table = run(folder, sys.executable, "-m", "flows.quantize")
    (folder / "output.txt").write_text(table)
    return folder


def test_the_flow_prints_every_variant(project: Path) -> None:
    lines = (project / "output.txt").read_text().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("variant "))
    assert [line.split()[0] for line in lines[start + 2 : start + 5]] == ["full", *VARIANTS]


def test_nothing_is_stale_afterwards(project: Path) -> None:
    assert "up to date" in dvc(project, "status")
    assert "Running stage" not in dvc(project, "repro")


def test_metrics_are_one_row_per_variant(project: Path) -> None:
    shown = json.loads(dvc(project, "metrics", "show", "--json"))
    files = shown[""]["data"]
    assert sorted(files) == sorted(f"evaluation/{name}/summary.json" for name in ("full", *VARIANTS))
    assert {"score", "kl", "nll", "retention"} <= set(files["evaluation/tlq-w3a16/summary.json"]["data"])


def test_every_variant_is_registered_with_answers_per_item(project: Path) -> None:
    rows = {row["variant"]: row for row in json.loads((project / "registry.json").read_text())}
    assert {rows[name]["model"] for name in VARIANTS} == {"demo-w3a16"}
    assert {rows[name]["version"] for name in VARIANTS} == {1, 2}
    items = pq.read_table(project / "evaluation/tlq-w3a16/items.parquet").to_pandas()
    assert len(items) == 4 * 6
    assert {"reply", "target", "score", "kl", "nll"} <= set(items.columns)


def test_the_readmes_registered_model_answers(project: Path) -> None:
    (block,) = [block for block in blocks("python", documents=[ROOT / "README.md"]) if "models:/" in block.code]
    question = pq.read_table(project / "data/demo/world/textvqa.parquet").to_pylist()[0]
    (project / "sign.png").write_bytes(question["image"]["bytes"])
    run(project, sys.executable, "-c", block.code)


def test_prefect_has_named_tasks_and_the_table(project: Path) -> None:
    with sqlite3.connect(project / ".prefect/prefect.db") as database:
        names = {name for (name,) in database.execute("select name from task_run")}
        artifacts = {key for (key,) in database.execute("select key from artifact")}
    assert {"prepare", "calibrate@tlq-w3a16", "evaluate@rtn-w3a16", "register"} <= names
    assert "scores" in artifacts


def test_pictures_are_drawn(project: Path) -> None:
    for name in ("scores.png", "tokens.png"):
        assert (project / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_a_page_is_written_and_every_checkpoint_has_its_card(project: Path) -> None:
    page = (project / "report/index.html").read_text()
    commit = run(project, "git", "rev-parse", "HEAD").strip()
    checkpoint = yaml.safe_load((project / "dvc.lock").read_text())["stages"]["calibrate@tlq-w3a16"]["outs"][0]
    for expected in (commit, checkpoint["md5"], "<strong>Demo benchmarks.</strong>"):
        assert expected in page
    for name in VARIANTS:
        card = (project / "models" / name / "README.md").read_text()
        assert card == (project / "report/cards" / f"{name}.md").read_text()


def test_one_recipes_choice_makes_only_its_own_stages_stale(project: Path) -> None:
    path = project / "params.yaml"
    before = path.read_text()
    params = yaml.safe_load(before)
    params["recipes"]["tlq"] = {"equalization": {"points": 10}}
    path.write_text(yaml.safe_dump(params))
    stale = json.loads(dvc(project, "status", "--json"))
    path.write_text(before)
    assert set(stale) == {"calibrate@tlq-w3a16"}


def test_a_second_run_gives_the_same_tokens_and_codes(project: Path) -> None:
    def kept() -> list[bytes]:
        files = [
            project / "data/calibset/tokens.parquet",
            *sorted((project / "models/tlq-w3a16").glob("*.safetensors")),
        ]
        assert len(files) > 2
        return [file.read_bytes() for file in files]

    before = kept()
    for stage in ("importance", "calibset", "calibrate@tlq-w3a16"):
        dvc(project, "repro", "--single-item", "--force", stage)
    assert kept() == before
