"""A size budget on models: what is measured, that every contract holds for a mix, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.exporting import write_export
from support.families import batches_of, write_tiny
from transformers import AutoModelForImageTextToText, PreTrainedModel

from tlq.api import plan, quantize
from tlq.calibration.allocation import distributed, measure
from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import calibrate
from tlq.export.loading import load_model
from tlq.export.quantized import QuantizedCheckpoint
from tlq.importance.gradients import score_tokens
from tlq.importance.pool import Importance, pool_indices
from tlq.models.architectures import linear_paths
from tlq.models.streaming import ResidentModel
from tlq.quantization.allocation import Unit
from tlq.quantization.formats import FULL_PRECISION, MIXED, WeightQuantizer, get_scheme
from tlq.recipes import get_recipe
from tlq.samples import Batch, Sample


def job_of(batches: list[Batch], scheme: str = "mix3", overrides: tuple[tuple[str, str], ...] = ()) -> CalibrationJob:
    mix = replace(get_scheme(scheme), overrides=overrides)
    return CalibrationJob(get_recipe("rtn"), WeightQuantizer(mix, torch.bfloat16), batches)


def bits_of(units: list[Unit], chosen: dict[str, str]) -> float:
    """Bits a weight, scales included, when the linears at module paths have these schemes."""
    size = sum(unit.sizes[chosen[unit.patterns[0]]] for unit in units)
    return 8 * size / sum(unit.weights for unit in units)


def test_the_loss_is_the_error_on_each_token_times_its_squared_importance(
    tiny_model: PreTrainedModel, batches: list[Batch], scores: Importance
) -> None:
    units = measure(ResidentModel(tiny_model), job_of(batches), scores)
    unit = next(unit for unit in units if (unit.layer, unit.name) == (1, "down"))
    linear = tiny_model.get_submodule(unit.patterns[0])
    inputs: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            tiny_model(**batch.encode())
    hook.remove()
    x = torch.cat([part[batch.valid] for part, batch in zip(inputs, batches, strict=True)]).double()
    order = np.concatenate(pool_indices(batches))
    largest = max(float(raw.max()) for raw in scores.values())
    g = torch.from_numpy(scores[1, "down"][order].astype(np.float64) / largest)
    for name in ("w2a16s", "w4a16s"):
        quantizer = WeightQuantizer(get_scheme(name), torch.bfloat16)
        weight = linear.weight.detach()
        change = quantizer.round_nearest(weight).dequantize(torch.bfloat16).double() - weight.double()
        expected = float((g.square() * (x @ change.T).square().sum(1)).sum())
        assert unit.losses[name] == pytest.approx(expected, rel=2e-3)
    assert unit.losses["w8a16s"] < unit.losses["w4a16s"] < unit.losses["w3a16s"] < unit.losses["w2a16s"]
    assert unit.losses[FULL_PRECISION] == 0


@pytest.mark.parametrize("name", ["mix2.5", "mix3", "mix5"])
def test_the_budget_is_kept_and_used(
    tiny_model: PreTrainedModel, batches: list[Batch], scores: Importance, name: str
) -> None:
    job = job_of(batches, name)
    units = measure(ResidentModel(tiny_model), job, scores)
    scheme = distributed(job.scheme, units, 0)
    assert scheme.budget is None
    bits, amount = bits_of(units, dict(scheme.overrides)), float(name.removeprefix("mix"))
    assert amount - 0.75 < bits <= amount


def test_groups_with_more_weight_in_the_loss_get_more_bits(
    tiny_model: PreTrainedModel, batches: list[Batch], scores: Importance
) -> None:
    louder = {key: 1000 * raw if key[0] == 1 else raw for key, raw in scores.items()}
    for changed, layer in ((louder, 1), ({key: raw / 1e6 if key[0] else raw for key, raw in scores.items()}, 0)):
        job = job_of(batches)
        units = measure(ResidentModel(tiny_model), job, changed)
        chosen = dict(distributed(job.scheme, units, 0).overrides)
        bits = [sum(MIXED.index(name) for path, name in chosen.items() if f"layers.{n}." in path) for n in (0, 1)]
        assert bits[layer] > bits[1 - layer]


def test_a_user_keeps_layers_as_they_are(tiny_model: PreTrainedModel, batches: list[Batch], scores: Importance) -> None:
    """They take their part of the budget, so the others get fewer bits."""
    overrides = (("*.layers.0.mlp.down_proj", FULL_PRECISION), ("*.layers.1.mlp.down_proj", "w8a16s"))
    job = job_of(batches, "mix6", overrides)
    units = measure(ResidentModel(tiny_model), job, scores)
    scheme = distributed(job.scheme, units, 0)
    assert scheme.overrides[:2] == overrides
    assert scheme.of("model.language_model.layers.0.mlp.down_proj") is None
    assert scheme.of("model.language_model.layers.1.mlp.down_proj") == get_scheme("w8a16s")
    size = 0
    for unit in units:
        names = {dict(scheme.overrides)[pattern] for pattern in unit.patterns} or set(unit.sizes)
        size += unit.sizes[names.pop()]
    assert 8 * size / sum(unit.weights for unit in units) <= 6


def test_a_budget_that_is_too_small_is_refused_with_one_that_is_not(
    tiny_model: PreTrainedModel, batches: list[Batch], scores: Importance
) -> None:
    job = job_of(batches, "mix2")
    units = measure(ResidentModel(tiny_model), job, scores)
    with pytest.raises(ValueError, match=r"scheme mix2: the budget of 2 bits a weight .* 2\.25 .* mix2\.25$"):
        distributed(job.scheme, units, 0)
    assert set(dict(distributed(get_scheme("mix2.25"), units, 0).overrides).values()) == {"w2a16s"}
    with pytest.raises(ValueError, match=r"mix0\.001gb: the budget of 0\.001 GB is too small, 0\.01 GB are needed"):
        distributed(get_scheme("mix0.001gb"), units, 10**6)


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["rtn", "mbq", "tlq-c"])
def test_a_mix_is_exported_as_it_was_calibrated(
    tiny_checkpoint: Path, samples: list[Sample], batches: list[Batch], tmp_path: Path, recipe: str
) -> None:
    """transformers and the package load the same weights: those of the chosen numbers of bits."""
    quantize(tiny_checkpoint, tmp_path / "out", samples, recipe, "mix3.5", batch_size=3)
    report = json.loads((tmp_path / "out/calibration.json").read_text())
    chosen = dict(report["scheme"]["overrides"])
    assert len(set(chosen.values())) > 1
    card = (tmp_path / "out/README.md").read_text()
    assert "- mixed-precision\n" in card
    assert 'model = load_model("out"' in card
    own = load_model(tmp_path / "out")
    stored = QuantizedCheckpoint.open(tmp_path / "out")
    for path, name in chosen.items():
        key = path.replace("model.language_model", "model")
        if name == FULL_PRECISION:
            assert key not in stored.schemes
            continue
        scheme, weight = get_scheme(name), stored.weight(key)
        assert (stored.schemes[key].weight_bits, stored.schemes[key].group_size) == (
            scheme.weight_bits,
            scheme.group_size,
        )
        assert torch.equal(own.get_parameter(f"{path}.weight"), weight.dequantize(torch.bfloat16))
    own = load_model(tmp_path / "out", torch.bfloat16)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    for batch in batches:
        expected = own(**batch.encode()).logits[batch.valid]
        torch.testing.assert_close(plain(**batch.encode()).logits[batch.valid], expected)


def test_a_mix_without_samples_is_refused_before_any_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for attempt in (
        lambda: quantize(tiny_checkpoint, tmp_path / "out", [], "rtn", "mix3"),
        lambda: plan(tiny_checkpoint, [], "rtn", "mix3"),
    ):
        with pytest.raises(ValueError, match="scheme mix3 distributes its bits by token importance; give calibration"):
            attempt()
    assert not (tmp_path / "out").exists()


def test_a_plan_knows_the_size_of_a_mix(tiny_checkpoint: Path, samples: list[Sample]) -> None:
    sizes = [
        plan(tiny_checkpoint, samples, "tlq-c", scheme)[-1].disk for scheme in ("mix2.25", "w2a16s", "mix4", "w8a16s")
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)
    assert sizes[1] < sizes[2] < sizes[3]


def test_bits_that_the_engine_lacks_are_not_used(tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path) -> None:
    """vLLM's kernels for a CPU take 4 bits only."""
    quantize(tiny_checkpoint, tmp_path / "out", samples, "rtn", "mix6", engine="vllm-cpu")
    report = json.loads((tmp_path / "out/calibration.json").read_text())
    assert {name for _, name in report["scheme"]["overrides"]} == {"w4a16s", FULL_PRECISION}


def test_the_experts_of_a_layer_have_one_scheme(tmp_path: Path) -> None:
    """Engines compute them together. Every expert's size and loss counts, and the shared gate's group has its own."""
    model = ResidentModel(load_model(write_tiny("qwen3_vl_moe", tmp_path)))
    batches = batches_of("qwen3_vl_moe")
    job = job_of(batches, "mix4")
    units = measure(model, job, score_tokens(model, batches))
    (experts,) = [unit for unit in units if "experts" in unit.patterns[0]]  # no other layer has experts
    assert (experts.layer, experts.patterns) == (0, ("model.language_model.layers.0.mlp.experts.*",))
    scheme = distributed(job.scheme, units, 0)
    own = [path for path in linear_paths(model.architecture, 0) if ".experts." in path]
    assert len(own) == 3 * 4
    assert experts.weights == sum(model.skeleton.get_submodule(path).weight.numel() for path in own)
    assert len({scheme.of(path) for path in own}) == 1
    assert 0 < experts.losses["w4a16s"] < experts.losses["w2a16s"]


@torch.no_grad()
def test_a_mix_of_a_model_with_experts_is_loaded_as_it_was_calibrated(tmp_path: Path) -> None:
    folder = write_tiny("qwen3_vl_moe", tmp_path / "model")
    model, batches = load_model(folder), batches_of("qwen3_vl_moe")
    job = job_of(batches, "mix4")
    units = measure(ResidentModel(model), job, score_tokens(ResidentModel(model), batches))
    scheme = distributed(job.scheme, units, 0)
    calibrated = calibrate(model, CalibrationJob(job.recipe, WeightQuantizer(scheme, torch.bfloat16)))
    assert len({len(weight.codes.unique()) for weight in calibrated.weights.values()}) > 1
    write_export(folder, calibrated, scheme, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    for path in calibrated.weights:
        assert torch.equal(loaded.get_parameter(f"{path}.weight"), model.get_parameter(f"{path}.weight")), path
