"""A tiny model, its samples and the stages' results on them, made once per session."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# On tensors as small as these threads only wait for each other; the processes that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from support.slow import SLOW
from support.tiny import random_samples, write_tiny_qwen2_vl
from transformers import PreTrainedModel

from tlq.export.loading import load_model
from tlq.importance.gradients import score_tokens
from tlq.importance.pool import Importance
from tlq.models.processor import load_processor
from tlq.models.streaming import ResidentModel
from tlq.samples import Batch, Sample, encode_batches, image_token_id

# The same examples in every run, and none is timed: a busy machine would fail it.
settings.register_profile("tests", derandomize=True, deadline=None)
settings.load_profile("tests")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of ``SLOW``, and give them more time than the timeout of pyproject.toml."""
    tests = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        places = (number for number, place in enumerate(SLOW) if item.path.is_relative_to(tests / place))
        return next(places, len(SLOW))

    for item in items:
        if rank(item) < len(SLOW):
            item.add_marker(pytest.mark.slow)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(1800))
    items.sort(key=rank)  # the longest files first: none of them is left for the end, when other processes are idle


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2_vl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    return random_samples(6)


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> PreTrainedModel:
    """The tiny model in float32, shared: copy it before changing it."""
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_processor(tiny_checkpoint: Path) -> Any:
    return load_processor(tiny_checkpoint)


@pytest.fixture(scope="session")
def batches(tiny_model: PreTrainedModel, tiny_processor: Any, samples: list[Sample]) -> list[Batch]:
    """The six samples as a micro-batch of four and one of two, padded."""
    return encode_batches(samples, tiny_processor, image_token_id(tiny_model.config), batch_size=4, max_tokens=512)


@pytest.fixture(scope="session")
def scores(tiny_model: PreTrainedModel, batches: list[Batch]) -> Importance:
    return score_tokens(ResidentModel(tiny_model), batches)


@pytest.fixture(scope="session")
def project(tiny_checkpoint: Path, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `prepare`, `importance` and `calibset` have run on the tiny model, by their own main()."""
    from support.forked_stages import first_stages

    return first_stages(tiny_checkpoint, samples, tmp_path_factory.mktemp("project"))
