"""What is loaded, and what is exported, is what transformers loads from the same files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exporting import read_tensors
from support.families import IMAGE, write_tiny
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tlq import quantize
from tlq.export.loading import load_model
from tlq.models.conversion import StackedTensor
from tlq.models.stored import StoredTensor, open_tensors
from tlq.models.streaming import StreamedModel
from tlq.results import CalibrationReport

WEIGHTS = "model.safetensors"
FAMILY = "qwen2_5_vl"


def test_rows_in_two_tensors_are_read_in_any_order(tmp_path: Path) -> None:
    """Molmo 2 keeps the embeddings of further tokens in a tensor of their own, here also in a file of its own."""
    tensors = {"first": torch.randn(5, 3), "second": torch.randn(4, 3)}
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    sources = [
        StoredTensor(tmp_path / f"{name}.safetensors", name, tuple(tensor.shape), "F32")
        for name, tensor in tensors.items()
    ]
    stacked, whole = StackedTensor.of(sources), torch.cat(list(tensors.values()))
    rows = torch.tensor([8, 0, 5, 4, 0, 7])
    with open_tensors(stacked.file) as opened:
        assert torch.equal(stacked.read(opened), whole)
        assert torch.equal(stacked.read_rows(opened, rows), whole[rows])
    assert stacked.shape == (9, 3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_tiny(FAMILY, tmp_path / "source")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


def save(folder: Path, tensors: dict[str, Tensor], name: str = WEIGHTS) -> None:
    save_file({key: value.clone() for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def embedding_of(tensors: dict[str, Tensor]) -> str:
    return next(key for key in tensors if key.endswith("embed_tokens.weight"))


def shard(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Two shards and their index, in place of the single file."""
    names = sorted(tensors)
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in halves.items():
        save(folder, {name: tensors[name] for name in part}, file)
    places = {name: file for file, part in halves.items() for name in part}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def old_index(folder: Path) -> None:
    """A single file next to an index and shards of an earlier model."""
    shard(folder, {name: torch.zeros_like(value) for name, value in tensors_of(folder).items()})


def index_of_missing_shards(folder: Path) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"x": "gone.safetensors"}}))


def old_shards(folder: Path) -> None:
    """Shards with a stale index: the index names half of the tensors, one of them in the wrong shard."""
    shard(folder, tensors_of(folder))
    (folder / WEIGHTS).unlink()
    index = folder / f"{WEIGHTS}.index.json"
    places = json.loads(index.read_text())["weight_map"]
    kept = dict(sorted(places.items())[:4])
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict(zip(kept, reversed(kept.values()), strict=True))}))
    save(folder, {"stray": torch.zeros(1)}, "model-3.safetensors")


def pickled(folder: Path) -> None:
    torch.save(tensors_of(folder), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def another_head(folder: Path) -> None:
    """The config says tied, the file holds another head: transformers keeps the stored one."""
    tensors = tensors_of(folder)
    tie(folder)
    tensors["lm_head.weight"] = torch.randn_like(tensors[embedding_of(tensors)].float()).bfloat16() / 10
    save(folder, tensors)


def tie(folder: Path) -> None:
    def both(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True

    change_config(folder, both)


def same_head(folder: Path) -> None:
    tensors = tensors_of(folder)
    tie(folder)
    tensors["lm_head.weight"] = tensors[embedding_of(tensors)]
    save(folder, tensors)


def only_head(folder: Path) -> None:
    tensors = tensors_of(folder)
    tie(folder)
    tensors["lm_head.weight"] = tensors.pop(embedding_of(tensors))
    save(folder, tensors)


def only_embedding(folder: Path) -> None:
    tensors = tensors_of(folder)
    tie(folder)
    tensors.pop("lm_head.weight", None)
    save(folder, tensors)


def without_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save(folder, {name: value.to(dtype) for name, value in tensors_of(folder).items()})
        change_config(folder, lambda config: [each.pop("dtype", None) for each in (config, config["text_config"])])

    return change


CASES: dict[str, Callable[[Path], None]] = {
    "an index of earlier shards": old_index,
    "an index of shards that are gone": index_of_missing_shards,
    "an index that names half of the tensors": old_shards,
    "a PyTorch file": pickled,
    "tied, another head stored": another_head,
    "tied, both stored": same_head,
    "tied, only the head stored": only_head,
    "tied, only the embeddings stored": only_embedding,
    "float16 without a dtype": without_dtype(torch.float16),
    "float32 without a dtype": without_dtype(torch.float32),
}


def transformers_model(folder: Path, dtype: Any) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)


def logits(model: Any) -> Tensor:
    ids = torch.arange(1, 60).unsqueeze(0) % IMAGE
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).flatten()


@pytest.mark.parametrize("case", CASES)
def test_the_export_computes_what_transformers_computes_from_the_source(checkpoint: Path, case: str) -> None:
    CASES[case](checkpoint)
    assert StreamedModel(checkpoint).checkpoint_dtype == transformers_model(checkpoint, "auto").dtype
    original = transformers_model(checkpoint, torch.float32)
    out = checkpoint.with_name("out")
    quantize(checkpoint, out, recipe="rtn", scheme="w8a8")
    exported = load_model(out)
    assert torch.corrcoef(torch.stack([logits(exported), logits(original)]))[0, 1] > 0.99
    if case == "tied, another head stored":
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_tied_head_is_stated_in_the_text_config_too(tmp_path: Path) -> None:
    source = write_tiny("idefics3", tmp_path / "source")
    stated = json.loads((source / "config.json").read_text())
    assert stated["tie_word_embeddings"]
    assert not stated["text_config"]["tie_word_embeddings"]  # vLLM reads it, and would compute with a head of no values
    quantize(source, tmp_path / "out", recipe="rtn", scheme="w4a16s")
    assert json.loads((tmp_path / "out/config.json").read_text())["text_config"]["tie_word_embeddings"]
    assert "lm_head.weight" not in read_tensors(tmp_path / "out")


@pytest.mark.parametrize(
    ("stated", "dtype"), [("auto", torch.float16), ("torch.float16", torch.float16), ("torch.bfloat16", torch.bfloat16)]
)
def test_dtypes_that_transformers_does_not_read_are_read(checkpoint: Path, stated: str, dtype: torch.dtype) -> None:
    save(checkpoint, {name: value.half() for name, value in tensors_of(checkpoint).items()})
    change_config(checkpoint, lambda config: config.update(dtype=stated))
    assert StreamedModel(checkpoint).checkpoint_dtype == dtype
    out = checkpoint.with_name("out")
    quantize(checkpoint, out, recipe="rtn", scheme="w8a8")
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert load_model(out).dtype == torch.float32


def test_a_dtype_that_nobody_reads_is_named(checkpoint: Path) -> None:
    change_config(checkpoint, lambda config: config.update(dtype="float17"))
    with pytest.raises(ValueError, match="transformers cannot read its config .*float17"):
        StreamedModel(checkpoint)


def test_weights_that_neither_place_holds_are_missing(checkpoint: Path) -> None:
    tensors = tensors_of(checkpoint)
    tie(checkpoint)
    heads = (embedding_of(tensors), "lm_head.weight")
    save(checkpoint, {key: value for key, value in tensors.items() if key not in heads})
    with pytest.raises(ValueError, match="weights are missing, the first is .*; the checkpoint is incomplete"):
        StreamedModel(checkpoint)


def test_tensors_that_transformers_does_not_name_are_carried_over_byte_for_byte(checkpoint: Path) -> None:
    tensors = tensors_of(checkpoint)
    extra = {
        "mtp.layers.0.mlp.up_proj.weight": torch.randn(8, 128, dtype=torch.float32),
        "mtp.norm.weight": torch.randn(128, dtype=torch.bfloat16),
        "model.layers.2.eh_proj.weight": torch.randn(8, 8, dtype=torch.float16),
        "score.weight": torch.arange(4),
    }
    save(checkpoint, tensors | extra)
    out = checkpoint.with_name("out")
    quantize(checkpoint, out, recipe="rtn", scheme="w8a8")
    written = read_tensors(out)
    for name, value in extra.items():
        assert written[name].dtype == value.dtype
        assert torch.equal(written[name], value), name
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    patterns = [each.removeprefix("re:") for each in ignored if each.startswith("re:(")]
    for module in ("mtp.layers.0.mlp.up_proj", "model.mtp.norm", "language_model.layers.2.eh_proj", "score"):
        assert any(re.match(pattern, module) for pattern in patterns), module
    for module in ("model.layers.1.mlp.up_proj", "model.layers.20.mlp.up_proj", "underscore.x"):
        assert not any(re.match(pattern, module) for pattern in patterns), module
    report = CalibrationReport.load(out / "calibration.json")
    assert len(report.carried_over) == len(extra)
    load_model(out)


def test_leftovers_of_training_are_not_copied(checkpoint: Path) -> None:
    wanted = ("tokenizer.json", "preprocessor_config.json", "generation_config.json", "chat_template.jinja", "LICENSE")
    leftovers = ("adapter_config.json", "trainer_state.json", "optimizer.pt", "training_args.bin", "notes.txt", ".lock")
    for name in (*wanted, *leftovers):
        (checkpoint / name).write_text("{}")
    out = checkpoint.with_name("out")
    quantize(checkpoint, out, recipe="rtn", scheme="w8a8")
    names = {file.name for file in out.iterdir()}
    assert set(wanted) <= names
    assert not names & set(leftovers)
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o644}
