"""VizWiz: questions of blind people about their photos, some unanswerable. It is scored like TextVQA."""

from collections.abc import Mapping
from typing import Any

PROMPT_SUFFIX = (
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    "\nAnswer the question using a single word or phrase."
)


def prompt(doc: Mapping[str, Any], suffix: str = PROMPT_SUFFIX) -> str:
    """Question with its first letter upper-cased and the rest lower-cased, as the reference does."""
    question = doc["question"].replace("<image>", "image")
    return f"<image>{question.capitalize()}{suffix}"
