"""ChartQA: relaxed accuracy. Numbers must be within 5 %, other text must be equal without case."""

from collections.abc import Mapping, Sequence
from typing import Any

PROMPT_SUFFIX = "\nAnswer the question with a single word."
TOLERANCE = 0.05


def prompt(doc: Mapping[str, Any], suffix: str = PROMPT_SUFFIX) -> str:
    question = doc["question"].replace("<image>", "image")
    return f"<image>{question}{suffix}"


def target(doc: Mapping[str, Any]) -> str:
    return doc["answer"]


def to_number(text: str) -> float | None:
    """The number that a text states, or None. Percent signs at the end divide by 100, after a blank too ("5 %")."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def is_correct(reply: str, answer: str) -> bool:
    """Relaxed correctness (Masry et al. 2022, section 5.1).

    A target of exactly 0 has no 5 % range, so it is compared by lower-case equality like text.
    """
    reply = reply.strip()
    number, wanted = to_number(reply), to_number(answer)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= TOLERANCE
    return reply.lower() == answer.lower()


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results`: accuracy, overall and for the half (human or augmented) of the question."""
    correct = float(is_correct(results[0], doc["answer"]))
    half = "human" if doc["type"].startswith("human") else "augmented"
    return {"relaxed_accuracy": correct, half: correct}
