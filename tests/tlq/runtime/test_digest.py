"""Digests of a checkpoint's files are kept in a file next to it."""

from pathlib import Path

import pytest

from tlq.runtime import digest
from tlq.runtime.digest import kept_digests


def test_a_refused_file_costs_no_second_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text(file.name)
    read: list[str] = []
    monkeypatch.setattr(digest, "file_digest", lambda file: read.append(file.name) or file.read_text())

    def check(file: Path) -> None:
        if file.name == "b" and refuses:
            raise ValueError("b: holds NaN")

    refuses = True
    for _ in range(2):
        with pytest.raises(ValueError, match="holds NaN"):
            kept_digests(files, tmp_path / "kept.json", check)
    refuses = False
    assert kept_digests(files, tmp_path / "kept.json", check) == {"a": "a", "b": "b"}
    assert read == ["a", "b"]
