"""The vLLM backend, with stand-ins for vLLM and lm-eval's class of it, which need an environment of their own."""

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from PIL import Image
from support.benchmark_rows import WORDS

from benchmarks import vllm
from benchmarks.data import BenchmarkError, BenchmarkSource
from benchmarks.divergence import ItemKey
from benchmarks.harness import load_benchmarks, run_vllm
from benchmarks.items import AnswerOptions, Finished
from benchmarks.vllm import load_vllm
from tasks.config.sections import EvaluateParams
from tasks.stages.evaluate import evaluate_variant
from tlq.models.processor import load_processor

Make = Callable[..., BenchmarkSource]


class Stub:
    """The part of lm-eval's vLLM model that this project uses; it answers the first word of the reference answers."""

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.chunks: list[int] = []
        self.model = self
        self.prompts: list[dict[str, Any]] = []

    def generate_until(self, requests: list[Instance]) -> list[str]:
        assert self.chat_applied  # prompts have image tokens already
        self.chunks.append(len(requests))
        for request in requests:
            assert all(isinstance(image, Image.Image) for image in request.args[2]["visual"])
            assert request.args[1] == {"until": [], "do_sample": False, "max_gen_toks": 5}
        return [WORDS[int(re.search(r"(\d+)\?", request.args[0])[1]) % len(WORDS)] for request in requests]  # type: ignore[index]

    def generate(self, prompts: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        """Every token of a prompt has the log-probability -1 / (1 + its position from the end)."""
        assert sampling_params.prompt_logprobs == 0
        self.prompts += prompts
        return [
            SimpleNamespace(
                prompt_logprobs=[
                    {token: SimpleNamespace(logprob=-1.0 / (len(prompt["prompt_token_ids"]) - place))}
                    for place, token in enumerate(prompt["prompt_token_ids"])
                ]
            )
            for prompt in prompts
        ]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("lm_eval.models.vllm_vlms")
    module.VLLM_VLM = Stub
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_vlms", module)
    module = types.ModuleType("vllm")
    module.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)


def test_chunks_failures_and_finished_items(
    textvqa: Make, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def truncate(rows: list[dict[str, Any]]) -> None:
        rows[4]["image"]["bytes"] = rows[4]["image"]["bytes"][:200]

    monkeypatch.setattr(vllm, "CHUNK", 2)
    benchmarks = load_benchmarks([textvqa(6, truncate)], None, 0)
    key = ItemKey("demo_textvqa", "0")
    stub, seen = Stub(), list[Finished]()
    options = AnswerOptions(1, 5, finished={key: Finished(key, "wrong")}, on_batch=seen.extend)
    (result,) = run_vllm(benchmarks, stub, load_processor(tiny_checkpoint), options)
    assert [item.score for item in result.items] == [0, 1, 1, 1, 1]
    assert [skip.doc for skip in result.skipped] == ["4"]
    assert stub.chunks == [2, 1, 1]
    assert len(seen) == 5


def test_the_reference_answer_is_measured_at_the_end_of_its_prompt(textvqa: Make, tiny_checkpoint: Path) -> None:
    benchmarks = load_benchmarks([textvqa(4)], None, 0)
    stub, processor = Stub(), load_processor(tiny_checkpoint)
    (result,) = run_vllm(benchmarks, stub, processor, AnswerOptions(1, 5), measured_items=2)
    measured = [item for item in result.items if item.nll is not None]
    assert len(measured) == len(stub.prompts) == 2
    for item, prompt in zip(measured, stub.prompts, strict=True):
        answer = processor.tokenizer(f"{item.target}<|im_end|>").input_ids
        assert prompt["prompt_token_ids"] == [*processor.tokenizer(item.prompt).input_ids, *answer]
        assert prompt["prompt_token_ids"].count(processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")) == 1
        assert item.n_answer_tokens == len(answer)
        assert item.nll == pytest.approx(sum(1 / (1 + place) for place in range(len(answer))) / len(answer))
        assert item.kl is None


def test_missing_vllm_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_vlms", None)
    with pytest.raises(BenchmarkError, match=r"vLLM cannot be imported .*use backend hf"):
        load_vllm("model", "auto", {})


def test_stage_with_vllm(textvqa: Make, tiny_checkpoint: Path, tmp_path: Path) -> None:
    params = EvaluateParams(benchmarks=(textvqa(3),), backend="vllm", max_new_tokens=5, resamples=10)
    metrics = evaluate_variant("full", str(tiny_checkpoint), params, tmp_path)
    assert metrics.mean.score == 100
    assert metrics.mean.nll is not None
    assert metrics.mean.kl is None
    unmeasured = params.model_copy(update={"divergence": False})
    assert evaluate_variant("full", str(tiny_checkpoint), unmeasured, tmp_path / "other").mean.nll is None
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
