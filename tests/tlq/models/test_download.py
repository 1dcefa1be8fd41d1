"""What is downloaded from the hub: the processor, and the weights in one form."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

from tlq.models.checkpoint import local_folder

COMMON = {"config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("stored", "weights", "expected"),
    [
        ({"model.safetensors", "pytorch_model.bin"}, True, {"model.safetensors"}),
        ({"pytorch_model.bin"}, True, {"pytorch_model.bin"}),
        ({"model.safetensors", "pytorch_model.bin"}, False, set()),
        ({"model.safetensors", "model.gguf", "tf_model.h5"}, True, {"model.safetensors"}),
    ],
)
def test_safetensors_are_preferred_and_pytorch_files_are_taken_without_them(
    stored: set[str], weights: bool, expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(source: str, ignore_patterns: list[str]) -> str:
        assert source == "someone/model"
        for name in stored | COMMON:
            if not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert local_folder("someone/model", weights) == tmp_path
    assert {file.name for file in tmp_path.iterdir()} == expected | COMMON
