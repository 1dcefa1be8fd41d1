"""Pack several questions about one picture into one sequence, each trained exactly like a single-question prompt.

The sequence begins with the opening tokens and the picture, followed by question-and-answer turns. A turn attends to
the picture and to itself (a 4-D attention mask), and its positions start after those of the picture, so that its logits
equal those of an ordinary single-question prompt. The loss covers answers only.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Qwen2Tokenizer

from demo.family import Family
from demo.questions import Question, benchmark_questions, option_question, study_questions
from demo.world import (
    CELL_CLASSES,
    HEIGHT,
    KINDS,
    WIDTH,
    Kind,
    Scene,
    cell_labels,
    random_scene,
    render,
)


@dataclass(frozen=True)
class Mix:
    """Frequencies of training pictures and of their questions.

    Attributes:
        kinds: relative frequencies of the kinds of picture, in the order of ``KINDS``.
        study, option: chance that a slot of a sequence has a study question, or an option question.
        suffix: chance that a benchmark question keeps its suffix.
    """

    kinds: tuple[float, ...] = (0.22, 0.1, 0.27, 0.41)
    study: float = 0.25
    option: float = 0.03
    suffix: float = 0.6


@dataclass
class Batch:
    """B packed sequences of L tokens, with T answer tokens in total."""

    pixels: torch.Tensor  # [B, ...] float32, as the family's image processor makes them
    input_ids: torch.Tensor  # [B, L]
    position_ids: torch.Tensor  # [axes, B, L]
    attention_mask: torch.Tensor  # [B, 1, L, L] bool, True = may attend
    sources: torch.Tensor  # [T] flat index into B * L of the token that predicts
    targets: torch.Tensor  # [T] token to predict
    turns: torch.Tensor  # [T] index of the turn of the answer token
    skills: list[tuple[Kind, str]]  # kind and skill of each turn


class Packer:
    """Packs scenes and questions into a ``Batch`` with a fixed sequence length."""

    def __init__(self, tokenizer: Qwen2Tokenizer, length: int, family: Family) -> None:
        def encode(text: str) -> list[int]:
            return tokenizer(text).input_ids

        self._tokenizer, self.length, self._family = tokenizer, length, family
        self._cache: dict[str, list[int]] = {}
        pad = tokenizer.get_vocab()["<|image_pad|>"]
        opening = encode("<|im_start|>user\n<|vision_start|>")
        self._prefix = opening + [pad] * family.image_tokens + encode("<|vision_end|>")
        self._header, self._end = encode("<|im_end|>\n<|im_start|>assistant\n"), encode("<|im_end|>")
        image = family.positions(len(opening))
        text = np.broadcast_to(np.arange(len(opening)), (len(image), len(opening)))
        self._prefix_positions = np.concatenate([text, image], axis=1)
        self._pad_id = tokenizer.pad_token_id

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            if len(self._cache) > 200_000:
                self._cache.clear()
            self._cache[text] = self._tokenizer(text).input_ids
        return self._cache[text]

    def _turn(self, question: Question) -> tuple[list[int], int]:
        """The tokens of a turn, and the number of answer tokens at its end."""
        answer = self._encode(question.answer) + self._end
        return self._encode(question.prompt) + self._header + answer, len(answer)

    def pack(self, items: Sequence[tuple[Scene, Sequence[Question]]]) -> Batch:
        """One sequence per scene, with all of its questions that fit, in the given order."""
        size, length, start = len(items), self.length, len(self._prefix)
        ids = np.full((size, length), self._pad_id, dtype=np.int64)
        positions = np.zeros((len(self._prefix_positions), size, length), dtype=np.int64)
        group = np.full((size, length), -1, dtype=np.int64)  # 0 the picture, 1, 2, ... the turns, -1 padding
        sources: list[int] = []
        targets: list[int] = []
        turns: list[int] = []
        skills: list[tuple[Kind, str]] = []
        for b, (scene, questions) in enumerate(items):
            ids[b, :start], positions[:, b, :start], group[b, :start] = self._prefix, self._prefix_positions, 0
            cursor, first_position = start, self._prefix_positions[0, -1] + 1
            for turn, question in enumerate(questions, start=1):
                tokens, answered = self._turn(question)
                stop = cursor + len(tokens)
                if stop > length:
                    continue
                ids[b, cursor:stop], group[b, cursor:stop] = tokens, turn
                positions[:, b, cursor:stop] = first_position + np.arange(len(tokens))
                sources += range(b * length + stop - answered - 1, b * length + stop - 1)
                targets += tokens[-answered:]
                turns += [len(skills)] * answered
                skills.append((scene.kind, question.skill))
                cursor = stop
        return Batch(
            pixels=self._family.pixels(np.stack([np.asarray(render(scene)) for scene, _ in items])),
            input_ids=torch.from_numpy(ids),
            position_ids=torch.from_numpy(positions),
            attention_mask=packed_mask(torch.from_numpy(group)),
            sources=torch.tensor(sources),
            targets=torch.tensor(targets),
            turns=torch.tensor(turns),
            skills=skills,
        )


def packed_mask(group: torch.Tensor) -> torch.Tensor:
    """Mask [B, 1, L, L] bool of turns [B, L]: causal, to the picture (0) and the same turn; padding to itself."""
    length = group.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same, picture = group[:, :, None] == group[:, None, :], (group == 0)[:, None, :]
    visible = (same | (picture & (group >= 0)[:, :, None])) & causal
    return (visible | torch.eye(length, dtype=torch.bool))[:, None]


def patchify(images: np.ndarray) -> torch.Tensor:
    """The image processor's values [B, patches, 3 * 2 * 8 * 8], in merge order, of uint8 [B, HEIGHT, WIDTH, 3]."""
    size, patch = len(images), 8
    pixels = images.astype(np.float32) / 127.5 - 1.0
    grid = pixels.reshape(size, HEIGHT // 16, 2, patch, WIDTH // 16, 2, patch, 3)
    grid = grid.transpose(0, 1, 4, 2, 5, 7, 3, 6)  # batch, row, column, merge, merge, channel, y, x
    grid = np.repeat(grid[:, :, :, :, :, :, None], 2, axis=6)  # repeat the frame for the temporal patch
    return torch.from_numpy(grid.reshape(size, -1, 3 * 2 * patch * patch))


def draw_training_item(mix: Mix, rng: random.Random) -> tuple[Scene, list[Question]]:
    """A training scene and shuffled questions about it, more than fit into a sequence."""
    kind = rng.choices(KINDS, mix.kinds)[0]
    scene = random_scene(kind, "train", rng)
    asked, studied = benchmark_questions(scene, rng), study_questions(scene, rng)
    rng.shuffle(asked)
    rng.shuffle(studied)
    questions: list[Question] = []
    while asked or studied:
        draw = rng.random()
        if draw < mix.option:
            questions.append(option_question(rng))
        elif studied and (draw < mix.option + mix.study or not asked):
            questions.append(studied.pop())
        elif asked:
            question = asked.pop()
            keep = rng.random() < mix.suffix
            questions.append(question if keep else _bare(question))
    return scene, questions


def _bare(question: Question) -> Question:
    return Question(question.skill, question.text, question.answer, question.options)


def draw_batch(packer: Packer, size: int, mix: Mix, rng: random.Random) -> Batch:
    """A training batch of ``size`` pictures."""
    return packer.pack([draw_training_item(mix, rng) for _ in range(size)])


def draw_cells(family: Family, size: int, rng: random.Random) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Training pictures and their cell labels: pixels [size, ...], labels [size, cells] by head."""
    scenes = [random_scene(rng.choice(KINDS), "train", rng) for _ in range(size)]
    labels = [cell_labels(scene) for scene in scenes]
    pixels = family.pixels(np.stack([np.asarray(render(scene)) for scene in scenes]))
    stacked = {head: torch.from_numpy(np.stack([label[head].ravel() for label in labels])) for head in CELL_CLASSES}
    return pixels, stacked
