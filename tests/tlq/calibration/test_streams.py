"""The computations on the two activation streams, and their number."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import LayerLoop
from tlq.calibration.streams import Streams
from tlq.models.architectures import get_linear
from tlq.models.decoder import observe
from tlq.models.streaming import ResidentModel
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import RECIPES
from tlq.samples import Batch

QUANTIZER = WeightQuantizer(get_scheme("w3a16", group_size=64), torch.float32)


class Rows:
    """Number of tokens in each call of a module."""

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
        for group in ResidentModel(tiny_model).architecture.groups[0]:
            marks = [torch.zeros(batch.valid.shape) for batch in batches]
            for mark, batch in zip(marks, batches, strict=True):
                mark[:, ::3] = 1.0
                mark[~batch.valid] = 0.0
            found[index, group.name] = marks
    return found


def loop_over(model: PreTrainedModel, batches: Sequence[Batch], weights: Any) -> LayerLoop:
    return LayerLoop(ResidentModel(model), CalibrationJob(RECIPES["tlq"], QUANTIZER, batches, weights))


@torch.no_grad()
def test_no_module_runs_more_often_than_the_streams_need(
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
        assert gate.calls == (every + chosen + every if advances else chosen + chosen)
        assert down.calls == (every + every if advances else [])


@torch.no_grad()
def test_group_inputs_are_those_in_a_pass_through_the_whole_quantized_layer(
    model: PreTrainedModel, batches: list[Batch], few: dict[tuple[int, str], list[Tensor]]
) -> None:
    """The streams are walked by hand here, and every group is rounded to nearest in between."""
    job = CalibrationJob(RECIPES["tlq"], QUANTIZER, batches, few)
    resident = ResidentModel(model)
    streams = Streams(resident, job)
    for index, layer in resident.layers(range(2)):
        streams.full_precision(index, layer)
        for group in resident.architecture.groups[0]:
            rows, _ = streams.exposed_inputs(index, layer, group)
            linear = layer.get_submodule(group.linears[0])
            for number, call in enumerate(streams.calls):
                seen, _ = observe(layer, streams.exposed[number], call.kwargs[index], {group.name: linear})
                (hidden,), _ = seen[group.name]
                torch.testing.assert_close(rows[number], hidden[few[index, group.name][number] > 0])
            for path in group.linears:
                quantized = get_linear(layer, path)
                quantized.weight.copy_(QUANTIZER.fake_quantize(quantized.weight))
        streams.advance_exposed(index, layer)
