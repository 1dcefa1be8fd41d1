"""SEED-Bench-2-Plus: text-rich images (charts, maps, web pages) with four options; the reply's first letter counts."""

from collections.abc import Mapping, Sequence
from typing import Any

LETTERS = "ABCD"
PROMPT_SUFFIX = "\nAnswer with the option's letter from the given choices directly."


def prompt(doc: Mapping[str, Any], suffix: str = PROMPT_SUFFIX) -> str:
    lines = [doc["question"]] + [f"{letter}. {doc[f'choice_{letter}']}" for letter in LETTERS]
    text = "\n".join(lines).replace("<image>", "image").replace("<img>", "image")
    return f"<image>{text}{suffix}"


def target(doc: Mapping[str, Any]) -> str:
    return doc["answer"].strip()


def choices(doc: Mapping[str, Any]) -> list[str]:
    """What the model chooses between."""
    return list(LETTERS)


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results`: accuracy, overall and by image type; and whether no option's letter came first."""
    letter = results[0].strip()[:1].upper()
    correct = float(letter != "" and letter == doc["answer"].strip().upper())
    image_type = doc["question_image_type"].strip().lower()
    return {
        "accuracy": correct,
        image_type: correct,
        "unparsed": float(letter == "" or letter not in LETTERS),
    }
