"""What is computed on the two paths, and how often."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlq.calibration.loop import LayerLoop
from tlq.models.decoder import observe
from tlq.models.streaming import ResidentModel
from tlq.quantization.formats import get_scheme
from tlq.recipes import RECIPES
from tlq.samples import Batch

SCHEME = get_scheme("w3a16", group_size=64)


class Rows:
    """How many tokens each call of a module has computed."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[int] = []
        module.register_forward_hook(
            lambda _module, args, _output: self.calls.append(args[0].numel() // args[0].shape[-1])
        )


@pytest.fixture
def model(tiny_model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(tiny_model)


@pytest.fixture
def few(tiny_model: PreTrainedModel, batches: list[Batch]) -> dict[tuple[int, str], list[Tensor]]:
    """Every third token counts."""
    found = {}
    for index in range(2):
        for group in ResidentModel(tiny_model).architecture.groups:
            marks = [torch.zeros(batch.valid.shape) for batch in batches]
            for mark, batch in zip(marks, batches, strict=True):
                mark[:, ::3] = 1.0
                mark[~batch.valid] = 0.0
            found[index, group.name] = marks
    return found


def loop_over(model: PreTrainedModel, batches: Sequence[Batch], weights: Any) -> LayerLoop:
    return LayerLoop(ResidentModel(model), batches, weights, RECIPES["tlq"], SCHEME, torch.float32)


@torch.no_grad()
def test_nothing_is_computed_that_nobody_looks_at(
    model: PreTrainedModel, batches: list[Batch], few: dict[tuple[int, str], list[Tensor]]
) -> None:
    loop = loop_over(model, batches, few)
    first, last = ResidentModel(model).layers(range(2))
    every = [batch.valid.numel() for batch in batches]
    chosen = [int(mark.sum()) for mark in few[0, "down"]]
    for (index, layer), advances in ((first, True), (last, False)):
        out, gate, down = (
            Rows(layer.get_submodule(path)) for path in ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
        )
        loop.solve_layer(index, layer)
        assert out.calls == every + every  # full precision, and once when the attention is finished
        assert gate.calls == every + chosen + (every if advances else [])
        assert down.calls == (every + every if advances else [])


@torch.no_grad()
def test_groups_see_what_the_whole_quantized_layer_would_give_them(
    model: PreTrainedModel,
    batches: list[Batch],
    few: dict[tuple[int, str], list[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = loop_over(model, batches, few)
    paths, compared = loop.paths, []
    given = paths.exposed_inputs

    def checked(index: int, layer: nn.Module, group: Any) -> Any:
        rows, parents = given(index, layer, group)
        linear = layer.get_submodule(group.linears[0])
        for number, call in enumerate(paths.calls):
            seen, _ = observe(layer, paths.exposed[number], call.kwargs[index], {group.name: linear})
            (hidden,), _ = seen[group.name]
            torch.testing.assert_close(rows[number], hidden[few[index, group.name][number] > 0])
        compared.append((index, group.name))
        return rows, parents

    monkeypatch.setattr(paths, "exposed_inputs", checked)
    for index, layer in ResidentModel(model).layers(range(2)):
        loop.solve_layer(index, layer)
    assert compared == [(index, name) for index in range(2) for name in ("qkv", "o_proj", "gate_up", "down")]
