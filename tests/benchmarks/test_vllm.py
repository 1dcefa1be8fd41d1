"""The vLLM backend, with a stand-in for lm-eval's class: vLLM itself needs a GPU."""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from PIL import Image

from benchmarks.data import BenchmarkError, BenchmarkSource
from benchmarks.divergence import ItemKey
from benchmarks.harness import load_benchmarks, namer, run_on
from benchmarks.items import Finished
from benchmarks.vllm import WrappedLM, load_vllm
from tasks.config.sections import EvaluateParams
from tasks.stages.evaluate import evaluate_variant

Make = Callable[..., BenchmarkSource]


class Stub:
    """The part of lm-eval's vLLM model that this project uses."""

    tokenizer_name = "stub"

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.chunks: list[int] = []

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_history[0]["content"]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.chunks.append(len(requests))
        for request in requests:
            assert all(isinstance(image, Image.Image) for image in request.args[2]["visual"])
            assert request.args[1]["max_gen_toks"] == 5
        return [request.doc["answers"][0] for request in requests]


def test_chunks_failures_and_finished_items(textvqa: Make) -> None:
    def truncate(rows: list[dict[str, Any]]) -> None:
        rows[4]["image"]["bytes"] = rows[4]["image"]["bytes"][:200]

    benchmarks = load_benchmarks([textvqa(6, truncate)], None, 0)
    key = ItemKey("demo_textvqa", "0")
    stub, seen = Stub(), list[Finished]()
    lm = WrappedLM(
        stub,  # type: ignore[arg-type]
        namer(benchmarks),
        chunk_size=2,
        max_new_tokens=5,
        finished={key: Finished(key, "wrong")},
        on_batch=seen.extend,
    )
    (result,) = run_on(lm, benchmarks)
    assert [item.score for item in result.items] == [0, 1, 1, 1, 1]
    assert [skip.doc for skip in result.skipped] == ["4"]
    assert stub.chunks == [2, 1, 1]
    assert len(seen) == 5


def test_missing_vllm_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_vlms", None)
    with pytest.raises(BenchmarkError, match=r"vLLM cannot be imported .*use backend hf"):
        load_vllm("model", "auto", {})


def test_stage_with_vllm(textvqa: Make, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("lm_eval.models.vllm_vlms")
    module.VLLM_VLM = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_vlms", module)
    params = EvaluateParams(benchmarks=(textvqa(3),), backend="vllm", max_new_tokens=5, resamples=10)
    metrics = evaluate_variant("full", str(tiny_checkpoint), params, tmp_path)
    assert metrics.mean.score == 100
    assert metrics.mean.nll is None
    assert load_vllm("m", "auto", {"max_pixels": 9}).options["mm_processor_kwargs"] == {"max_pixels": 9}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmarks": ()}, "benchmarks"),
        ({"limit": 0}, "limit"),
        ({"batch_size": -1}, "batch_size"),
        ({"max_skipped": 2.0}, "max_skipped"),
    ],
)
def test_params_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluateParams(**{"benchmarks": (BenchmarkSource("demo_textvqa"),)} | change)
