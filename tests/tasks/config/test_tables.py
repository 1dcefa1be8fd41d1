"""The reference of parameters is current, and messages name keys that it has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tasks.config.sections import SECTIONS
from tasks.config.tables import page

ROOT = Path(__file__).parents[3]
REFERENCE = ROOT / "docs/parameters.md"

#: Dotted names in messages that are no parameters: files, and places of other documents.
_FILES = r"\.(?:py|json|parquet|csv|html|md|txt|png|yaml|safetensors)$"


def test_the_reference_is_current() -> None:
    stale = "run `python -m tasks.config.tables > docs/parameters.md`"
    assert REFERENCE.read_text() == page(), stale


def test_every_parameter_has_a_meaning() -> None:
    rows = re.findall(r"^\| `(.+?)` \|(.*)\|$", REFERENCE.read_text(), re.MULTILINE)
    assert [name for name, cells in rows if not cells.rsplit(" | ", 1)[1].strip()] == []


def test_parameters_that_messages_name_exist() -> None:
    """Keys in the text of messages, for instance `calibset.budget.sample_cap`, are keys of params.yaml."""
    names = set(re.findall(r"^\| `([a-z_.<>]+)` \|", page(), re.MULTILINE))
    known = names | {name.rsplit(".", depth)[0] for name in names for depth in (1, 2)}
    pattern = re.compile(rf"(?<![\w./<])(?:{'|'.join(SECTIONS)})(?:\.[a-z_]+)+\b(?!\()")
    unknown = []
    for folder in ("tlq", "tasks", "flows", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for text in messages(path):
                unknown += [
                    f"{path.relative_to(ROOT)}: {name}"
                    for name in pattern.findall(text)
                    if name not in known and not re.search(_FILES, name) and not name.startswith("recipes.")
                ]
    assert not unknown, f"{unknown}: params.yaml has no such key; see docs/parameters.md"


def messages(path: Path) -> list[str]:
    """Texts of the errors that a file raises and of the warnings that it logs."""
    texts = []
    for node in ast.walk(ast.parse(path.read_text())):
        raised = isinstance(node, ast.Raise) and node.exc is not None
        logged = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warning"
        if raised or logged:
            texts += [
                str(part.value)
                for part in ast.walk(node)
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
            ]
    return texts
