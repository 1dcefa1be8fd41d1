"""A model that is read from disk one decoder layer at a time, with lm-eval's interface.

It generates nothing: a reply of n tokens would read all weights n times. Question and reference answer pass through the
layers together (teacher forcing), and the answer's log-probabilities say three things:

- NLL and KL of the reference answer, the numbers of ``VisionLM``;
- the option that the model prefers, where the benchmark lets it choose between letters;
- otherwise the greedy reply as far as it follows the reference answer, with the first token that differs from it. The
  benchmark's scorer reads this reply, so an answer counts as right if the model would have given the reference answer
  itself; another right answer does not count.

Items pass through the layers in waves, whose hidden states are in host memory or on disk. A wave reads the model once.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.chat_model import ChatLM, append_answers, context_length, log_softmax
from benchmarks.divergence import ItemKey
from benchmarks.items import AnswerOptions, Finished, Work
from tlq.inputs.chat import Inputs
from tlq.models.carried import CarriedStates
from tlq.models.decoder import answer_logits, entering, run_layer
from tlq.models.streaming import StreamedModel
from tlq.runtime.activations import Activations, host_memory
from tlq.samples import Batch, EncodedRow, image_token_id, micro_batches

logger = logging.getLogger(__name__)

#: A wave has at most so many items, and (estimated) tokens: an interrupted run loses no more, and the device holds the
#: attention masks of all of them.
WAVE, WAVE_TOKENS = 512, 2**18


@dataclass(frozen=True)
class Questions:
    """The questions to a streamed model.

    Attributes:
        answers: reference answers.
        measured: items whose NLL and KL are wanted.
        options: of the items where the model chooses between options, what it may answer.
    """

    answers: Mapping[ItemKey, str]
    measured: Collection[ItemKey]
    options: Mapping[ItemKey, Sequence[str]]


class StreamedLM(ChatLM):
    """lm-eval model around a checkpoint on disk."""

    def __init__(
        self,
        model: StreamedModel,
        processor: Any,
        options: AnswerOptions,
        questions: Questions,
        name_of: Callable[[str, int], str] = lambda task, position: str(position),
        folder: Path | None = None,
    ) -> None:
        """
        Args:
            folder: for hidden states that exceed the host's budget. Others as ``ChatLM``.
        """
        super().__init__(processor, options, name_of, questions.answers)
        self.model = model
        self._questions = questions
        self._memory = host_memory(folder)

    def _needs_reference(self, key: ItemKey) -> bool:
        return True

    def _answered(self, waiting: Sequence[Work], silent: bool) -> Iterator[list[Finished]]:
        waves = _waves(sorted(waiting, key=lambda item: (-item.length, item.key)))
        steps = len(waves) * self._layers
        with tqdm(total=steps, desc="answers", unit="layer", disable=silent) as progress, torch.inference_mode():
            for wave in waves:
                yield self._wave(wave, progress)

    @property
    def _layers(self) -> int:
        return len(self.model.architecture.decoder_layers(self.model.skeleton))

    def _wave(self, wave: Sequence[Work], progress: Any) -> list[Finished]:
        """Answer items in one pass through the model."""
        prepared, done = self._prepared(wave, self._row)
        asked = [(item, row) for item, row in prepared if row is not None]
        done += [Finished(item.key) for item, row in prepared if row is None]  # an empty reply, which the scorer reads
        limit = context_length(self.model.config)
        for item, row in asked:
            answer = len(item.reference.tokens)
            self._check_length(item, row.length - answer, answer, limit)
        while True:
            try:
                return done + self._pass(asked, progress)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise
            torch.cuda.empty_cache()
            self.batch_size //= 2
            logger.warning("out of memory; batch size is now %d", self.batch_size)

    def _row(self, item: Work) -> EncodedRow | None:
        """An item's question with its reference answer; None if it has no answer to follow."""
        return EncodedRow.of(*self._with_answer(item), with_digest=False) if item.reference.tokens else None

    def _pass(self, asked: Sequence[tuple[Work, EncodedRow]], progress: Any) -> list[Finished]:
        batches = micro_batches(
            [row for _, row in asked],
            lambda index: self._with_answer(asked[index][0])[0],
            self.tokenizer.pad_token_id or 0,
            image_token_id(self.model.config),
            self.batch_size,
        )
        with closing(Activations(self._memory, self.model.device)) as hidden:
            self._run_layers(batches, hidden, progress)
            done = []
            with self.model.head():
                for batch, states in zip(batches, hidden, strict=True):
                    logits = answer_logits(self.model.skeleton, self.model.architecture, states, batch)
                    done += self._read([asked[number][0] for number in batch.samples], logits)
        return done

    def _with_answer(self, item: Work) -> tuple[Inputs, int]:
        """An item's question with its reference answer, and the number of tokens of the answer."""
        reference = item.reference
        _, context = self._encode_item(item)
        pad = self.tokenizer.pad_token_id or 0
        inputs = append_answers(context, [reference.tokens], len(reference.tokens), pad)
        return inputs, len(reference.tokens) - reference.start

    def _run_layers(self, batches: Sequence[Batch], hidden: Activations, progress: Any) -> None:
        """Append the output of the last layer for every micro-batch, [batch, time, hidden], to ``hidden``."""
        model, calls = self.model, []
        carried = CarriedStates(lambda: Activations(self._memory, model.device))
        with model.entrance() as entered:
            for call in entering(entered, model.architecture, batches, model.device):
                hidden.append(call.take_hidden_states())
                call.injected = [None if each is None else each.cpu() for each in call.injected]
                calls.append(call)
        with closing(carried):
            for index, layer in model.layers(range(self._layers)):
                for number, call in enumerate(calls):
                    with call.arguments(index, carried, number) as arguments:
                        output = run_layer(layer, hidden[number], arguments)
                    hidden[number] = call.next_input(index, output)
                progress.update()

    def _read(self, items: Sequence[Work], logits: torch.Tensor) -> list[Finished]:
        """Replies and divergences of a micro-batch, from the logits [answer tokens, vocabulary] of all its items."""
        answers = [item.reference.tokens[item.reference.start :] for item in items]
        parts = logits.split([len(answer) for answer in answers])
        log_probs = {
            item.key: (answer, log_softmax(own, item.key))
            for item, answer, own in zip(items, answers, parts, strict=True)
        }
        divergences = {}
        if self._meter is not None:
            wanted = [key for key in log_probs if key in self._questions.measured and self._meter.wants(key)]
            divergences = self._meter.measure({key: log_probs[key] for key in wanted})
        return [
            Finished(item.key, self._reply(item, *log_probs[item.key]), divergences.get(item.key)) for item in items
        ]

    def _reply(self, item: Work, answer: Sequence[int], log_probs: torch.Tensor) -> str:
        """The preferred option, or the greedy reply up to the first token that differs from the reference answer."""
        options = self._questions.options.get(item.key, ())
        first = self._first_tokens(item, options) if options else []
        if options and len(set(first)) == len(first):
            return options[int(log_probs[0, first].argmax())]
        greedy = log_probs.argmax(-1).tolist()
        same = next((place for place, token in enumerate(greedy) if token != answer[place]), len(answer))
        reply = self.tokenizer.decode(greedy[: same + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(reply)

    def _first_tokens(self, item: Work, options: Sequence[str]) -> list[int]:
        references = self._references(item.key, item.prompt, options)
        return [reference.tokens[reference.start] for reference in references]


def _waves(items: Sequence[Work]) -> list[list[Work]]:
    """The items, in order, as waves of at most ``WAVE`` items and ``WAVE_TOKENS`` tokens; at least one item each."""
    waves: list[list[Work]] = []
    tokens = 0
    for item in items:
        if not waves or len(waves[-1]) == WAVE or tokens + item.length > WAVE_TOKENS:
            waves.append([])
            tokens = 0
        waves[-1].append(item)
        tokens += item.length
    return waves
