"""An export equals the calibrated model: loading, logits, generation, unchanged other tensors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exporting import read_tensors, whole_model_tensors, write_export
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import calibrate
from tlq.export.compressed_tensors import read_layer, write_layer
from tlq.export.loading import load_model
from tlq.importance.pool import Importance
from tlq.models.checkpoint import checkpoint_dtype_of, read_config
from tlq.models.families import FAMILIES
from tlq.models.streaming import StreamedModel
from tlq.quantization.formats import SCHEMES, Scheme, WeightQuantizer, get_scheme
from tlq.recipes import RECIPES
from tlq.samples import Batch

#: Every recipe in the two main schemes, every scheme with the quickest recipe and the most involved one.
PAIRS = sorted(
    {(recipe, scheme) for recipe in RECIPES for scheme in ("w3a16", "w4a8")}
    | {(recipe, scheme) for recipe in ("rtn", "tlq-c") for scheme in SCHEMES}
)

Exported = tuple[torch.nn.Module, Path]


@pytest.fixture(scope="module")
def exported(
    tiny_checkpoint: Path,
    tiny_model: PreTrainedModel,
    batches: list[Batch],
    scores: Importance,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Exported]:
    """The fake-quantized model in memory and the directory that was exported from it."""

    @cache
    def export(name: str, scheme_name: str) -> Exported:
        recipe, scheme = RECIPES[name], get_scheme(scheme_name)
        recipe = replace(recipe, equalization=replace(recipe.equalization, points=4))
        model = copy.deepcopy(tiny_model)
        weights = {key: [batch.valid.float() for batch in batches] for key in scores}
        checkpoint_dtype = checkpoint_dtype_of(read_config(tiny_checkpoint), tiny_checkpoint)
        assert checkpoint_dtype == torch.bfloat16
        calibrated = calibrate(
            model, CalibrationJob(recipe, WeightQuantizer(scheme, checkpoint_dtype), batches, weights)
        )
        out = tmp_path_factory.mktemp("exported") / f"{name}-{scheme_name}"
        write_export(tiny_checkpoint, calibrated, scheme, out)
        return model, out

    return export


@torch.no_grad()
@pytest.mark.parametrize(("recipe", "scheme"), PAIRS)
def test_an_export_loads_with_the_logits_of_the_calibrated_model_and_generates(
    exported: Callable[[str, str], Exported],
    tiny_model: PreTrainedModel,
    batches: list[Batch],
    recipe: str,
    scheme: str,
) -> None:
    """The export computes the same as the calibrated model, including quantized activations."""
    model, path = exported(recipe, scheme)
    loaded = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    batch = batches[0]
    expected = model(**batch.encode()).logits[batch.valid]
    found = loaded(**batch.encode()).logits[batch.valid]
    assert float((found - expected).abs().max()) < 1e-4
    original = tiny_model(**batch.encode()).logits[batch.valid]
    least = 1e-3 if get_scheme(scheme).weight_bits == 8 else 1e-2
    assert float((found - original).abs().max()) > least  # it really is quantized

    prompt = {name: value[:1] for name, value in batch.encode().items() if name != "pixel_values"}
    patches = int(batch.encode()["image_grid_thw"][0].prod())
    length = int(batch.valid[0].sum())
    prompt = {
        name: value[:, :length] if value.dim() == 2 and name != "image_grid_thw" else value
        for name, value in prompt.items()
    }
    answer = loaded.generate(
        **prompt, pixel_values=batch.encode()["pixel_values"][:patches], max_new_tokens=3, do_sample=False
    )
    assert answer.shape[0] == 1
    assert length < answer.shape[1] <= length + 3


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_the_projects_own_loader_gives_the_same(
    exported: Callable[[str, str], Exported], batches: list[Batch], scheme: str
) -> None:
    model, path = exported("rtn", scheme)
    batch = batches[0]
    found = load_model(path)(**batch.encode()).logits[batch.valid]
    assert float((found - model(**batch.encode()).logits[batch.valid]).abs().max()) < 1e-4


@torch.no_grad()
def test_activation_quantization_survives_the_export(
    exported: Callable[[str, str], Exported], batches: list[Batch]
) -> None:
    """With its activations in full precision a W4A8 checkpoint computes something else."""
    model, path = exported("rtn", "w4a8")
    loaded = load_model(path)
    batch = batches[0]
    with_activations = loaded(**batch.encode()).logits
    for module in loaded.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            setattr(module, "quantization_enabled", False)  # noqa: B010
    assert float((loaded(**batch.encode()).logits - with_activations)[batch.valid].abs().max()) > 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shards_hold_what_compressing_the_whole_model_gives(
    tiny_checkpoint: Path,
    tiny_model: PreTrainedModel,
    batches: list[Batch],
    scores: Importance,
    scheme: str,
    tmp_path: Path,
) -> None:
    """The layer by layer writer against compressed-tensors' own compression of a model in memory."""
    model = copy.deepcopy(tiny_model)
    weights = {key: [batch.valid.float() for batch in batches] for key in scores}
    calibrated = calibrate(
        model,
        CalibrationJob(RECIPES["smoothquant"], WeightQuantizer(get_scheme(scheme), torch.bfloat16), batches, weights),
    )
    path = write_export(tiny_checkpoint, calibrated, get_scheme(scheme), tmp_path / "out")
    names = {place.key: name for name, place in StreamedModel(tiny_checkpoint).weight_map.items()}
    expected = whole_model_tensors(tiny_checkpoint, model, calibrated.weights, get_scheme(scheme))
    found = read_tensors(path)
    assert len(found) == len(expected)
    for key, value in found.items():
        base, _, local = key.rpartition(".")
        name = names.get(key) or f"{names[f'{base}.weight'].removesuffix('.weight')}.{local}"
        assert torch.equal(value, expected[name]), key
        assert value.dtype == expected[name].dtype, key


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_written_layer_reads_back_exactly(
    tiny_checkpoint: Path, tiny_model: PreTrainedModel, scheme: str, tmp_path: Path
) -> None:
    own = replace(get_scheme(scheme), overrides=(("*.layers.0.mlp.down_proj", "full_precision"),))
    calibrated = calibrate(
        copy.deepcopy(tiny_model), CalibrationJob(RECIPES["rtn"], WeightQuantizer(own, torch.bfloat16))
    )
    model = StreamedModel(tiny_checkpoint)
    for layer in calibrated.layers:
        write_layer(tmp_path / "layer.safetensors", model, layer.weights, layer.others, own)
        weights, others = read_layer(tmp_path / "layer.safetensors", model, layer.index, own)
        assert set(weights) == set(layer.weights)
        for path, weight in layer.weights.items():
            for field in ("codes", "scale", "zero_point"):
                assert torch.equal(getattr(weights[path], field), getattr(weight, field)), (path, field)
        assert set(others) == set(layer.others)
        assert all(torch.equal(others[name], value) for name, value in layer.others.items())


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_only_decoder_linears_and_norms_differ_from_the_source(
    exported: Callable[[str, str], Exported], tiny_checkpoint: Path, scheme: str
) -> None:
    _, path = exported("tlq-c", scheme)
    source, written = read_tensors(tiny_checkpoint), read_tensors(path)
    for name, value in source.items():
        if "layers" in name and name.endswith("proj.weight"):
            assert name.removesuffix("weight") + "weight_scale" in written
        elif not ("layers" in name and ("layernorm" in name or name.endswith("bias"))):
            assert torch.equal(written[name], value), name
        assert written.get(name, value).dtype in (value.dtype, torch.int8, torch.int32)


def test_three_bit_weights_take_three_bits(exported: Callable[[str, str], Exported]) -> None:
    _, path = exported("rtn", "w3a16")
    (packed,) = (
        value for name, value in read_tensors(path).items() if name.endswith("layers.0.mlp.down_proj.weight_packed")
    )
    assert packed.numel() * packed.element_size() == 128 * 256 * 3 / 8


def test_processor_files_are_the_sources(exported: Callable[[str, str], Exported], tiny_checkpoint: Path) -> None:
    _, path = exported("tlq", "w3a16")
    names = {file.name for file in tiny_checkpoint.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja"} <= names
    for name in names - {"config.json", "model.safetensors"}:
        assert (path / name).read_bytes() == (tiny_checkpoint / name).read_bytes(), name


@pytest.mark.parametrize("scheme", list(SCHEMES.values()), ids=lambda scheme: scheme.name)
def test_config_says_what_is_in_the_checkpoint(exported: Callable[[str, str], Exported], scheme: Scheme) -> None:
    _, path = exported("rtn", scheme.name)
    config: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    assert config["quant_method"] == "compressed-tensors"
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (
        scheme.weight_bits,
        scheme.group_size,
        scheme.symmetric,
    )
    activations = config["config_groups"]["group_0"]["input_activations"]
    if scheme.activation_bits is None:
        assert activations is None
    else:
        assert (activations["num_bits"], activations["dynamic"]) == (8, True)
        assert not config.get("dequantize")  # it would drop activation quantization
    assert "lm_head" in config["ignore"]


def test_scales_of_another_dtype_than_the_checkpoints_are_refused(
    tiny_checkpoint: Path, tiny_model: PreTrainedModel, tmp_path: Path
) -> None:
    """A model loaded in float32 reports float32; scales of that dtype would be rounded again by the export."""
    model = copy.deepcopy(tiny_model)
    scheme = get_scheme("w3a16")
    checkpoint_dtype = model.config.dtype
    calibrated = calibrate(model, CalibrationJob(RECIPES["rtn"], WeightQuantizer(scheme, checkpoint_dtype)))
    with pytest.raises(ValueError, match=r"is stored in torch\.bfloat16, but the scales have another dtype"):
        write_export(tiny_checkpoint, calibrated, scheme, tmp_path)


def test_a_missing_checkpoint_says_what_to_correct(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a directory here and not a hub model.*check the path or hub id"):
        read_config(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no config.json; give a Hugging Face checkpoint"):
        read_config(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "never_heard_of"])
def test_an_unsupported_family_lists_the_supported_ones(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=", ".join(FAMILIES)):
        read_config(tmp_path)
