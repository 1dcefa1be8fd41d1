"""The YAMLs and scorers alone, as `lm_eval --include_path` uses them: no other part of the project."""

import ast
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from support.benchmark_rows import ROWS, write_rows

from benchmarks.harness import FOLDER

SCORERS = sorted(path for path in FOLDER.glob("*/*.py"))


class Oracle(LM):
    """Replies with the reference answer, after checking that images and placeholders agree."""

    MULTIMODAL = True

    def __init__(self, targets: dict[str, Any]) -> None:
        super().__init__()
        self._targets = targets

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            prompt, generation, extra = request.args
            assert prompt.count("<image>") == len(extra["visual"]) > 0
            assert all(image.size for image in extra["visual"])
            assert generation["do_sample"] is False
        return [self._targets[str(request.task_name)](request.doc) for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


EXPECTED = {
    "textvqa": {"vqa_accuracy": 1, "vqa_accuracy_repaired": 1},
    "vizwiz": {"vqa_accuracy": 1},
    "mmmu": {"accuracy": 1, "open": 1, "multiple_choice": 1, "art_and_design": 1, "Art": 1, "unparsed": 0},
    "chartqa": {"relaxed_accuracy": 1, "human": 1, "augmented": 1},
    "ocrbench": {
        "accuracy": 1,
        "points": 2,
        "accuracy_lmms_eval": 1,
        "document_vqa": 1,
        "handwritten_mathematics": 1,
    },
    "seedbench2plus": {"accuracy": 1, "chart": 1, "map": 1, "web": 1, "unparsed": 0},
}


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A copy of the benchmarks folder with only YAMLs and scorers."""
    folder = tmp_path / "alone"
    for path in [*FOLDER.glob("*/*.yaml"), *SCORERS]:
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.parent.name)
    return folder


@pytest.mark.parametrize("name", list(ROWS))
def test_each_task_on_a_local_parquet(name: str, alone: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.parquet", ROWS[name])
    (alone / "local.yaml").write_text(
        f"include: {name}/{name}_vlm.yaml\ntask: local\ndataset_path: parquet\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    )
    manager = TaskManager(include_path=str(alone), include_defaults=False)
    task = manager.load("local")["tasks"]["local"]
    outcome = simple_evaluate(
        Oracle({"local": task.doc_to_target}), tasks=["local"], task_manager=manager, bootstrap_iters=0
    )
    assert outcome is not None
    scores = {metric.split(",")[0]: value for metric, value in outcome["results"]["local"].items()}
    assert scores | EXPECTED[name] == scores


@pytest.mark.parametrize("path", SCORERS, ids=lambda path: path.parent.name)
def test_scorers_import_nothing_of_the_project(path: Path) -> None:
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


def test_task_names_sources_and_versions() -> None:
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    assert set(manager.all_tasks) == {f"{name}_vlm" for name in ROWS} | {
        f"demo_{name}" for name in ("textvqa", "chartqa", "ocrbench", "mmmu")
    }
