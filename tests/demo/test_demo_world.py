"""The demo world has repeatable pictures and questions, and its splits share no content."""

import random

import numpy as np
import pytest

from demo.questions import LETTERS, benchmark_questions, option_question, study_questions
from demo.world import (
    CELL_CLASSES,
    COLUMNS,
    HEIGHT,
    KINDS,
    ROWS,
    WIDTH,
    Kind,
    Scene,
    Split,
    cell_labels,
    random_scene,
    render,
    split_of,
)

SPLITS: tuple[Split, ...] = ("train", "calibration", "test")


def scenes_of(kind: Kind, split: Split, count: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(kind, split, rng) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_splits_share_no_content(kind: Kind) -> None:
    keys = {split: {scene.key for scene in scenes_of(kind, split, 400)} for split in SPLITS}
    assert keys["train"].isdisjoint(keys["calibration"])
    assert keys["train"].isdisjoint(keys["test"])
    assert keys["calibration"].isdisjoint(keys["test"])


@pytest.mark.parametrize("kind", KINDS)
def test_scene_key_ignores_position_and_jitter(kind: Kind) -> None:
    for scene in scenes_of(kind, "test", 20):
        again = Scene(scene.kind, scene.items, scene.jitter + 1)
        assert again.key == scene.key
        assert split_of(again) == "test"


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_same_pictures(kind: Kind) -> None:
    first, second = scenes_of(kind, "train", 10, seed=7), scenes_of(kind, "train", 10, seed=7)
    assert first == second
    for a, b in zip(first, second, strict=True):
        assert render(a).tobytes() == render(b).tobytes()
    assert first != scenes_of(kind, "train", 10, seed=8)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_without_label_are_background(kind: Kind) -> None:
    for scene in scenes_of(kind, "train", 20):
        image, labels = render(scene), cell_labels(scene)
        assert image.size == (WIDTH, HEIGHT)
        pixels = np.asarray(image)
        for row in range(ROWS):
            for column in range(COLUMNS):
                core = pixels[row * 16 + 5 : row * 16 + 11, column * 16 + 5 : column * 16 + 11].reshape(-1, 3)
                if labels["thing"][row, column] == 0:
                    assert (core == core[0]).all(), (scene, row, column)
        for head, classes in CELL_CLASSES.items():
            assert labels[head].min() >= 0
            assert labels[head].max() < classes


@pytest.mark.parametrize("kind", KINDS)
def test_questions_have_one_right_answer(kind: Kind) -> None:
    """A question about a picture never has two different answers."""
    rng = random.Random(0)
    for scene in scenes_of(kind, "test", 30):
        answers: dict[str, str] = {}
        for question in benchmark_questions(scene, rng) + study_questions(scene, rng):
            answer = question.options[LETTERS.index(question.answer)] if question.options else question.answer
            assert answers.setdefault(question.text, answer) == answer


def test_textvqa_questions_survive_capitalising() -> None:
    rng = random.Random(0)
    for scene in scenes_of("signs", "test", 20):
        for question in benchmark_questions(scene, rng):
            assert question.text == question.text.capitalize()


def test_option_questions_match_letters_with_options() -> None:
    rng = random.Random(0)
    letters = set()
    for _ in range(200):
        question = option_question(rng)
        asked = question.text[:-1].split("option ")[-1].removeprefix("is ").split(", ")
        if question.skill == "pairs":
            pairs = [tuple(sorted(pair.split(" "))) for pair in question.answer.split(", ")]
            pairs = [pair if pair[0] in LETTERS else pair[::-1] for pair in pairs]
        else:
            given = question.answer.split(", ")
            pairs = list(
                zip(given, asked, strict=True) if question.skill == "option" else zip(asked, given, strict=True)
            )
        for letter, option in pairs:
            assert question.options[LETTERS.index(letter)] == option
            letters.add(letter)
    assert letters == set(LETTERS)
