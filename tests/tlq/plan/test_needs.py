"""The plan of a job: its numbers, and the refusal of an impossible job before any work."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exporting import read_tensors

import tlq
from tlq.calibration.job import CalibrationJob
from tlq.importance.losses import AnswerLoss, BlockLoss
from tlq.models.streaming import StreamedModel
from tlq.parallel import Ranks
from tlq.plan.needs import Plan, exported_bytes, plan_calibration, plan_importance, refuse_impossible
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.recipes import RECIPES
from tlq.samples import Batch, Sample

CPU = torch.device("cpu")
GIB = 2**30
SMALL = Plan(
    "calibration", 2, 0, 0, 8, 8, device=6 * GIB, least=3 * GIB, hidden_states=2 * GIB, budget=GIB, disk=5 * GIB
)


def job_of(recipe: str, batches: list[Batch], ranks: Ranks = Ranks()) -> CalibrationJob:  # noqa: B008
    return CalibrationJob(RECIPES[recipe], WeightQuantizer(get_scheme("w3a16"), torch.bfloat16), batches, ranks=ranks)


@pytest.fixture(scope="module")
def streamed(tiny_checkpoint: Path) -> StreamedModel:
    return StreamedModel(tiny_checkpoint)


def test_the_plan_counts_weights_and_tokens(streamed: StreamedModel, batches: list[Batch]) -> None:
    found = plan_calibration(streamed, job_of("tlq", batches), counted=40)
    layer = streamed.architecture.decoder_layers(streamed.skeleton)[0]
    assert found.layer == 4 * sum(parameter.numel() for parameter in layer.parameters())
    assert found.outside == 4 * sum(parameter.numel() for parameter in streamed.skeleton.parameters()) - 2 * found.layer
    assert found.tokens == sum(batch.valid.numel() for batch in batches)
    assert found.counted == 40
    assert found.hidden_states == 3 * found.tokens * 128 * 4  # both paths, and outputs of the attention
    assert any("2 decoder layers" in line for line in found.lines())


def test_larger_jobs_need_more_memory(streamed: StreamedModel, batches: list[Batch]) -> None:
    def device(recipe: str, ranks: Ranks | None = None, own: list[Batch] = batches) -> int:
        return plan_calibration(streamed, job_of(recipe, own, ranks or Ranks())).device

    assert device("tlq-c", own=batches[:1]) < device("tlq-c", own=batches) < device("tlq-c", own=batches * 20)
    assert device("tlq-c", Ranks(size=2), batches * 20) < device("tlq-c", Ranks(), batches * 20)
    assert device("rtn", own=[]) < device("gptq") <= device("tlq-c")
    one, two = (plan_importance(streamed, batches, Ranks(), [AnswerLoss()] * losses) for losses in (1, 2))
    assert two.disk == 2 * one.disk


@pytest.mark.parametrize("scheme", ["w2a16", "w3a16", "w4a8"])
def test_the_size_of_the_result_is_that_of_its_tensors(
    streamed: StreamedModel, tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path, scheme: str
) -> None:
    tlq.quantize(tiny_checkpoint, tmp_path / "out", samples, "rtn", scheme)
    written = sum(value.numel() * value.element_size() for value in read_tensors(tmp_path / "out").values())
    assert exported_bytes(streamed, get_scheme(scheme)) == pytest.approx(written, rel=0.05)


def test_tensors_that_are_carried_over_are_part_of_the_size(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    scheme = get_scheme("w3a16")
    before = exported_bytes(StreamedModel(tmp_path / "model"), scheme)
    (file,) = (tmp_path / "model").glob("*.safetensors")
    extra = {"mtp.norm.weight": torch.zeros(7, dtype=torch.bfloat16), "mtp.codes": torch.zeros(3, 5, dtype=torch.int8)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    assert exported_bytes(StreamedModel(tmp_path / "model"), scheme) == before + 14 + 15


@pytest.mark.parametrize(
    ("free", "disk", "error", "message"),
    [
        (2, 99, MemoryError, r"one rank needs at least 3\.00 GiB on cpu, 2\.00 GiB are free; compute in bfloat16"),
        (
            7,
            99,
            MemoryError,
            r"2 rank\(s\) need at least 8\.00 GiB of this host's memory, 7\.00 GiB are free; lower TLQ_",
        ),
        (99, 6, OSError, r"about 7\.00 GiB are needed on the disk of .*, 6\.00 GiB are free"),
    ],
)
def test_an_impossible_job_is_refused_with_the_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, disk: int, error: type[Exception], message: str
) -> None:
    memory, usage = namedtuple("memory", "available"), namedtuple("usage", "free")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(free * GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(disk * GIB))
    with pytest.raises(error, match=message):
        refuse_impossible(SMALL, tmp_path / "out", CPU, processes=2)


@pytest.mark.parametrize(("free", "warnings"), [(14, 0), (9, 1)])
def test_a_job_between_lower_bound_and_estimate_is_warned_about_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, free: int, warnings: int
) -> None:
    memory, usage = namedtuple("memory", "available"), namedtuple("usage", "free")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(free * GIB))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(99 * GIB))
    refuse_impossible(SMALL, tmp_path / "out", CPU, processes=2)
    assert len(caplog.records) == warnings
    if warnings:
        assert "need 6.00 GiB on cpu (9.00 GiB free), 2 rank(s) 14.00 GiB" in caplog.text


def test_the_lower_bound_is_below_the_estimate(streamed: StreamedModel, batches: list[Batch]) -> None:
    for recipe in RECIPES:
        plan = plan_calibration(streamed, job_of(recipe, batches if RECIPES[recipe].needs_data() else []))
        assert plan.layer < plan.least < plan.device
    plan = plan_importance(streamed, batches, Ranks())
    assert plan.outside <= plan.least < plan.device


def test_existing_results_need_no_disk_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(4 * GIB))
    needed = replace(SMALL, device=1, least=1, hidden_states=0)
    with pytest.raises(OSError, match=r"about 5\.00 GiB are needed"):
        refuse_impossible(needed, tmp_path, CPU, processes=1)
    refuse_impossible(needed, tmp_path, CPU, processes=1, there=2 * GIB)


def test_a_smaller_device_can_be_planned_for(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path
) -> None:
    monkeypatch.setenv("TLQ_DEVICE_MEMORY", "0.0001")
    with pytest.raises(MemoryError, match=r"calibration: one rank needs at least .* on cpu, 0\.00 GiB are free"):
        tlq.quantize(tiny_checkpoint, tmp_path / "out", samples, "tlq", "w3a16")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_goes_through_the_layers_in_waves_is_planned_so(
    streamed: StreamedModel, batches: list[Batch]
) -> None:
    answer, block = AnswerLoss(), BlockLoss(get_scheme("w3a16"), torch.bfloat16)
    kept, waves, both = (
        plan_importance(streamed, batches, Ranks(), losses) for losses in ([answer], [block], [answer, block])
    )
    assert kept.hidden_states < waves.hidden_states == both.hidden_states
    assert both.device == max(kept.device, waves.device)
