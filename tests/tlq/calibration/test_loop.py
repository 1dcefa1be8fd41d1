"""The layer loop: the inputs of groups, the installed weights, and refused jobs."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlq.calibration.group import GroupProblem, GroupSolution, GroupSolver
from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import Calibrated, LayerLoop, calibrate, calibrate_layers
from tlq.importance.pool import Importance
from tlq.importance.token_weights import TokenWeights
from tlq.models.architectures import architecture_of, get_linear
from tlq.models.streaming import ResidentModel
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.quantization.objective import ChunkInputs
from tlq.recipes import RECIPES, Recipe
from tlq.samples import Batch

Key = tuple[int, str]


def quick(name: str) -> Recipe:
    """A recipe with a coarse grid and exhaustive search, because these tests are about the loop."""
    recipe = RECIPES[name]
    return replace(recipe, equalization=replace(recipe.equalization, points=4, search="exhaustive"))


@pytest.fixture(scope="module")
def weights(scores: Importance, batches: list[Batch]) -> TokenWeights:
    """Uneven weights, without a third of the tokens and without padding."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: [
            torch.rand(batch.valid.shape, generator=generator)
            * (torch.rand(batch.valid.shape, generator=generator) > 0.33)
            * batch.valid
            for batch in batches
        ]
        for key in scores
    }


@dataclass
class Run:
    """A calibrated model, and the problem of each group."""

    model: nn.Module
    calibrated: Calibrated
    inputs: dict[Key, ChunkInputs]
    scales: dict[Key, Tensor]


class Recorder(GroupSolver):
    """Keeps every problem with its solution, in order of layers and groups."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.solved: list[tuple[GroupProblem, GroupSolution]] = []

    def solve(self, problem: GroupProblem) -> GroupSolution:
        solution = super().solve(problem)
        self.solved.append((problem, solution))
        return solution


Runner = Callable[..., Run]


@pytest.fixture(scope="module")
def run(tiny_model: PreTrainedModel, batches: list[Batch], weights: TokenWeights) -> Runner:
    def calibrated(name: str, scheme: str, attempt: int = 0) -> Run:
        model = copy.deepcopy(tiny_model)
        quantizer = WeightQuantizer(get_scheme(scheme), torch.bfloat16)
        resident = ResidentModel(model)
        loop = LayerLoop(resident, CalibrationJob(quick(name), quantizer, batches, weights))
        solver = Recorder(resident, loop.job, loop.streams)
        loop.solver = solver
        with torch.no_grad():
            layers = [loop.solve_layer(index, module) for index, module in resident.layers(range(2))]
        inputs: dict[Key, ChunkInputs] = {}
        scales: dict[Key, Tensor] = {}
        keys = [(layer.index, group.name) for layer in layers for group in resident.architecture.groups[layer.index]]
        for key, (problem, solution) in zip(keys, solver.solved, strict=True):
            own = problem.inputs.own
            parts = ([part.x for part in own], [part.u for part in own], [part.w for part in own])
            inputs[key] = ChunkInputs(*(torch.cat(each) for each in parts))
            scales[key] = solution.candidate.s
        result = Calibrated(layers)
        return Run(model, result, inputs, scales)

    return cache(calibrated)


def inputs_by_hand(model: nn.Module, batches: list[Batch], weights: TokenWeights) -> dict[Key, Tensor]:
    """Inputs of every group in ordinary forward passes of the whole model, at the tokens that have a weight."""
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    seen: dict[Key, list[Tensor]] = {key: [] for key in weights}
    for number, batch in enumerate(batches):
        handles = []
        for index, layer in enumerate(architecture.decoder_layers(model)):
            for group in architecture.groups[0]:
                key = (index, group.name)

                def note(
                    _module: nn.Module,
                    args: tuple[Tensor, ...],
                    key: Key = key,
                    counts: Tensor = weights[key][number] > 0,
                ) -> None:
                    seen[key].append(args[0][counts])

                linear = get_linear(layer, group.linears[0])
                handles.append(linear.register_forward_pre_hook(note, prepend=True))
        with torch.no_grad():
            model(**batch.encode())
        for handle in handles:
            handle.remove()
    return {key: torch.cat(parts) for key, parts in seen.items()}


def assert_close(found: Tensor, expected: Tensor, relative: float) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= relative * float(expected.norm())


@pytest.mark.parametrize("name", ["gptq", "awq", "tlq", "tlq-c"])
@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_groups_are_solved_on_the_inputs_that_they_get_in_the_finished_model(
    run: Runner, tiny_model: PreTrainedModel, batches: list[Batch], weights: TokenWeights, name: str, scheme: str
) -> None:
    """u / s is the input of the group in the finished quantized model; x is its input in the original model."""
    done = run(name, scheme)
    quantized = inputs_by_hand(done.model, batches, weights)
    original = inputs_by_hand(tiny_model, batches, weights)
    for key, inputs in done.inputs.items():
        # Scales folded into a linear are rounded once more with its own scales, to bfloat16.
        assert_close(inputs.u / done.scales[key], quantized[key], 5e-3)
        if name.startswith("tlq"):
            assert_close(inputs.x, original[key], 1e-5)
        else:
            assert torch.equal(inputs.x, inputs.u)
        if key != (0, "qkv"):
            assert float((inputs.u - original[key]).norm()) > 0.02 * float(original[key].norm())
        expected = torch.cat([weight[weight > 0] for weight in weights[key]])
        assert torch.equal(inputs.w, expected)


@pytest.mark.parametrize("name", ["smoothquant", "mbq"])
def test_weight_only_baselines_use_full_precision_inputs(
    run: Runner, tiny_model: PreTrainedModel, batches: list[Batch], weights: TokenWeights, name: str
) -> None:
    original = inputs_by_hand(tiny_model, batches, weights)
    for key, inputs in run(name, "w3a16").inputs.items():
        assert_close(inputs.u, original[key], 1e-5)
        assert torch.equal(inputs.x, inputs.u)


def test_mbq_is_exposed_where_activations_are_quantized(
    run: Runner, tiny_model: PreTrainedModel, batches: list[Batch], weights: TokenWeights
) -> None:
    done = run("mbq", "w4a8")
    original = inputs_by_hand(tiny_model, batches, weights)
    quantized = inputs_by_hand(done.model, batches, weights)
    for key, inputs in done.inputs.items():
        assert_close(inputs.x, original[key], 1e-5)
        assert_close(inputs.u / done.scales[key], quantized[key], 5e-3)


@pytest.mark.parametrize("name", ["gptq", "tlq", "tlq-c"])
def test_reported_errors_are_those_of_the_installed_weights(
    run: Runner, tiny_model: PreTrainedModel, name: str
) -> None:
    """E(V) / sum w recomputed from the finished model, for the groups whose rows no later fold rescales."""
    done = run(name, "w3a16")
    architecture = architecture_of(tiny_model.config)
    for report in done.calibrated.reports:
        path = {"o_proj": "self_attn.o_proj", "down": "mlp.down_proj"}.get(report.group)
        if path is None:
            continue
        inputs, s = done.inputs[report.layer, report.group], done.scales[report.layer, report.group]
        before, after = (
            get_linear(architecture.decoder_layers(model)[report.layer], path).weight.detach()
            for model in (tiny_model, done.model)
        )
        difference = inputs.x @ before.T - (inputs.u / s) @ after.T
        expected = float((inputs.w[:, None] * difference.square()).sum() / inputs.w.sum())
        assert report.error_after == pytest.approx(expected, rel=0.03)
        assert report.tokens == len(inputs.w)
        assert report.effective_tokens == pytest.approx(float(inputs.w.sum() ** 2 / inputs.w.square().sum()), abs=0.1)


def test_search_and_compensation_lower_the_error_of_every_group(run: Runner) -> None:
    for name in ("tlq", "tlq-c"):
        for report in run(name, "w3a16").calibrated.reports:
            assert report.error_before is not None
            assert report.error_after is not None
            assert report.error_after < report.error_before


def test_codes_cover_every_decoder_linear_and_match_the_model(run: Runner) -> None:
    done = run("tlq", "w3a16")
    architecture = architecture_of(done.model.config)  # type: ignore[arg-type]
    decoder = architecture.decoder_layers(done.model)
    linears = {
        f"{architecture.layers}.{name}": module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert set(done.calibrated.weights) == set(linears)
    for path, weight in done.calibrated.weights.items():
        assert torch.equal(weight.dequantize(torch.bfloat16), linears[path].weight)


@pytest.mark.parametrize("name", ["tlq", "tlq-c"])
def test_two_runs_are_bit_identical(run: Runner, name: str) -> None:
    first, second = run(name, "w3a16").calibrated.weights, run(name, "w3a16", 2).calibrated.weights
    for path, weight in first.items():
        assert torch.equal(weight.codes, second[path].codes)
        assert torch.equal(weight.scale, second[path].scale)
        assert torch.equal(weight.zero_point, second[path].zero_point)


def test_nothing_outside_the_decoder_changes(run: Runner, tiny_model: PreTrainedModel) -> None:
    done = dict(run("tlq-c", "w4a8").model.named_parameters())
    for name, parameter in tiny_model.named_parameters():
        if "language_model.layers" not in name:
            assert torch.equal(parameter, done[name]), name


Refusal = Callable[[nn.Module], object]


@pytest.fixture
def attempt(tiny_model: PreTrainedModel, batches: list[Batch], weights: TokenWeights) -> Callable[..., Calibrated]:
    def calibrated(name: str = "tlq", break_it: Refusal | None = None, **changes: Any) -> Calibrated:
        model = copy.deepcopy(tiny_model)
        if break_it is not None:
            with torch.no_grad():
                break_it(model)
        job = CalibrationJob(quick(name), WeightQuantizer(get_scheme("w3a16"), torch.bfloat16), batches, weights)
        return calibrate(model, replace(job, **changes))

    return calibrated


def test_a_group_size_that_does_not_divide_is_refused_before_any_work(attempt: Callable[..., Calibrated]) -> None:
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj: scheme w3a16 has groups of 96.*128 input channels"
    ):
        attempt(quantizer=WeightQuantizer(get_scheme("w3a16", 96), torch.bfloat16))


def test_a_weight_that_is_not_finite_is_named(attempt: Callable[..., Calibrated]) -> None:
    def damage(model: Any) -> None:
        model.model.language_model.layers[1].mlp.up_proj.weight[3, 5] = math.nan

    with pytest.raises(FloatingPointError, match=r"layers\.1\.mlp\.up_proj: weight is not finite; the checkpoint"):
        attempt("rtn", damage)


@pytest.mark.parametrize("name", ["gptq", "mbq", "tlq-c"])
def test_an_activation_that_is_not_finite_is_named(attempt: Callable[..., Calibrated], name: str) -> None:
    def damage(model: Any) -> None:
        model.model.language_model.layers[1].post_attention_layernorm.weight[3] = math.inf

    with pytest.raises(FloatingPointError, match="layer 1.* is not finite; run in float32 or bfloat16"):
        attempt(name, damage)


def test_missing_data_is_refused(attempt: Callable[..., Calibrated], weights: TokenWeights) -> None:
    """Without the check a recipe would silently round to nearest."""
    with pytest.raises(ValueError, match="no calibration samples"):
        attempt(batches=[])
    with pytest.raises(ValueError, match="layer 1, group o_proj: no token"):
        attempt(weights={key: value for key, value in weights.items() if key != (1, "o_proj")})
    assert len(attempt("rtn", batches=[], weights={}).weights) == 14


def test_a_checkpoint_already_quantized_is_refused(attempt: Callable[..., Calibrated]) -> None:
    def replace_linear(model: Any) -> None:
        model.model.language_model.layers[0].mlp.down_proj = nn.Identity()

    with pytest.raises(ValueError, match="mlp.down_proj is a Identity, not a Linear; give a full-precision checkpoint"):
        attempt("rtn", replace_linear)


def test_a_result_is_not_kept_while_the_next_layer_is_solved(
    tiny_model: PreTrainedModel, batches: list[Batch], weights: TokenWeights
) -> None:
    """Codes are a quarter of a layer in float32: two layers of them would add to the peak."""
    quantizer = WeightQuantizer(get_scheme("w4a8"), torch.float32)
    job = CalibrationJob(quick("tlq"), quantizer, batches, weights)
    results = calibrate_layers(ResidentModel(copy.deepcopy(tiny_model)), job)
    kept = weakref.ref(next(results))
    gc.collect()
    assert kept() is None
