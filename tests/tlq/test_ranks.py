"""One rank or several, and after kills: the same bits, for decoders of every kind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from support.exporting import read_tensors
from support.families import batches_of, write_tiny
from support.forked_ranks import RESULT, finish_ranks, killed, quantize, start_ranks
from support.ranked_job import assert_equal
from support.tiny import random_samples, write_tiny_qwen2_vl

from tlq.models.batches import calibration_batches
from tlq.models.streaming import StreamedModel
from tlq.quantization import rounding
from tlq.samples import Batch

#: A hybrid of delta nets and attention, experts after attention, experts in a hybrid with a shared expert, experts
#: whose input the router scales, and layers that attend with the keys of others.
FAMILIES = ("qwen3_5", "qwen3_vl_moe", "qwen3_5_moe", "llama4", "gemma4-shared_kv")

Source = tuple[Path, Sequence[Batch]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    """The checkpoint of a family and batches for it; ``dense`` has four layers and 12 micro-batches."""

    @cache
    def made(name: str) -> Source:
        folder = tmp_path_factory.mktemp(name)
        if name != "dense":
            return write_tiny(name, folder), batches_of(name, batch_size=1)
        write_tiny_qwen2_vl(folder, layers=4)
        return folder, calibration_batches(StreamedModel(folder), random_samples(24), 2, 512)

    return made


@pytest.fixture(scope="module")
def alone(
    source: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], dict[str, torch.Tensor]]:
    """The result of one process."""

    @cache
    def made(name: str, recipe: str, scheme: str) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp("alone")
        quantize(folder, *source(name), recipe, scheme)
        return read_tensors(folder / RESULT)

    return made


@pytest.fixture(autouse=True)
def several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights as small as these are rounded in several parts."""
    monkeypatch.setattr(rounding, "_LEAST_ROWS", 32)


@pytest.mark.parametrize(
    ("name", "recipe", "scheme", "count"),
    [
        ("dense", "tlq", "w4a8", 2),
        ("dense", "tlq-c", "w3a16", 2),
        ("dense", "tlq-c", "w3a16", 3),
        ("dense", "mbq", "w3a16", 2),
        *((name, "tlq-c", "w4a16", count) for name in FAMILIES for count in (2, 3)),
        ("qwen3_5_moe", "gptq", "w3a16", 2),
    ],
)
def test_any_number_of_ranks_gives_the_same_bits(
    source: Callable[[str], Source],
    alone: Callable[[str, str, str], dict[str, torch.Tensor]],
    tmp_path: Path,
    name: str,
    recipe: str,
    scheme: str,
    count: int,
) -> None:
    """Second moments, token by token, and through the parent module; own weights of experts, and shared ones."""
    expected = alone(name, recipe, scheme)
    finish_ranks(start_ranks(count, tmp_path / "job", *source(name), recipe, scheme))
    out = tmp_path / "job" / RESULT
    assert_equal(read_tensors(out), expected)
    assert {layer["ranks"] for layer in json.loads((out / "calibration.json").read_text())["layers"]} == {count}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_kill_between_layers_changes_no_bit(
    source: Callable[[str], Source],
    alone: Callable[[str, str, str], dict[str, torch.Tensor]],
    tmp_path: Path,
    name: str,
) -> None:
    """Two ranks begin, are killed after the first layer, and three continue: also past experts that were solved."""
    job = (tmp_path / "job", *source(name), "tlq-c", "w4a16")
    started = start_ranks(2, *job)
    first = tmp_path / "job" / f".{RESULT}.work" / "part-00000.json"
    until = time.monotonic() + 300
    while not first.exists():
        assert time.monotonic() < until
        assert any(process.is_alive() for process in started)
        time.sleep(0.01)
    killed(started)
    assert not (tmp_path / "job" / RESULT).exists()
    finish_ranks(start_ranks(3, *job))
    assert_equal(read_tensors(tmp_path / "job" / RESULT), alone(name, "tlq-c", "w4a16"))
