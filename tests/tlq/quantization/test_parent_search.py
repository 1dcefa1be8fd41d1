"""AWQ's and MBQ's search for scales, written out plainly from their papers, finds the same errors and exponents.

The plain version has its own quantizer, gets inputs from ordinary forward passes, copies the module it measures, and
goes through the grid with one loop.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlq.calibration.group import GroupProblem, GroupSolution, GroupSolver
from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import LayerLoop
from tlq.importance.pool import Importance, TokenPool
from tlq.importance.weighting import Weighting, token_weights
from tlq.models.architectures import architecture_of
from tlq.models.streaming import ResidentModel
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import RECIPES
from tlq.samples import Batch

LINEARS = {
    "qkv": ("self_attn", ["q_proj", "k_proj", "v_proj"]),
    "gate_up": ("mlp", ["gate_proj", "up_proj"]),
    "down": ("mlp.down_proj", [""]),
}


def pseudo_quantize(weight: Tensor, scheme: str) -> Tensor:
    """Weights as integers and back, three bits in groups of 128 with a zero-point, or four bits a row without."""
    if scheme == "w4a8":
        scale = weight.abs().amax(1, keepdim=True) / 7.5
        return (weight / scale).round().clamp(-8, 7) * scale
    groups = weight.reshape(-1, 128)
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 7
    zero = (-low / scale).round().clamp(0, 7)
    return (((groups / scale).round() + zero).clamp(0, 7) - zero).mul(scale).reshape(weight.shape)


def quantize_token(hidden: Tensor) -> Tensor:
    scale = hidden.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127.5
    return (hidden / scale).round().clamp(-128, 127) * scale


def calls_of(model: Any, path: str, batches: list[Batch]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of all calls of the module at ``path`` of the first decoder layer."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    module = model.model.language_model.layers[0].get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _, args, named: calls.append((args, named)), with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(**batch.encode(), use_cache=False)
    handle.remove()
    return calls


def hidden_of(call: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    args, named = call
    return args[0] if args else named["hidden_states"]


def with_hidden(call: tuple[tuple[Any, ...], dict[str, Any]], hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, named = call
    return ((hidden, *args[1:]), named) if args else (args, {**named, "hidden_states": hidden})


def plain_search(
    model: Any, group: str, batches: list[Batch], weights: list[Tensor], scheme: str, norm: int, duo: bool
) -> dict[tuple[float, bool], float]:
    """Error of the module's output for every point of the grid."""
    path, names = LINEARS[group]
    module = model.model.language_model.layers[0].get_submodule(path)
    calls = calls_of(model, path, batches)
    tokens = torch.cat([hidden_of(call)[batch.valid] for call, batch in zip(calls, batches, strict=True)])
    x_mean = tokens.abs().mean(0)
    stacked = torch.cat([module.get_submodule(name).weight.detach() for name in names])
    blocks = stacked.abs().reshape(len(stacked), -1, stacked.shape[1] if scheme == "w4a8" else 128)
    w_mean = (blocks / blocks.amax(2, keepdim=True)).reshape(stacked.shape).mean(0)

    losses = {}
    for point in range(20):
        for with_weight in (False, True) if duo else (False,):
            ratio = point / 20
            s = x_mean**ratio / (w_mean ** (1 - ratio) if with_weight else 1)
            s = s / (s.max() * s.min()).sqrt()
            trial = copy.deepcopy(module)
            for name in names:
                linear: Any = trial.get_submodule(name)
                linear.weight.data = pseudo_quantize(linear.weight.data * s, scheme)
                bits = quantize_token if scheme == "w4a8" else nn.Identity()
                linear.register_forward_pre_hook(lambda _, args, s=s, bits=bits: (bits(args[0] / s), *args[1:]))
            loss = 0.0
            for (args, named), weight in zip(calls, weights, strict=True):
                wanted, got = module(*args, **named), trial(*args, **named)
                wanted, got = (part[0] if isinstance(part, tuple) else part for part in (wanted, got))
                loss += float(((wanted - got).abs() ** norm * weight[..., None]).sum())
            losses[ratio, with_weight] = loss
    return losses


class Recorder(GroupSolver):
    """Keeps the errors of all candidates of every group, measured before the group is solved."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.errors_of_groups: list[list[float]] = []

    def solve(self, problem: GroupProblem) -> GroupSolution:
        errors, tried = self.errors(problem), self.candidates(problem)
        parts = range(errors.parts)
        self.errors_of_groups.append([sum(errors.measure([(each, part) for part in parts])) for each in tried])
        return super().solve(problem)


@pytest.mark.parametrize(
    ("name", "scheme", "group"),
    [
        ("awq", "w3a16", "qkv"),
        ("awq", "w4a8", "qkv"),
        ("mbq", "w3a16", "qkv"),
        ("mbq", "w3a16", "gate_up"),
        ("mbq", "w3a16", "down"),
        ("mbq", "w4a8", "qkv"),
    ],
)
@torch.no_grad()
def test_the_search_chooses_the_exponent_of_a_plain_implementation(
    tiny_model: PreTrainedModel,
    batches: list[Batch],
    scores: Importance,
    name: str,
    scheme: str,
    group: str,
) -> None:
    recipe = RECIPES[name]
    model: Any = copy.deepcopy(tiny_model)
    architecture = architecture_of(model.config)
    architecture.decoder_layers(model).__delitem__(slice(1, None))  # the first layer is enough
    pool = TokenPool.of(batches)
    weights = {}
    for key, raw in scores.items():
        per_sample = pool.split(token_weights(raw, pool, recipe.importance, Weighting()))
        parts = [torch.zeros(batch.valid.shape) for batch in batches]
        for sample, values in enumerate(per_sample):
            _, number, row, valid = _row(batches, sample)
            parts[number][row, valid] = torch.from_numpy(values)
        weights[key] = parts

    norm = {"awq": 2, "mbq": 1}[name]
    losses = plain_search(model, group, batches, weights[0, group], scheme, norm, duo=name == "awq")
    best = min(losses, key=losses.__getitem__)
    assert 0 < best[0] < 0.95  # a search whose answer is an end of the grid would prove little

    job = CalibrationJob(recipe, WeightQuantizer(get_scheme(scheme), torch.float32), batches, weights)
    resident = ResidentModel(model)
    loop = LayerLoop(resident, job)
    loop.solver = recorder = Recorder(resident, job, loop.streams)
    ((index, layer),) = resident.layers([0])
    report = next(report for report in loop.solve_layer(index, layer).reports if report.group == group)
    found = dict(zip(("qkv", "o_proj", "gate_up", "down"), recorder.errors_of_groups, strict=True))
    if scheme == "w4a8":  # activations on a rounding edge fall either way
        assert np.median([a / b for a, b in zip(found[group], losses.values(), strict=True)]) == pytest.approx(
            1, abs=1e-3
        )
        assert losses[report.alpha, report.duo] < 1.03 * losses[best]
    else:
        assert found[group] == pytest.approx(list(losses.values()), rel=1e-3)
        assert (report.alpha, report.duo) == best


def _row(batches: list[Batch], sample: int) -> tuple[Any, int, int, Tensor]:
    """Image marks of a sample, its batch and row, and its valid positions."""
    for number, batch in enumerate(batches):
        if sample in batch.samples:
            row = batch.samples.index(sample)
            return batch.is_image[row][batch.valid[row]].numpy(), number, row, batch.valid[row]
    raise AssertionError(f"sample {sample} is in no batch")
