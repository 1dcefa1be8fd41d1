"""Stage `importance`: its output matches the samples and the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tasks.files import IMPORTANCE, PREPARED, read_importance, read_pool, read_samples
from tasks.stages import importance
from tlq.importance.pool import Importance, TokenPool
from tlq.samples import Batch


@pytest.fixture(autouse=True)
def _in_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


def test_sequences_are_the_tokens_of_the_chosen_samples(tiny_processor: Any) -> None:
    pool = read_pool(IMPORTANCE)
    samples = read_samples(PREPARED / "calibration.parquet", 5)
    assert pool.samples == 5
    image_id = tiny_processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for sample, ids, marks in zip(samples, pool.split(pool.token_ids), pool.split(pool.is_image), strict=True):
        text = tiny_processor.tokenizer.decode(ids).replace("<|image_pad|>", "")
        question, answer = (message["content"] for message in sample.messages)
        assert text == (
            f"<|im_start|>user\n<|vision_start|><|vision_end|>{question.removeprefix('<image>')}<|im_end|>\n"
            f"<|im_start|>assistant\n{answer}<|im_end|>"
        )
        assert np.array_equal(marks, ids == image_id)
    for sample, ids, marks in zip(samples, pool.split(pool.token_ids), pool.split(pool.is_answer), strict=True):
        assert tiny_processor.tokenizer.decode(ids[marks]) == sample.messages[1]["content"] + "<|im_end|>"


def test_scores_are_those_of_the_method(scores: Importance, batches: list[Batch], project: Path) -> None:
    """The same samples are scored in other batches; `prepare` shuffles samples, so they are matched by id."""
    assert project.exists()
    found = read_importance(IMPORTANCE)
    order = [int(sample.id[1:]) for sample in read_samples(PREPARED / "calibration.parquet", 5)]
    assert set(found) == set(scores)
    pool = TokenPool.of(batches)
    for key, values in found.items():
        expected = np.concatenate([pool.split(scores[key])[sample] for sample in order])
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"importance": {"samples": 99}}, ValueError, "99 samples needed, 6 found; raise prepare.samples"),
        (
            {"importance": {"samples": 5, "max_tokens": 10}},
            ValueError,
            "more than the 10 allowed; raise max_tokens",
        ),
        ({"model": {"path": "nowhere/at/all"}}, FileNotFoundError, "model nowhere/at/all: not a directory here"),
    ],
)
def test_impossible_jobs_say_what_to_change(
    tmp_path: Path,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    params = {**yaml.safe_load((project / "params.yaml").read_text()), **changes}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "data").symlink_to(project / "data")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        importance.main()
