"""Thoughts are cut from a reply before it is scored."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.benchmark_rows import ROWS, write_rows
from torch.nn.utils.rnn import pad_sequence

from benchmarks.data import BenchmarkSource
from benchmarks.harness import load_benchmarks, run_benchmarks
from benchmarks.items import AnswerOptions, Work
from benchmarks.model import VisionLM
from benchmarks.replies import final_answer
from tlq.export.loading import load_model
from tlq.models.processor import load_processor


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("42", "42"),
        (" 42\n", "42"),
        ("<think>\nIs it 41?\n</think>\n\n42", "42"),
        ("Is it 41?\n</think>\n\n42", "42"),
        ("<analysis>41</analysis>42", "42"),
        ("41</analysis> 42", "42"),
        ("<think>a</think>4<think>b</think>2", "42"),
        ("a</think>b</think>42", "42"),
        ("<THINK>41</THINK>42", "42"),
        ("42 <think>41</think>", "42"),
        ("<think>41</analysis>42", "42"),
        ("<think>it may be 41", "<think>it may be 41"),
        ("a < b, think > c", "a < b, think > c"),
        ("", ""),
    ],
)
def test_the_answer_is_what_follows_the_thoughts(reply: str, answer: str) -> None:
    assert final_answer(reply) == answer


class Thinker:
    """A model that generates the tokens of given replies, in place of its own."""

    def __init__(self, checkpoint: Path, reply_to: Callable[[Work], str], patch: pytest.MonkeyPatch) -> None:
        self.model: Any = load_model(checkpoint)
        self.processor = load_processor(checkpoint)
        self._reply_to = reply_to
        self._asked: Sequence[Work] = ()
        answer = VisionLM._run

        def run(lm: VisionLM, batch: Sequence[Work], inputs: Any, contexts: Any) -> Any:
            self._asked = batch
            return answer(lm, batch, inputs, contexts)

        patch.setattr(VisionLM, "_run", run)
        patch.setattr(self.model, "generate", self._generate, raising=False)

    def _generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        tokenizer = self.processor.tokenizer
        replies = [torch.tensor(tokenizer(self._reply_to(item)).input_ids) for item in self._asked]
        padded = pad_sequence(replies, batch_first=True, padding_value=tokenizer.pad_token_id)
        return torch.cat([input_ids, padded], 1)


def other_than(answer: str) -> str:
    """A wrong answer; to a question with options another letter, because no letter counts as a guess."""
    return {"A": "B", "B": "C", "C": "D", "D": "A"}.get(answer, "zebra")


THOUGHTS = ["<think>\nIs it {thought}?\n</think>\n\n{reply}", "Is it {thought}?\n</think>\n\n{reply}"]


@pytest.mark.parametrize("thoughts", THOUGHTS, ids=["in the reply", "opened by the prompt"])
@pytest.mark.parametrize("right", [True, False], ids=["wrong thought, right answer", "right thought, wrong answer"])
@pytest.mark.parametrize("name", list(ROWS))
def test_a_reply_is_scored_by_what_follows_its_thoughts(
    name: str, right: bool, thoughts: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the model's tokens through lm-eval's task and filters to the scorer of every benchmark."""
    task = f"{name}_vlm"
    source = BenchmarkSource(task, data=write_rows(tmp_path / "rows.parquet", ROWS[name]))
    benchmarks = load_benchmarks([source], None, 0)
    benchmark = benchmarks[task]
    texts = [str(benchmark.config["doc_to_target"](doc)) for doc in benchmark.rows.docs]
    targets = dict(zip(benchmark.rows.ids, texts, strict=True))

    def reply_to(item: Work) -> str:
        answer = targets[item.key.doc]
        said = (other_than(answer), answer) if right else (answer, other_than(answer))
        return thoughts.format(thought=said[0], reply=said[1])

    thinker = Thinker(tiny_checkpoint, reply_to, monkeypatch)
    (result,) = run_benchmarks(benchmarks, thinker.model, thinker.processor, AnswerOptions(2))
    assert len(result.items) == len(ROWS[name])
    assert [item.score for item in result.items] == [float(right)] * len(result.items)
    assert all("</think>" in item.reply for item in result.items)  # the whole reply is kept
