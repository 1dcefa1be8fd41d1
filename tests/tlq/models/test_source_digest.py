"""The digest of a checkpoint's weights covers every byte, and reads a file once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tlq.models.stored import source_digest
from tlq.runtime import digest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(3_000_000))
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("place", [0, 1_234_567, 2_999_999])
def test_every_byte_counts(checkpoint: Path, name: str, place: int) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    before = source_digest(checkpoint)
    content = bytearray(3_000_000)
    content[place] = 1
    (checkpoint / name).write_bytes(content)
    assert source_digest(checkpoint) != before
    (checkpoint / name).write_bytes(bytes(3_000_000))
    assert source_digest(checkpoint) == before


def test_the_config_counts(checkpoint: Path) -> None:
    before = source_digest(checkpoint)
    (checkpoint / "config.json").write_text('{"a": 1}')
    assert source_digest(checkpoint) != before


def test_a_file_is_read_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    file_digest = digest.file_digest
    monkeypatch.setattr(digest, "file_digest", lambda file: read.append(file.name) or file_digest(file))
    assert source_digest(checkpoint) == source_digest(checkpoint)
    assert read == ["model.safetensors"]
    assert sorted(file.name for file in checkpoint.iterdir()) == ["config.json", "model.safetensors"]
    os.utime(checkpoint / "model.safetensors")
    source_digest(checkpoint)
    assert read == ["model.safetensors"] * 2


@pytest.mark.parametrize("content", ["", "[]", "7", '{"model.safetensors": 3}', '{"model.safetensors": {}}'])
def test_damaged_notes_are_not_believed(checkpoint: Path, content: str) -> None:
    before = source_digest(checkpoint)
    (checkpoint.parent / ".model.sha256.json").write_text(content)
    assert source_digest(checkpoint) == before


def test_a_folder_of_somebody_else_needs_no_notes(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_digest(checkpoint)

    def refuse(_text: str, path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (checkpoint.parent / ".model.sha256.json").unlink()
    monkeypatch.setattr(digest, "write_text", refuse)
    assert source_digest(checkpoint) == before
