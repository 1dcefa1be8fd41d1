"""A directory is replaced in one step, so that at every moment the old one or the new one is in place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tlq.runtime import files
from tlq.runtime.files import link_or_copy, new_directory


def replaced(path: Path) -> list[str]:
    with new_directory(path) as folder:
        (folder / "new").touch()
    return sorted(file.name for file in path.parent.rglob("*"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names")
def test_a_directory_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()

    def refuse(*_: object) -> Path:
        raise AssertionError("a second step")

    monkeypatch.setattr(Path, "replace", refuse)
    assert replaced(tmp_path / "out") == ["new", "out"]


def test_without_such_a_step_it_is_replaced_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    assert replaced(tmp_path / "out") == ["new", "out"]


def test_a_new_directory_needs_no_old_one(tmp_path: Path) -> None:
    assert replaced(tmp_path / "out") == ["new", "out"]


def test_a_failure_leaves_the_old_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").touch()
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "out"):
        raise ZeroDivisionError
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["old", "out"]


def test_a_file_is_copied_where_links_are_not_possible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("content")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").stat().st_ino == (tmp_path / "a").stat().st_ino

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "content"
    assert (tmp_path / "c").stat().st_ino != (tmp_path / "a").stat().st_ino
