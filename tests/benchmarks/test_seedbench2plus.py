"""SEED-Bench-2-Plus scorer: the first character of the reply."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.seedbench2plus import scorer

# reply, answer, correct, unparsed
CASES = [
    ("A", "A", 1, 0),
    ("a", "A", 1, 0),
    ("A", "a", 1, 0),
    ("B", "A", 0, 0),
    ("A.", "A", 1, 0),
    ("A. Paris", "A", 1, 0),
    ("Apple", "A", 1, 0),
    ("  A", "A", 1, 0),
    ("\nA\n", "A", 1, 0),
    ("\tb", "B", 1, 0),
    ("(A)", "A", 0, 1),
    ("The answer is A", "A", 0, 1),
    ("Answer: B", "B", 0, 0),
    ("Answer: B", "A", 1, 0),
    ("", "A", 0, 1),
    ("   ", "A", 0, 1),
    (".A", "A", 0, 1),
    ("E", "A", 0, 1),
    ("D", "D", 1, 0),
    ("d) four", "D", 1, 0),
    ("C", " C ", 1, 0),
    ("1", "A", 0, 1),
    ("Ａ", "A", 0, 1),
    ("А", "A", 0, 1),
    ("*A*", "A", 0, 1),
    ("because", "B", 1, 0),
    ("Cannot tell", "C", 1, 0),
    ("b" * 1_000_000, "B", 1, 0),
    (" " * 1_000_000 + "A", "A", 1, 0),
    ("AB", "B", 0, 0),
    ("\u00a0A", "A", 1, 0),
]


def doc(answer: str, image_type: str = "Chart") -> dict[str, Any]:
    choices = {f"choice_{letter}": f"option {letter}" for letter in "ABCD"}
    return {"question": "Which <img>?", "answer": answer, "question_image_type": image_type, **choices}


@pytest.mark.parametrize(("reply", "answer", "correct", "unparsed"), CASES)
def test_score(reply: str, answer: str, correct: int, unparsed: int) -> None:
    scores: Mapping[str, float] = scorer.score(doc(answer), [reply])
    assert (scores["accuracy"], scores["unparsed"]) == (correct, unparsed)


@pytest.mark.parametrize("image_type", ["Chart", "Map", "Web", "chart", " web "])
def test_image_types(image_type: str) -> None:
    assert scorer.score(doc("A", image_type), ["A"])[image_type.strip().lower()] == 1.0


def test_prompt_and_target() -> None:
    assert scorer.prompt(doc("A")) == (
        "<image>Which image?\nA. option A\nB. option B\nC. option C\nD. option D\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert scorer.target(doc(" B ")) == "B"


@given(st.sampled_from("ABCD"), st.sampled_from("ABCD"), st.text(max_size=50), st.text(alphabet=" \n\t", max_size=5))
def test_only_the_first_letter_counts(letter: str, answer: str, rest: str, before: str) -> None:
    expected = float(letter == answer)
    assert scorer.score(doc(answer), [before + letter.lower() + rest])["accuracy"] == expected
