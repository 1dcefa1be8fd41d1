"""The model for lm-eval: batched and cached answers equal plain answers to single items."""

import copy
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.benchmark_rows import mmmu_rows, write_rows
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.data import BenchmarkError, BenchmarkSource
from benchmarks.divergence import Divergence, ItemKey
from benchmarks.harness import Benchmark, BenchmarkResult, load_benchmarks, run_benchmarks
from benchmarks.items import AnswerOptions, Finished, Work
from benchmarks.model import VisionLM
from tlq.export.loading import load_model
from tlq.inputs.chat import Message
from tlq.models.processor import load_processor
from tlq.samples import Sample, encode_batches, image_token_id

Make = Callable[..., BenchmarkSource]
NEW_TOKENS = 6


class Keep:
    """Meter that keeps its arguments."""

    def __init__(self) -> None:
        self.answers: dict[ItemKey, tuple[Sequence[int], torch.Tensor]] = {}

    def wants(self, key: ItemKey) -> bool:
        return True

    def measure(self, answers: Mapping[ItemKey, tuple[Sequence[int], torch.Tensor]]) -> dict[ItemKey, Divergence]:
        self.answers |= answers
        return {key: Divergence(len(tokens), 1.0, None) for key, (tokens, _) in answers.items()}


def tiny_llava(tokenizer: Any) -> tuple[Any, Any]:
    """A random LLaVA, which unlike Qwen2-VL computes positions in the forward pass."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|picture|>"]})
    image = tokenizer.convert_tokens_to_ids("<|picture|>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 16} | vision,
        text_config=text,
        image_token_id=image,
        image_token_index=image,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() > 1 else 1
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|picture|>",
        chat_template=tokenizer.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|picture|>"),
    )
    return model, processor


@pytest.fixture(scope="module", params=["qwen2_vl", "llava"])
def family(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> tuple[Any, Any]:
    processor = load_processor(tiny_checkpoint)
    if request.param == "llava":
        return tiny_llava(processor.tokenizer)
    return load_model(tiny_checkpoint), processor


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Any:
    return load_model(tiny_checkpoint)


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> Any:
    return load_processor(tiny_checkpoint)


@pytest.fixture
def benchmarks(textvqa: Make, tmp_path: Path) -> dict[str, Benchmark]:
    mmmu = BenchmarkSource("demo_mmmu", data=write_rows(tmp_path / "mmmu.parquet", mmmu_rows(6)))
    return load_benchmarks([textvqa(7), mmmu], None, 0)


def run(benchmarks: dict[str, Benchmark], model: Any, processor: Any, **options: Any) -> list[BenchmarkResult]:
    selection = {name: options.pop(name) for name in ("measured_items", "seed") if name in options}
    answering = AnswerOptions(**{"batch_size": 4, "max_new_tokens": NEW_TOKENS} | options)
    return run_benchmarks(benchmarks, model, processor, answering, **selection)


def plain_reply(model: Any, processor: Any, prompt: str, images: list[Any]) -> str:
    inputs = processor(text=[prompt], images=images, return_tensors="pt")
    sequence = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return processor.tokenizer.decode(sequence[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def plain_log_probs(model: Any, processor: Any, prompt: str, images: list[Any], answer: str) -> torch.Tensor:
    """Log-probabilities of an answer appended to the prompt as text, from a forward pass without padding or cache."""
    inputs = processor(text=[f"{prompt}{answer}<|im_end|>"], images=images, return_tensors="pt")
    n_answer = len(processor.tokenizer(f"{answer}<|im_end|>").input_ids)
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -n_answer - 1 : -1]
    return logits.log_softmax(-1)


def test_replies_and_log_probabilities_equal_plain_ones(
    benchmarks: dict[str, Benchmark], family: tuple[Any, Any]
) -> None:
    model, processor = family
    meter = Keep()
    results = run(benchmarks, model, processor, meter=meter)
    assert [len(result.items) for result in results] == [7, 6]
    for result in results:
        benchmark = benchmarks[result.task]
        for item, doc in zip(result.items, benchmark.rows.docs, strict=True):
            images = [image.decode() for image in benchmark.task.doc_to_image(doc)]
            assert item.reply == plain_reply(model, processor, item.prompt, images)
            tokens, log_q = meter.answers[ItemKey(item.task, item.doc)]
            assert processor.tokenizer.decode(tokens) == f"{item.target}<|im_end|>"
            expected = plain_log_probs(model, processor, item.prompt, images, item.target)
            torch.testing.assert_close(log_q, expected, atol=2e-4, rtol=1e-4)


def test_measuring_answers_changes_no_reply(benchmarks: dict[str, Benchmark], model: Any, processor: Any) -> None:
    with_meter = run(benchmarks, model, processor, meter=Keep(), measured_items=3)
    benchmarks = {name: fresh(benchmark) for name, benchmark in benchmarks.items()}
    without = run(benchmarks, model, processor)
    assert [[item.reply for item in result.items] for result in with_meter] == [
        [item.reply for item in result.items] for result in without
    ]
    assert [sum(item.nll is not None for item in result.items) for result in with_meter] == [3, 3]


def fresh(benchmark: Benchmark) -> Benchmark:
    benchmark.task._instances = None
    return benchmark


def test_prompt_has_one_image_per_placeholder(benchmarks: dict[str, Benchmark], model: Any, processor: Any) -> None:
    for result in run(benchmarks, model, processor):
        docs = benchmarks[result.task].rows.docs
        for item, doc in zip(result.items, docs, strict=True):
            assert item.prompt.count("<|image_pad|>") == len(benchmarks[result.task].task.doc_to_image(doc))
            assert item.prompt.startswith("<|im_start|>user\n")
            assert item.prompt.endswith("<|im_start|>assistant\n")


def test_image_tokens_in_a_question_are_harmless(textvqa: Make, model: Any, processor: Any) -> None:
    def spoil(rows: list[dict[str, Any]]) -> None:
        rows[0]["question"] = "Is <image> or <|image_pad|> here?"

    (result,) = run(load_benchmarks([textvqa(2, spoil)], None, 0), model, processor)
    assert len(result.items) == 2
    assert result.items[0].prompt.count("<|image_pad|>") == 1


def test_too_long_a_prompt_is_refused_not_cut(textvqa: Make, model: Any, processor: Any) -> None:
    def lengthen(rows: list[dict[str, Any]]) -> None:
        rows[1]["question"] = "word " * 100

    benchmarks = load_benchmarks([textvqa(3, lengthen)], None, 0)
    with pytest.raises(
        BenchmarkError, match=r"demo_textvqa/1: the prompt has \d+ tokens .* the model takes 512; lower"
    ):
        run(benchmarks, model, processor)


def test_item_with_a_damaged_image_is_skipped_and_listed(textvqa: Make, model: Any, processor: Any) -> None:
    def truncate(rows: list[dict[str, Any]]) -> None:
        rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:200]

    (result,) = run(load_benchmarks([textvqa(3, truncate)], None, 0), model, processor)
    assert [item.doc for item in result.items] == ["0", "2"]
    assert result.asked == 3
    assert [skip.doc for skip in result.skipped] == ["1"]
    assert "it cannot be encoded: image file is truncated" in result.skipped[0].reason


def test_an_item_that_the_processor_refuses_is_skipped_and_listed(textvqa: Make, model: Any, processor: Any) -> None:
    def lengthen(rows: list[dict[str, Any]]) -> None:
        file = io.BytesIO()
        Image.new("RGB", (4, 1000)).save(file, "PNG")
        rows[1]["image"]["bytes"] = file.getvalue()

    (result,) = run(load_benchmarks([textvqa(3, lengthen)], None, 0), model, processor)
    assert [item.doc for item in result.items] == ["0", "2"]
    assert [skip.doc for skip in result.skipped] == ["1"]
    assert "absolute aspect ratio must be smaller than 200" in result.skipped[0].reason


def test_an_item_that_the_template_refuses_is_skipped_and_listed(textvqa: Make, model: Any, processor: Any) -> None:
    processor = copy.deepcopy(processor)
    refuse = "{% for m in messages %}{% for p in m['content'] if p['type'] == 'text' and 'zzz' in p['text'] %}"
    refuse += "{{ raise_exception('no such question') }}{% endfor %}{% endfor %}"
    processor.chat_template = refuse + (processor.chat_template or processor.tokenizer.chat_template)

    def forbid(rows: list[dict[str, Any]]) -> None:
        rows[1]["question"] = "What is zzz?"

    (result,) = run(load_benchmarks([textvqa(3, forbid)], None, 0), model, processor)
    assert [item.doc for item in result.items] == ["0", "2"]
    assert [skip.doc for skip in result.skipped] == ["1"]
    assert "no such question" in result.skipped[0].reason


def test_out_of_memory_halves_the_batch(
    benchmarks: dict[str, Benchmark], model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(benchmarks, model, processor)
    sizes = []
    original = VisionLM._run

    def small_memory(self: VisionLM, batch: Sequence[Any], inputs: Any, contexts: Any) -> list[Finished]:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too large")
        return original(self, batch, inputs, contexts)

    monkeypatch.setattr(VisionLM, "_run", small_memory)
    results = run({name: fresh(benchmark) for name, benchmark in benchmarks.items()}, model, processor)
    assert results == expected
    assert max(sizes) == 4
    monkeypatch.setattr(VisionLM, "_run", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(torch.OutOfMemoryError):
        run({name: fresh(benchmark) for name, benchmark in benchmarks.items()}, model, processor)


def test_non_finite_logits_stop_the_run(
    benchmarks: dict[str, Benchmark], tiny_checkpoint: Path, processor: Any
) -> None:
    broken = load_model(tiny_checkpoint)
    broken.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="non-finite logits"):
        run(benchmarks, broken, processor, meter=Keep())


def test_finished_items_are_not_answered_again(benchmarks: dict[str, Benchmark], model: Any, processor: Any) -> None:
    done = {ItemKey("demo_textvqa", str(n)): Finished(ItemKey("demo_textvqa", str(n)), "exit") for n in range(7)}
    answered: list[Finished] = []
    results = run(benchmarks, model, processor, finished=done, on_batch=answered.extend)
    assert {item.key.task for item in answered} == {"demo_mmmu"}
    assert {item.reply for item in results[0].items} == {"exit"}
    assert results[0].items[0].score == 1.0


def test_scores_equal_lm_evals(benchmarks: dict[str, Benchmark], model: Any, processor: Any) -> None:
    from lm_eval.evaluator import evaluate

    results = run(benchmarks, model, processor)
    lm = VisionLM(model, processor, AnswerOptions(batch_size=3, max_new_tokens=NEW_TOKENS))
    for benchmark in benchmarks.values():
        fresh(benchmark)
    outcome = evaluate(
        lm,
        {"tasks": {name: benchmark.task for name, benchmark in benchmarks.items()}, "groups": {}},
        bootstrap_iters=0,
        apply_chat_template=True,
    )
    assert outcome is not None
    for result in results:
        metric = benchmarks[result.task].config["metadata"]["score"]
        mean = sum(item.score for item in result.items) / len(result.items)
        assert outcome["results"][result.task][f"{metric},none"] == pytest.approx(mean)
        for name, part in result.parts.items():
            assert outcome["results"][result.task][f"{name},none"] == pytest.approx(part.value)


@pytest.mark.parametrize(
    ("template", "tail"),
    [
        (None, "OAK<|im_end|>"),
        ("closes its thoughts", "\n</think>\n\nOAK<|im_end|>"),
        ("drops its thoughts", "OAK<|im_end|>"),
    ],
)
def test_the_reference_answer_is_measured_where_the_template_writes_it(
    model: Any, processor: Any, template: str | None, tail: str
) -> None:
    """Prompts that open thoughts, which the conversation closes or drops: same log-probabilities as calibration's."""
    processor = copy.deepcopy(processor)
    if template is not None:
        thoughts = "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}" if "closes" in template else ""
        processor.chat_template = (
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + thoughts + "{% for p in m['content'] %}"
            "{{ '<|vision_start|><|image_pad|><|vision_end|>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
            "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
        )
    key, image, question = ItemKey("t", "1"), Image.new("RGB", (32, 32), "red"), "<image>Which letter?"
    meter = Keep()
    lm = VisionLM(model, processor, AnswerOptions(2, meter=meter), answers={key: "OAK"})
    prompt = lm.apply_chat_template([{"role": "user", "content": question}])
    reference = lm._reference(key, prompt, "OAK")
    assert processor.tokenizer.decode(reference.tokens).endswith(tail.strip())
    assert (reference.conversation is None) == (template != "drops its thoughts")
    work = [Work(key, prompt, (image,), 4, reference), Work(ItemKey("t", "2"), prompt + "a longer one", (image,), 4)]
    with torch.inference_mode():
        lm._answer(work, lm._encode(work))
        file = io.BytesIO()
        image.save(file, "PNG")
        messages = [Message(role="user", content=question), Message(role="assistant", content="OAK")]
        sample = Sample("1", [file.getvalue()], messages)
        (batch,) = encode_batches([sample], processor, image_token_id(model.config), 1, 512)
        log_probs = model(**batch.encode()).logits.log_softmax(-1)[0, :-1][batch.is_answer[0, 1:]]
    tokens, measured = meter.answers[key]
    assert list(tokens) == batch.input_ids[batch.is_answer].tolist()
    torch.testing.assert_close(measured, log_probs, rtol=0, atol=1e-4)
