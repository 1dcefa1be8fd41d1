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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.chat_model import ChatLM, append_answers, log_softmax, unencodable
from benchmarks.divergence import ItemKey
from benchmarks.items import AnswerOptions, Finished, Reference, Work
from tlq.inputs.chat import Inputs
from tlq.inputs.images import IMAGE_ERRORS
from tlq.models.decoder import answer_logits, entering, run_layer
from tlq.models.streaming import StreamedModel
from tlq.runtime.activations import Activations, host_memory
from tlq.samples import Batch, EncodedRow, image_token_id, micro_batches

logger = logging.getLogger(__name__)

#: An interrupted run loses no more than one wave of this many items.
WAVE = 512


@dataclass(frozen=True)
class Questions:
    """What a streamed model is asked.

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
        ordered = sorted(waiting, key=lambda item: (-item.length, item.key))
        waves = [ordered[start : start + WAVE] for start in range(0, len(ordered), WAVE)]
        steps = len(waves) * self._layers
        with tqdm(total=steps, desc="answers", unit="layer", disable=silent) as progress, torch.inference_mode():
            for wave in waves:
                yield self._wave(wave, progress)

    @property
    def _layers(self) -> int:
        return len(self.model.architecture.decoder_layers(self.model.skeleton))

    def _wave(self, wave: Sequence[Work], progress: Any) -> list[Finished]:
        """Answer items in one pass through the model."""
        usable, rows, failed = [], [], []
        for item in wave:
            if (refused := self._unusable(item)) is not None:
                failed.append(refused)
                continue
            if not item.reference.tokens:
                failed.append(Finished(item.key, failure="it has no reference answer"))
                continue
            try:
                rows.append(EncodedRow.of(*self._with_answer(item)))
            except IMAGE_ERRORS as error:
                failed.append(unencodable(item, error))
                continue
            usable.append(item)
        batches = micro_batches(
            rows,
            lambda index: self._with_answer(usable[index])[0],
            self.tokenizer.pad_token_id or 0,
            image_token_id(self.model.config),
            self.batch_size,
        )
        hidden = self._last_hidden_states(batches, progress)
        done = []
        with self.model.head():
            for batch, states in zip(batches, hidden, strict=True):
                logits = answer_logits(self.model.skeleton, self.model.architecture, states, batch)
                done += self._read([usable[number] for number in batch.samples], logits)
        hidden.clear()
        return failed + done

    def _with_answer(self, item: Work) -> tuple[Inputs, int]:
        """An item's question with its reference answer, and the number of tokens of the answer."""
        reference = item.reference
        _, context = self._encode_item(item)
        pad = self.tokenizer.pad_token_id or 0
        inputs = append_answers(context, [reference.tokens], len(reference.tokens), pad)
        return inputs, len(reference.tokens) - reference.start

    def _last_hidden_states(self, batches: Sequence[Batch], progress: Any) -> Activations:
        """Output of the last layer for every micro-batch, [batch, time, hidden]."""
        model = self.model
        hidden, calls = Activations(self._memory, model.device), []
        with model.entrance() as entered:
            for call in entering(entered, model.architecture, batches, model.device):
                hidden.append(call.take_hidden_states())
                calls.append(call)
        for index, layer in model.layers(range(self._layers)):
            for number, call in enumerate(calls):
                output = run_layer(layer, hidden[number], call.kwargs[index])
                hidden[number] = call.next_input(index, output)
            progress.update()
        return hidden

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
        first = [self._first_token(item, option) for option in options]
        if options and len(set(first)) == len(first):
            return options[int(log_probs[0, first].argmax())]
        greedy = log_probs.argmax(-1).tolist()
        same = next((place for place, token in enumerate(greedy) if token != answer[place]), len(answer))
        reply = self.tokenizer.decode(greedy[: same + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(reply)

    def _first_token(self, item: Work, option: str) -> int:
        reference: Reference = self._reference(item.key, item.prompt, option)
        return reference.tokens[reference.start]
