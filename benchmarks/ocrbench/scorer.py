"""OCRBench: a reply that contains a ground truth scores one point. It has a thousand questions of ten types."""

from collections.abc import Mapping, Sequence
from typing import Any

FORMULA_DATASET = "HME100k"
RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
FULL_WIDTH = {code + 0xFEE0: code for code in range(0x21, 0x7F)} | {0x3000: 0x20}
CATEGORIES = dict.fromkeys(RECOGNITION, "text_recognition") | {
    "Scene Text-centric VQA": "scene_text_vqa",
    "Doc-oriented VQA": "document_vqa",
    "Key Information Extraction": "key_information",
    "Handwritten Mathematical Expression Recognition": "handwritten_mathematics",
}


def prompt(doc: Mapping[str, Any], suffix: str = "") -> str:
    return "<image>" + doc["question"].replace("<image>", "image").strip() + suffix


def target(doc: Mapping[str, Any]) -> str:
    """First ground truth that is not blank, else the empty text."""
    return next(iter(_ground_truths(doc)), "")


def _ground_truths(doc: Mapping[str, Any]) -> list[str]:
    answers = doc["answer"]
    answers = [answers] if isinstance(answers, str) else answers or []
    return [answer for answer in answers if answer.strip()]


def is_correct(reply: str, answer: str, dataset: str) -> bool:
    """Whether the reply contains the ground truth; formulas are compared without spaces and case-sensitively."""
    reply, answer = (text.strip().replace("\n", " ") for text in (reply, answer))
    if dataset == FORMULA_DATASET:
        return answer.replace(" ", "") in reply.replace(" ", "")
    return answer.lower() in reply.lower()


def folded(text: str) -> str:
    """The text with full-width forms of ASCII characters (U+FF01 to U+FF5E, U+3000) as ASCII."""
    return text.translate(FULL_WIDTH)


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results`: accuracy and points, overall and for the question's category.

    `accuracy_lmms_eval` turns full-width characters into ASCII first, as lmms-eval does since July 2026.
    """
    reply, dataset, answers = results[0], doc["dataset"], _ground_truths(doc)
    correct = float(any(is_correct(reply, answer, dataset) for answer in answers))
    variant = float(any(is_correct(folded(reply), folded(answer), dataset) for answer in answers))
    category = CATEGORIES.get(doc["question_type"], "other")
    return {"accuracy": correct, "points": correct, "accuracy_lmms_eval": variant, category: correct}


def total(points: Sequence[float]) -> float:
    """lm-eval aggregation: the sum of this run's points (no state is kept between runs)."""
    return float(sum(points))
