"""VizWiz: photos by blind people, some of them unanswerable. Scored as TextVQA; the prompt says how to decline."""

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
