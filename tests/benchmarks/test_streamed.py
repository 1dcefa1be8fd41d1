"""A model that is read layer by layer: the numbers of the model in memory, and replies by teacher forcing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.benchmark_rows import mmmu_rows, write_rows
from support.processors import write_tiny_with_processor

from benchmarks import streamed
from benchmarks.data import BenchmarkError, BenchmarkSource
from benchmarks.divergence import ItemKey, ReferenceReader, ReferenceRecorder
from benchmarks.harness import Benchmark, BenchmarkResult, load_benchmarks, run_benchmarks, run_streamed
from benchmarks.items import AnswerOptions, Finished, Reference, Work
from benchmarks.streamed import Questions, StreamedLM
from tlq import quantize
from tlq.export.loading import load_model
from tlq.export.streamed import open_model
from tlq.models.processor import load_processor

Make = Callable[..., BenchmarkSource]


@pytest.fixture
def benchmarks(textvqa: Make, tmp_path: Path) -> dict[str, Benchmark]:
    return load_benchmarks([textvqa(7), mmmu_source(tmp_path)], None, 0)


def mmmu_source(folder: Path) -> BenchmarkSource:
    return BenchmarkSource("demo_mmmu", data=write_rows(folder / "mmmu.parquet", mmmu_rows(6)))


@pytest.fixture(scope="module", params=["w3a16", "w4a8"])
def variant(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    quantize(tiny_checkpoint, folder, recipe="rtn", scheme=request.param)
    return folder


def measured(
    answer: Callable[..., list[BenchmarkResult]],
    load: Callable[[Path], Any],
    full: Path,
    variant: Path,
    folder: Path,
    benchmarks: dict[str, Benchmark],
) -> list[list[BenchmarkResult]]:
    """Results of full precision and of a variant, whose KL is to full precision in the same backend."""
    results = []
    for path, meter in ((full, ReferenceRecorder), (variant, ReferenceReader)):
        options = AnswerOptions(4, 4, meter(folder))
        results.append(answer(benchmarks, load(path), load_processor(path), options))
    return results


def test_nll_and_kl_are_those_of_the_model_in_memory(
    benchmarks: dict[str, Benchmark], tiny_checkpoint: Path, variant: Path, tmp_path: Path
) -> None:
    places = tiny_checkpoint, variant
    expected = measured(run_benchmarks, load_model, *places, tmp_path / "hf", benchmarks)
    found = measured(run_streamed, open_model, *places, tmp_path / "streamed", benchmarks)
    for one, other in zip(expected, found, strict=True):
        for result, same in zip(one, other, strict=True):
            assert [item.doc for item in result.items] == [item.doc for item in same.items]
            for item, twin in zip(result.items, same.items, strict=True):
                assert twin.n_answer_tokens == item.n_answer_tokens > 0
                assert twin.nll == pytest.approx(item.nll, rel=0, abs=1e-4)
                assert twin.kl == pytest.approx(item.kl, rel=0, abs=1e-4)
    assert min(item.kl or 0 for result in found[1] for item in result.items) > 1e-3


def test_layers_that_share_keys_are_scored_as_in_memory(textvqa: Make, tmp_path: Path) -> None:
    full, variant = write_tiny_with_processor("gemma4-shared_kv", tmp_path / "full"), tmp_path / "variant"
    quantize(full, variant, recipe="rtn", scheme="w3a16")
    benchmarks = load_benchmarks([textvqa(3)], None, 0)
    (expected, found) = (
        measured(answer, load, full, variant, tmp_path / answer.__name__, benchmarks)
        for answer, load in ((run_benchmarks, load_model), (run_streamed, open_model))
    )
    for one, other in zip(expected, found, strict=True):
        for item, twin in zip(one[0].items, other[0].items, strict=True):
            assert twin.n_answer_tokens == item.n_answer_tokens > 0
            assert twin.nll == pytest.approx(item.nll, rel=0, abs=1e-4)
            assert twin.kl == pytest.approx(item.kl, rel=0, abs=1e-4)
    assert min(item.kl or 0 for item in found[1][0].items) > 1e-3


def test_a_letter_is_chosen_between_those_of_the_question(
    benchmarks: dict[str, Benchmark], tiny_checkpoint: Path
) -> None:
    """The letter that a plain forward pass finds the most probable; an open question has no letters."""
    processor, model = load_processor(tiny_checkpoint), load_model(tiny_checkpoint)
    _, mmmu = run_streamed(benchmarks, open_model(tiny_checkpoint), processor, AnswerOptions(4))
    letters = [processor.tokenizer.convert_tokens_to_ids(letter) for letter in "ABCD"]
    chosen = 0
    for item, doc in zip(mmmu.items, benchmarks["demo_mmmu"].rows.docs, strict=True):
        images = [image.decode() for image in benchmarks["demo_mmmu"].task.doc_to_image(doc)]
        if doc["question_type"] == "open":
            continue
        with torch.inference_mode():
            logits = model(**processor(text=[item.prompt], images=images, return_tensors="pt")).logits[0, -1]
        assert item.reply == "ABCD"[int(logits[letters].argmax())]
        assert item.score == float(item.reply == item.target)
        chosen += 1
    assert chosen == 4


def reply_to(lm: StreamedLM, answer: str, greedy: str) -> str:
    """The reply where the model prefers the tokens of ``greedy`` after the reference answer's own."""
    tokens = tuple(lm.tokenizer(answer + "<|im_end|>").input_ids)
    preferred = lm.tokenizer(greedy).input_ids
    logits = torch.zeros(len(tokens), len(lm.tokenizer))
    logits[torch.arange(len(tokens)), torch.tensor(preferred[: len(tokens)])] = 9.0
    work = Work(ItemKey("t", "1"), "", (), 4, Reference(tokens))
    ((finished),) = lm._read([work], logits)
    return finished.reply


def test_a_reply_follows_the_reference_up_to_the_first_other_token(tiny_checkpoint: Path) -> None:
    nothing = Questions({}, (), {})
    lm = StreamedLM(open_model(tiny_checkpoint), load_processor(tiny_checkpoint), AnswerOptions(4), nothing)
    assert reply_to(lm, "exit", "exit<|im_end|>") == "exit"
    assert reply_to(lm, "exit", "exat<|im_end|>") == "exa"
    assert reply_to(lm, "exit", "north") == "n"
    assert reply_to(lm, "exit", "exits") == "exits"  # it does not stop where the reference answer does
    assert reply_to(lm, "exit", "ex<|im_end|>..") == "ex"


def test_finished_waves_are_not_asked_again(
    benchmarks: dict[str, Benchmark], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "WAVE", 4)
    processor, waves = load_processor(tiny_checkpoint), []
    kept: dict[ItemKey, Finished] = {}

    def keep(batch: list[Finished]) -> None:
        waves.append(len(batch))
        kept.update({item.key: item for item in batch})
        if len(waves) == 2:
            raise KeyboardInterrupt

    plain = run_streamed(benchmarks, open_model(tiny_checkpoint), processor, AnswerOptions(4))
    with pytest.raises(KeyboardInterrupt):
        run_streamed(benchmarks, open_model(tiny_checkpoint), processor, AnswerOptions(4, on_batch=keep))
    assert len(kept) == 8
    again = AnswerOptions(4, finished=dict(kept), on_batch=lambda batch: waves.append(len(batch)))
    continued = run_streamed(benchmarks, open_model(tiny_checkpoint), processor, again)
    assert waves == [4, 4, 4, 1]
    assert [result.items for result in continued] == [result.items for result in plain]


def test_hidden_states_on_disk_change_nothing(
    benchmarks: dict[str, Benchmark], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, found = load_processor(tiny_checkpoint), []
    for budget in ("1", "0.00001"):
        monkeypatch.setenv("TLQ_HOST_MEMORY", budget)
        meter = ReferenceRecorder(tmp_path / budget)
        results = run_streamed(
            benchmarks, open_model(tiny_checkpoint), processor, AnswerOptions(4, meter=meter), folder=tmp_path
        )
        found.append([result.items for result in results])
    assert found[0] == found[1]


def test_items_that_cannot_be_asked_are_skipped_and_listed(textvqa: Make, tiny_checkpoint: Path) -> None:
    def truncate(rows: list[dict[str, Any]]) -> None:
        rows[2]["image"]["bytes"] = rows[2]["image"]["bytes"][:60]

    benchmarks = load_benchmarks([textvqa(6, truncate)], None, 0)
    (result,) = run_streamed(benchmarks, open_model(tiny_checkpoint), load_processor(tiny_checkpoint), AnswerOptions(4))
    assert len(result.items) == 5
    assert [skip.doc for skip in result.skipped] == ["2"]


def test_out_of_memory_halves_the_batch(
    benchmarks: dict[str, Benchmark], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor, sizes = load_processor(tiny_checkpoint), []
    expected = run_streamed(benchmarks, open_model(tiny_checkpoint), processor, AnswerOptions(2))
    original = StreamedLM._run_layers

    def small_memory(self: StreamedLM, batches: Any, *others: Any) -> None:
        sizes.append(max(len(batch.samples) for batch in batches))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError
        original(self, batches, *others)

    monkeypatch.setattr(StreamedLM, "_run_layers", small_memory)
    found = run_streamed(benchmarks, open_model(tiny_checkpoint), processor, AnswerOptions(8))
    assert sizes == [8, 4, 2]
    assert [result.items for result in found] == [result.items for result in expected]


def test_an_item_without_an_answer_is_scored_and_too_long_a_one_refused(
    textvqa: Make, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmarks, processor = load_benchmarks([textvqa(3)], None, 0), load_processor(tiny_checkpoint)
    target = benchmarks["demo_textvqa"].config["doc_to_target"]
    monkeypatch.setitem(
        benchmarks["demo_textvqa"].config, "doc_to_target", lambda doc: "" if doc["question_id"] == 1 else target(doc)
    )
    (result,) = run_streamed(benchmarks, open_model(tiny_checkpoint), processor, AnswerOptions(4))
    assert [(item.doc, item.reply == "", item.score) for item in result.items if item.doc == "1"] == [("1", True, 0.0)]
    assert not result.skipped
    model = open_model(tiny_checkpoint)
    model.config.get_text_config().max_position_embeddings = 20
    with pytest.raises(BenchmarkError, match=r"reach \d+, the model takes 20; lower evaluate.max_pixels$"):
        run_streamed(benchmarks, model, processor, AnswerOptions(4))


def test_pixels_of_an_evaluation_are_not_hashed(
    textvqa: Make, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A digest identifies the samples of a calibration that is resumed; the journal identifies benchmarks by rows."""
    monkeypatch.setattr("tlq.samples.update_with_tensor", lambda *_: pytest.fail("pixels were hashed"))
    benchmarks, processor = load_benchmarks([textvqa(3)], None, 0), load_processor(tiny_checkpoint)
    (result,) = run_streamed(benchmarks, open_model(tiny_checkpoint), processor, AnswerOptions(4))
    assert len(result.items) == 3


def test_waves_are_bounded_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "WAVE", 3)
    monkeypatch.setattr(streamed, "WAVE_TOKENS", 10)
    lengths = [12, 6, 4, 4, 3, 2, 1, 1, 1]
    waves = streamed._waves([Work(ItemKey("t", str(n)), "", (), 1, length=n) for n in lengths])
    assert [[item.length for item in wave] for wave in waves] == [[12], [6, 4], [4, 3, 2], [1, 1, 1]]


def test_only_chosen_answers_are_measured(
    benchmarks: dict[str, Benchmark], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = AnswerOptions(4, meter=ReferenceRecorder(tmp_path))
    results = run_streamed(
        benchmarks, open_model(tiny_checkpoint), load_processor(tiny_checkpoint), options, measured_items=3
    )
    assert [sum(item.nll is not None for item in result.items) for result in results] == [3, 3]
    assert [len(result.items) for result in results] == [7, 6]
