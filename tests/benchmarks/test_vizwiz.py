"""VizWiz: its prompt, and TextVQA's scorer reached through its YAML."""

from typing import Any

import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from benchmarks.harness import FOLDER
from benchmarks.vizwiz import prompt


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return load_yaml(FOLDER / "vizwiz" / "vizwiz_vlm.yaml")


CASES = [
    ("unanswerable", ["unanswerable"] * 10, 1.0),
    ("Unanswerable", ["unanswerable"] * 10, 1.0),
    ("Unanswerable.", ["unanswerable"] * 10, 1.0),
    ("unanswerable", ["unanswerable"] * 4 + ["cat"] * 6, 1.0),
    ("unanswerable", ["unanswerable"] * 3 + ["cat"] * 7, 0.9),
    ("unanswerable", ["unanswerable"] * 2 + ["cat"] * 8, 0.6),
    ("unanswerable", ["unanswerable"] + ["cat"] * 9, 0.3),
    ("unanswerable", ["cat"] * 10, 0.0),
    ("unsuitable", ["unanswerable"] * 10, 0.0),
    ("", ["unanswerable"] * 10, 0.0),
    ("unanswerable", [], 0.0),
    ("", [], 0.0),
    ("unanswerable", None, 0.0),
    ("coca cola", ["coca-cola"] * 10, 1.0),
    ("Coca Cola", ["coca cola"] * 10, 1.0),
    ("the coke", ["coke"] * 10, 1.0),
    ("2", ["two"] * 10, 1.0),
    ("no", ["none"] * 10, 0.0),
    ("0", ["none"] * 10, 1.0),
    ("1,5", ["15"] * 10, 1.0),
    ("3.5 oz", ["3.5 oz"] * 10, 1.0),
    ("35 oz", ["3.5 oz"] * 10, 0.0),
    ("isnt", ["isn't"] * 10, 1.0),
    ("it is a can", ["it is can"] * 10, 1.0),
    ("can?", ["can"] * 10, 1.0),
    ("can/bottle", ["can bottle"] * 10, 1.0),
    ("can / bottle", ["can bottle"] * 10, 1.0),
    ("can/ bottle", ["can bottle"] * 10, 1.0),
    ("$1", ["1"] * 10, 0.0),
    ("green\nblue", ["green blue"] * 10, 1.0),
    ("x" * 1_000_000, ["x"] * 10, 0.0),
]


@pytest.mark.parametrize(("reply", "answers", "accuracy"), CASES)
def test_score(config: dict[str, Any], reply: str, answers: list[str] | None, accuracy: float) -> None:
    scores = config["process_results"]({"answers": answers}, [reply])
    assert scores["vqa_accuracy"] == pytest.approx(accuracy)


def test_prompt_and_target(config: dict[str, Any]) -> None:
    doc = {"question": "what is THIS?", "answers": []}
    assert (
        config["doc_to_text"](doc)
        == prompt.prompt(doc)
        == (
            "<image>What is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
            "\nAnswer the question using a single word or phrase."
        )
    )
    assert config["doc_to_target"](doc) == ""
    assert (config["dataset_path"], config["test_split"]) == ("lmms-lab/VizWiz-VQA", "val")
