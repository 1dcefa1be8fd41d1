"""Markdown documents in which each bench writes its section."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def write_section(path: Path, title: str, lines: Sequence[str], heading: str) -> None:
    """Write ``lines`` under ``## title``, replacing an older section; a new document begins with ``heading``."""
    path.parent.mkdir(exist_ok=True)
    text = path.read_text() if path.exists() else f"# {heading}\n\n[All pages](README.md)\n"
    section = "\n".join([f"## {title}", "", *lines, ""])
    old = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if old is None:
        path.write_text(f"{text.rstrip()}\n\n{section}")
    else:
        path.write_text(f"{text[: old.start()]}{section}\n{text[old.end() :]}".rstrip() + "\n")


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Rows as a Markdown table; the keys of the first row are the columns."""
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    return lines + [f"| {' | '.join(row[name] for name in names)} |" for row in rows]
