"""Environment variables: one list, which code and documents agree with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tasks.config.environment import INTERNAL, VARIABLES, positive, value

ROOT = Path(__file__).parents[3]
CODE = ("tlq", "tasks", "flows", "services", "bench", "benchmarks")


def test_every_variable_in_code_and_documents_is_listed() -> None:
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    names = {name for path in files for name in re.findall(r"\bTLQ_[A-Z]+(?:_[A-Z]+)*\b", path.read_text())}
    assert names - set(VARIABLES) == set(INTERNAL)


def test_every_listed_variable_is_read() -> None:
    own = ROOT / "tasks/config/environment.py"
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py") if path != own]
    text = "\n".join(path.read_text() for path in files).replace("{name.upper()}", "MLFLOW PREFECT")
    unread = [name for name in VARIABLES if name not in text]
    assert unread == []


def test_the_text_of_a_variable_or_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLQ_LOG", "debug")
    assert value("TLQ_LOG", "info") == "debug"
    monkeypatch.setenv("TLQ_LOG", "")
    assert value("TLQ_LOG", "info") == "info"


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", ""])
def test_numbers_must_be_positive(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("TLQ_RESTARTS", text)
    with pytest.raises(ValueError, match=f"TLQ_RESTARTS is '{text}', must be a positive number"):
        positive("TLQ_RESTARTS", 20)


def test_a_variable_that_is_not_listed_is_refused() -> None:
    with pytest.raises(KeyError):
        value("TLQ_DEVICES")
