"""MMMU scorer: prompts with images, parsing of choices and of open answers."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.mmmu import scorer

OPTIONS = ["Paris", "London town", "Rome", "Berlin"]

# Reply, letter chosen (None: none found).
CHOICES = [
    ("A", "A"),
    ("A.", "A"),
    ("B,", "B"),
    ("'C'", "C"),
    ("D?!", "D"),
    ("D!?", None),
    ("(A)", "A"),
    ("The answer is (B).", "B"),
    ("(A) or (B)", "B"),
    ("(B) not (A), so (B)", "B"),
    ("(A) is wrong, B is right", "A"),
    ("B is right", "B"),
    ("A or B", "B"),
    ("B rather than A here", "A"),
    ("Answer: C", "C"),
    ("C. Rome", "C"),
    ("A. no, B. yes", "A"),
    ("B. no, A. yes", "A"),
    ("see C.", "C"),
    ("B because DNA is shown", "B"),
    ("DNA. B. UNICEF.", "A"),
    ("B, unlike DNA or A", "A"),
    ("a", None),
    ("b.", None),
    ("E", None),
    ("(E)", None),
    ("", None),
    ("   ", None),
    (".,!?", None),
    ("Rome", None),
    ("it must be Rome", None),
    ("I think that it must be rome", "C"),
    ("I think rome is nicer than london town", "B"),
    ("I think london town is nicer than Rome", "C"),
    ("I think it is none of the cities", None),
    ("CIA agents", "A"),
    ("NASA", "A"),
    ("Ａ", None),
    ("B" * 1_000_000, "B"),
    ("x " * 500_000, None),
]


@pytest.mark.parametrize(("reply", "letter"), CHOICES)
def test_parse_choice(reply: str, letter: str | None) -> None:
    assert scorer.parse_choice(reply, OPTIONS) == letter


# Reply, accepted answers, correct.
OPEN = [
    ("42", ["42"], True),
    ("42.0", ["42"], True),
    ("42.004", ["42"], True),
    ("42.01", ["42"], False),
    ("1,000", ["1000"], True),
    ("1000", ["1,000"], True),
    ("-5", ["-5"], True),
    ("5", ["-5"], False),
    ("1e3", ["1000"], True),
    ("The answer is 42", ["42"], True),
    ("The answer is 42.", ["42"], True),
    ("x = 42", ["42"], True),
    ("x = 40\ny = 42", ["42"], True),
    ("x = 42\ny = 40", ["40"], True),
    ("y=42\nNothing more to say", ["42"], True),
    ("42 is too many, so 41", ["42"], False),
    ("42 is too many, so 41", ["41"], True),
    ("therefore the result is photosynthesis", ["photosynthesis"], True),
    ("Photosynthesis", ["photosynthesis"], True),
    ("by photosynthesis, plants", ["Photosynthesis"], True),
    ("by photosynthesis in plants", ["Photosynthesis"], False),  # "...is " counts as an indicator
    ("photo", ["photosynthesis"], False),
    ("", ["42"], False),
    ("", [""], False),
    ("anything", [""], False),
    ("42", [], False),
    ("42", ["24/7", "42"], True),
    ("24/7", ["24/7", "3.429"], True),
    ("about 3.429", ["24/7", "3.429"], True),
    ("3.43", ["3.429"], True),
    ("the vector is v", ["v"], True),
    ("v", ["v"], True),
    ("take v here", ["v"], True),
    ("available", ["v"], False),
    ("final answer 7 apples", ["7"], True),
    ("$5", ["5"], True),
    ("50%", ["50"], True),
    ("it could be nan", ["nan"], False),
    ("٤٢", ["42"], True),
    ("4" * 200_000, ["42"], False),
    ("so " * 300_000, ["42"], False),
]


@pytest.mark.parametrize(("reply", "accepted", "correct"), OPEN)
def test_is_open_correct(reply: str, accepted: list[str], correct: bool) -> None:
    assert scorer.is_open_correct(reply, accepted) is correct


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1,234 and 5", ["1,234", "234", "5"]),
        ("-1.5e-3", ["-1.5e-3", "-1", "-3"]),
        (".5", [".5"]),
        ("x2y", []),
        ("12.50 or 3", ["12.50", "3"]),
        ("none", []),
    ],
)
def test_extract_numbers(text: str, numbers: list[str]) -> None:
    assert scorer.extract_numbers(text) == numbers


def doc(question: str = "Which <image 1>?", **changes: Any) -> dict[str, Any]:
    row = {
        "id": "validation_Art_Theory_12",
        "question": question,
        "options": str(OPTIONS),
        "answer": "B",
        "question_type": "multiple-choice",
        "image_1": "one",
    }
    return row | {f"image_{n}": None for n in range(2, 8)} | changes


SUFFIX = (
    "\nA. Paris\nB. London town\nC. Rome\nD. Berlin\n\nAnswer with the option's letter from the given choices directly."
)


@pytest.mark.parametrize(
    ("row", "prompt", "images"),
    [
        (doc("<image 1> Which?"), f"<image>Which?{SUFFIX}", ["one"]),
        (doc("See <image 1> and <image 1>."), f"See <image> and image 1.{SUFFIX}", ["one"]),
        (doc("Which?"), f"<image>Which?{SUFFIX}", ["one"]),
        (doc("<image 2> Which?", image_2=None), f"<image>image 2 Which?{SUFFIX}", ["one"]),
        (doc("<image 1> or <image 2>?", image_2="two"), f"<image> or <image>?{SUFFIX}", ["one", "two"]),
        (doc("<image 2> or <image 1>?", image_2="two"), f"<image> or <image>?{SUFFIX}", ["two", "one"]),
        (doc("<image 2>?", image_2="two"), f"<image><image>?{SUFFIX}", ["one", "two"]),
        (doc("<image 1>, <image 1>, <image 2>", image_2="two"), f"<image>, image 1, <image>{SUFFIX}", ["one", "two"]),
        (doc("Which?", image_1=None), f"Which?{SUFFIX}", []),
        (doc("a <image> token <image 1>"), f"a image token <image>{SUFFIX}", ["one"]),
    ],
)
def test_prompt_and_images_agree(row: dict[str, Any], prompt: str, images: list[str]) -> None:
    assert scorer.prompt(row) == prompt
    assert scorer.images(row) == images


def test_images_in_options() -> None:
    row = doc("Which?", options="['<image 2>', '<image 1>']", image_2="two")
    assert scorer.prompt(row).startswith("Which?\nA. <image>\nB. <image>\n\nAnswer with")
    assert scorer.images(row) == ["two", "one"]


def test_open_prompt() -> None:
    row = doc("How many?", question_type="open", options="[]", answer="42")
    assert scorer.prompt(row) == "<image>How many?\n\nAnswer the question using a single word or phrase."
    assert scorer.target(row) == "42"


def test_score_of_a_choice() -> None:
    right = scorer.score(doc(), ["(B)"])
    assert right == {
        "accuracy": 1.0,
        "accuracy_lmms_eval": 1.0,
        "unparsed": 0.0,
        "multiple_choice": 1.0,
        "art_and_design": 1.0,
        "Art_Theory": 1.0,
    }
    assert scorer.score(doc(), ["(A)"])["accuracy"] == 0.0
    assert scorer.score(doc(id="validation_Alchemy_3"), ["B"])["other"] == 1.0


def test_open_answers_score_unlike_in_lmms_eval() -> None:
    row = doc(question_type="open", options="[]", answer="['24/7', '3.429']", id="validation_Math_3")
    assert scorer.score(row, ["3.43"]) == {
        "accuracy": 1.0,
        "accuracy_lmms_eval": 0.0,
        "open": 1.0,
        "science": 1.0,
        "Math": 1.0,
    }
    assert scorer.answers(doc(question_type="open", answer="[0, 1)")) == ["[0, 1)"]
    assert scorer.answers(doc(question_type="open", answer="[unquoted]")) == ["[unquoted]"]


def test_a_reply_without_an_option_gets_the_same_guess_every_time() -> None:
    scores = [scorer.score(doc(id=f"validation_Art_{n}"), ["no idea"]) for n in range(400)]
    assert all(entry["unparsed"] == 1.0 for entry in scores)
    assert scores == [scorer.score(doc(id=f"validation_Art_{n}"), ["other words"]) for n in range(400)]
    assert 0.15 < sum(entry["accuracy"] for entry in scores) / 400 < 0.35


def test_disciplines_cover_thirty_subjects() -> None:
    assert len(scorer.DISCIPLINE_OF) == 30
    assert len(set(scorer.DISCIPLINE_OF.values())) == 6


def test_broken_options_name_the_item() -> None:
    with pytest.raises(ValueError, match="validation_Art_Theory_12: options are not a list"):
        scorer.prompt(doc(options="['unclosed"))


@given(st.sampled_from("ABCD"), st.sampled_from(["{}", "({})", "{}.", "{} it is", "The answer is ({})", " {} "]))
def test_parse_choice_reads_every_form_of_every_letter(letter: str, form: str) -> None:
    assert scorer.parse_choice(form.format(letter), OPTIONS) == letter


@given(st.lists(st.sampled_from("ABCD"), min_size=1, max_size=6))
def test_the_last_of_several_letters_wins(letters: list[str]) -> None:
    assert scorer.parse_choice(" ".join(letters), OPTIONS) == letters[-1]
    assert scorer.parse_choice(" ".join(f"({letter})" for letter in letters), OPTIONS) == letters[-1]


@given(st.integers(-(10**6), 10**6), st.sampled_from(["{}", "It is {}", "x = {}", "the answer is {}."]))
def test_integers_are_found_in_every_phrase(value: int, form: str) -> None:
    assert scorer.is_open_correct(form.format(value), [str(value)])
    assert scorer.is_open_correct(form.format(f"{value:,}"), [str(value)])


@given(st.text(max_size=100))
def test_any_text_can_be_parsed(reply: str) -> None:
    assert scorer.parse_choice(reply, OPTIONS) in (None, "A", "B", "C", "D")
    assert scorer.is_open_correct(reply, ["42", "word"]) in (True, False)


@given(st.text(alphabet="0123456789.,-+eE x", max_size=40))
def test_fast_number_patterns_find_what_the_official_ones_find(text: str) -> None:
    official = (
        r"-?\b\d{1,3}(?:,\d{3})+\b",
        r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
        r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
    )
    assert scorer.extract_numbers(text) == [number for pattern in official for number in re.findall(pattern, text)]
