"""A checkpoint of a stranger runs no code, reads no file outside its folder, and passes no code on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny import write_tiny_qwen2_vl
from transformers import AutoConfig

from tlq.export.loading import load_model
from tlq.models.checkpoint import copy_processor_files, load_config, read_config
from tlq.models.processor import load_processor
from tlq.models.stored import weight_files
from tlq.models.streaming import StreamedModel

CODE = "from pathlib import Path\nPath('{mark}').touch()\nclass Custom:\n    pass\n"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_tiny_qwen2_vl(folder)
    return folder


def change(file: Path, **values: Any) -> None:
    settings = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(settings | values))


def with_code(checkpoint: Path, mark: Path) -> None:
    """Custom classes of config, model, processor and tokenizer whose module leaves a mark."""
    (checkpoint / "custom.py").write_text(CODE.format(mark=mark))
    classes = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText", "AutoModel"), "custom.Custom")
    change(checkpoint / "config.json", auto_map=classes)
    change(checkpoint / "processor_config.json", auto_map={"AutoProcessor": "custom.Custom"})
    change(checkpoint / "preprocessor_config.json", auto_map={"AutoImageProcessor": "custom.Custom"})
    change(checkpoint / "tokenizer_config.json", auto_map={"AutoTokenizer": ["custom.Custom", None]})


def test_custom_code_is_never_run_and_nobody_is_asked(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal would be asked "Do you wish to run the custom code? [y/N]"; here the answer would be yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    mark = tmp_path / "ran"
    with_code(checkpoint, mark)
    read_config(checkpoint)
    load_model(checkpoint)
    StreamedModel(checkpoint)
    if (checkpoint / "tokenizer.json").exists():
        load_processor(checkpoint)
    change(checkpoint / "config.json", model_type="custom")
    with pytest.raises(ValueError, match="transformers cannot read its config"):
        read_config(checkpoint)
    assert not mark.exists()


def test_an_export_names_no_code_and_holds_none(checkpoint: Path, tmp_path: Path) -> None:
    change(checkpoint / "generation_config.json", auto_map={"x": "custom.Custom"}, temperature=0.5)
    with_code(checkpoint, tmp_path / "ran")
    out = tmp_path / "out"
    out.mkdir()
    copy_processor_files(checkpoint, out)
    assert not list(out.glob("*.py"))
    for file in out.glob("*.json"):
        assert "auto_map" not in json.loads(file.read_text()), file.name
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5


def test_a_file_without_names_of_code_is_copied_byte_for_byte(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{ "temperature":0.50 }')
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    copy_processor_files(checkpoint, tmp_path / "out")
    assert (tmp_path / "out/generation_config.json").read_text() == '{ "temperature":0.50 }'
    assert (tmp_path / "out/additional_chat_templates/rag.jinja").read_text() == "{{ x }}"


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"text_config": {"attn_implementation": "kernels-community/flash-attn"}},
        {"attn_implementation": {"text_config": "kernels-community/flash-attn"}},
        {"attn_implementation": ["kernels-community/flash-attn"]},
        {"_attn_implementation_internal": "someone/kernel:function"},
    ],
)
def test_attention_from_the_hub_is_refused_by_name(checkpoint: Path, values: dict[str, Any]) -> None:
    change(checkpoint / "config.json", **values)
    for read in (read_config, load_config, load_model, StreamedModel):
        with pytest.raises(ValueError, match="names the attention .*, which would be downloaded and run as code"):
            read(checkpoint)


@pytest.mark.parametrize("name", ["eager", "sdpa", None])
def test_attention_of_transformers_is_accepted(checkpoint: Path, name: str | None) -> None:
    change(checkpoint / "config.json", attn_implementation=name)
    assert type(read_config(checkpoint)) is type(AutoConfig.from_pretrained(checkpoint))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "sub/part.safetensors", ".."])
def test_a_shard_outside_the_folder_is_refused(checkpoint: Path, name: str) -> None:
    for file in checkpoint.glob("*.safetensors"):
        file.rename(checkpoint.parent / "secret.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    for read in (weight_files, load_model, StreamedModel):
        with pytest.raises(ValueError, match="which is not in the checkpoint's folder; download it again"):
            read(checkpoint)


@pytest.mark.parametrize("content", ["[]", "{}", "7", "{", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\\xff"])
def test_a_damaged_index_is_refused_by_name(checkpoint: Path, content: str) -> None:
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    index = checkpoint / "model.safetensors.index.json"
    index.write_bytes(content.encode().decode("unicode_escape").encode("latin-1"))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json.*; download it again"):
        weight_files(checkpoint)


def test_a_link_out_of_the_checkpoint_is_refused_and_one_inside_the_hubs_cache_is_not(
    checkpoint: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password")
    (checkpoint / "vocab.txt").symlink_to(secret)
    for read in (read_config, StreamedModel):
        with pytest.raises(ValueError, match="vocab.txt is a link to .*secret, outside the checkpoint; copy the file"):
            read(checkpoint)
    (checkpoint / "vocab.txt").unlink()
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0f3a"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    checkpoint.rename(snapshot)
    (blobs / "1").write_text("{}")
    (snapshot / "vocab.json").symlink_to(blobs / "1")
    read_config(snapshot)
