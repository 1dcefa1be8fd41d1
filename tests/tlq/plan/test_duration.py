"""Expected seconds: a plan counts the operations that the job computes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.families import batches_of, write_tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tlq.api import plan
from tlq.calibration.allocation import measure
from tlq.calibration.job import CalibrationJob
from tlq.calibration.loop import calibrate_layers
from tlq.importance.gradients import keeps_graph, score_tokens
from tlq.importance.losses import AnswerLoss, BlockLoss, Loss
from tlq.importance.pool import Importance, TokenPool
from tlq.importance.token_weights import all_tokens, to_batches
from tlq.importance.weighting import Weighting
from tlq.models.sizes import ModelSizes
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks
from tlq.plan.duration import time_allocation, time_calibration, time_importance
from tlq.plan.needs import plan_allocation, plan_calibration, plan_importance
from tlq.plan.speed import LayerSpeed, Probe, Speed, layer_speeds, measure_speed
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import RECIPES
from tlq.runtime.clock import in_words
from tlq.samples import Batch, Sample


class Products(TorchDispatchMode):
    """Counts the operations of matrix products and attention inside its context."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=output)
        return output


#: With no time for anything else, seconds are operations of matrix products.
NOTHING = math.inf


@pytest.fixture(scope="module")
def streamed(tiny_checkpoint: Path) -> StreamedModel:
    return StreamedModel(tiny_checkpoint)


@pytest.fixture(scope="module")
def speed(streamed: StreamedModel) -> Speed:
    layer = streamed.architecture.decoder_layers(streamed.skeleton)[0]
    per_token = 2 * sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
    layers = {0: LayerSpeed(per_token, per_token)}
    return Speed(layers, 0.0, NOTHING, 1.0, NOTHING, NOTHING, NOTHING, NOTHING)


def job_of(recipe: str, scheme: str, batches: list[Batch], scores: Importance, ranks: int = 1) -> CalibrationJob:
    row, quantizer = RECIPES[recipe], WeightQuantizer(get_scheme(scheme), torch.bfloat16)
    if not row.needs_data():
        return CalibrationJob(row, quantizer, [])
    weights = to_batches(all_tokens(scores, TokenPool.of(batches), "uniform", Weighting()), batches)
    return CalibrationJob(row, quantizer, batches, weights, ranks=Ranks(size=ranks))


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_calibration_computes_the_planned_products(
    streamed: StreamedModel, batches: list[Batch], scores: Importance, speed: Speed, recipe: str, scheme: str
) -> None:
    job = job_of(recipe, scheme, batches, scores)
    timed = time_calibration(plan_calibration(streamed, job), streamed, job, speed)
    with Products() as counter:
        list(calibrate_layers(streamed, job))
    computed, planned = counter.operations, sum(timed.seconds.values())
    # Triangular solves are planned, but not counted; attention itself is counted, but not planned.
    assert planned == computed == 0 if recipe == "rtn" else 0.9 < planned / computed < 1.2


@pytest.mark.parametrize(
    "loss", [AnswerLoss(), BlockLoss(get_scheme("w3a16"), torch.bfloat16)], ids=["answer", "block"]
)
@pytest.mark.parametrize("memory", ["", "0.0001"], ids=["graph kept", "graph computed again"])
def test_importance_computes_the_planned_products(
    streamed: StreamedModel,
    batches: list[Batch],
    speed: Speed,
    loss: Loss,
    memory: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if memory:
        monkeypatch.setenv("TLQ_DEVICE_MEMORY", memory)
    assert keeps_graph(streamed, batches) == (not memory)
    timed = time_importance(
        plan_importance(streamed, batches, Ranks(), [loss]), streamed, batches, speed, losses=[loss]
    )
    with Products() as counter:
        score_tokens(streamed, batches, loss)
    assert 0.8 < sum(timed.seconds.values()) / counter.operations < 1.1


@pytest.mark.parametrize("recipe", ["tlq-c", "awq"])
def test_ranks_share_the_work(
    streamed: StreamedModel, batches: list[Batch], scores: Importance, speed: Speed, recipe: str
) -> None:
    one, two = (
        time_calibration(plan_calibration(streamed, job), streamed, job, speed)
        for job in (job_of(recipe, "w3a16", batches, scores, ranks) for ranks in (1, 2))
    )
    assert sum(two.seconds.values()) == pytest.approx(sum(one.seconds.values()) / 2)


def test_groups_in_full_precision_take_no_time(
    streamed: StreamedModel, batches: list[Batch], scores: Importance, speed: Speed
) -> None:
    whole = job_of("gptq", "w3a16", batches, scores)
    scheme = replace(get_scheme("w3a16"), overrides=(("*.mlp.*", "full_precision"),))
    part = replace(whole, quantizer=replace(whole.quantizer, scheme=scheme))
    all_of_it, some = (time_calibration(plan_calibration(streamed, job), streamed, job, speed) for job in (whole, part))
    assert some.seconds["forward"] == all_of_it.seconds["forward"]
    assert some.seconds["search"] < all_of_it.seconds["search"]
    assert some.seconds["round"] < all_of_it.seconds["round"]


def test_a_budget_is_distributed_with_the_planned_products(
    streamed: StreamedModel, batches: list[Batch], scores: Importance, speed: Speed
) -> None:
    quantizer = WeightQuantizer(get_scheme("mix4"), torch.bfloat16)
    job = CalibrationJob(RECIPES["tlq"], quantizer, batches, ranks=Ranks())
    timed = time_allocation(plan_allocation(streamed, job), streamed, job, speed)
    with Products() as counter:
        measure(streamed, job, {key: np.ones_like(values) for key, values in scores.items()})  # every token counts
    assert 0.8 < sum(timed.seconds.values()) / counter.operations < 1.25


@pytest.mark.parametrize(
    "loss", [AnswerLoss(), BlockLoss(get_scheme("w3a16"), torch.bfloat16)], ids=["answer", "block"]
)
def test_importance_reads_the_layers_as_often_as_planned(
    tiny_checkpoint: Path, batches: list[Batch], loss: Loss, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLQ_DEVICE_MEMORY", "0.0001")
    model = StreamedModel(tiny_checkpoint)
    reads: list[str] = []
    read = model.read
    monkeypatch.setattr(model, "read", lambda names, *rest: read([reads.append(name) or name for name in names], *rest))
    score_tokens(model, batches, loss)
    norm = model.layer_names(0)[0]
    stored = ModelSizes(model).whole // 2  # bfloat16 on disk, float32 in memory
    speed = Speed({0: LayerSpeed(0.0, 0.0)}, 0.0, stored, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING)
    timed = time_importance(plan_importance(model, batches, Ranks(), [loss]), model, batches, speed, losses=[loss])
    assert timed.seconds["load"] == pytest.approx(reads.count(norm))


def test_the_plan_of_a_mix_has_the_distribution_of_its_budget(tiny_checkpoint: Path, samples: list[Sample]) -> None:
    planned = plan(tiny_checkpoint, samples, "rtn", "mix4", timed=True, device="cpu")
    assert [part.work for part in planned] == ["importance", "allocation", "calibration"]
    assert all(part.seconds for part in planned)


@pytest.mark.parametrize("problem", ["memory runs out", "least does not fit"])
def test_a_machine_too_small_to_measure_gets_a_plan_without_time(
    tiny_checkpoint: Path,
    samples: list[Sample],
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if problem == "memory runs out":
        monkeypatch.setattr(StreamedModel, "read", fails)
    else:
        monkeypatch.setenv("TLQ_DEVICE_MEMORY", "0.0001")
    planned = plan(tiny_checkpoint, samples, "tlq-c", "w3a16", timed=True, device="cpu")
    assert [dict(part.seconds) for part in planned] == [{}, {}]
    assert "time unknown: " in caplog.text


def test_a_machine_is_measured_with_the_jobs_model_and_samples(
    streamed: StreamedModel, samples: list[Sample], tiny_checkpoint: Path
) -> None:
    measured = measure_speed(streamed, Probe(samples, 2, 4096))
    rates = (measured.read, measured.products, measured.factor, measured.nearest, measured.columns, measured.ranges)
    assert all(0 < rate < math.inf for rate in rates)
    assert measured.enter > 0
    assert {index: layer.forward > 0 < layer.backward for index, layer in measured.layers.items()} == {0: True}
    without = measure_speed(streamed, Probe([], 2, 4096))
    assert (without.layers, without.enter) == ({}, 0.0)
    importance, calibration = plan(tiny_checkpoint, samples, "tlq-c", "w3a16", timed=True, device="cpu")
    assert list(importance.seconds) == ["enter", "load", "gradients"]
    assert min(calibration.seconds.values()) > 0
    assert calibration.lines()[-1].startswith("time: about ")
    assert plan(tiny_checkpoint, [], "rtn", "w3a16", timed=True, device="cpu")[0].seconds["round"] > 0
    assert not plan(tiny_checkpoint, samples, "tlq-c", "w3a16", device="cpu")[0].seconds


@pytest.mark.parametrize("family", ["qwen3_5_moe", "llama4", "gemma4-shared_kv"])
def test_layers_of_every_kind_are_measured(family: str, tmp_path: Path) -> None:
    model = StreamedModel(write_tiny(family, tmp_path / "model"))
    enter, layers = layer_speeds(model, batches_of(family)[0])
    assert enter > 0
    alike = ModelSizes(model).alike
    assert set(alike) <= set(layers)
    every = model.architecture.decoder_layers(model.skeleton)
    for index, first in enumerate(alike):
        assert [each.shape for each in every[index].parameters()] == [each.shape for each in every[first].parameters()]
    assert all(0 < layer.forward < math.inf and 0 < layer.backward < math.inf for layer in layers.values())


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")]
)
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert in_words(seconds) == text
