"""ChartQA scorer: relaxed accuracy at and around its edges."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.chartqa import scorer

CASES = [
    ("10", "10", True),
    ("10.5", "10", True),
    ("9.5", "10", True),
    ("10.51", "10", False),
    ("9.49", "10", False),
    ("105", "100", True),
    ("-10", "10", False),
    ("-10.5", "-10", True),
    ("1e1", "10", True),
    ("0", "0", True),
    ("0.0", "0", False),
    ("0.01", "0", False),
    ("0", "0.0", False),
    ("0%", "0%", True),
    ("0", "5", False),
    ("50%", "50%", True),
    ("50%", "0.5", True),
    ("0.52", "50%", True),
    ("0.53", "50%", False),
    ("50", "50%", False),
    ("50%", "50", False),
    ("5 %", "5%", True),
    ("5%%", "5%", True),
    ("%", "%", True),
    ("1,000", "1000", False),
    ("1,000", "1,000", True),
    ("$10", "10", False),
    ("$10", "$10", True),
    ("Yes", "yes", True),
    ("yes.", "yes", False),
    ("yes ", "yes", True),
    (" 10", "10", True),
    ("blue", "Blue", True),
    ("dark blue", "blue", False),
    ("", "blue", False),
    ("", "", True),
    ("blue", "", False),
    ("ten", "10", False),
    ("10 units", "10", False),
    ("nan", "nan", False),
    ("inf", "10", False),
    ("١٠", "10", True),
    ("１０", "10", True),
    ("ＹＥＳ", "yes", False),
    ("9" * 1_000_000, "10", False),
    ("x" * 3_000_000, "10", False),
]


@pytest.mark.parametrize(("reply", "answer", "correct"), CASES)
def test_is_correct(reply: str, answer: str, correct: bool) -> None:
    assert scorer.is_correct(reply, answer) is correct


@pytest.mark.parametrize(
    ("kind", "half"), [("human_test", "human"), ("human", "human"), ("augmented_test", "augmented")]
)
def test_score_names_the_half_of_the_question(kind: str, half: str) -> None:
    assert scorer.score({"answer": "3", "type": kind}, ["3"]) == {"relaxed_accuracy": 1.0, half: 1.0}


def test_prompt_and_target() -> None:
    doc = {"question": "How many Bars?", "answer": "3"}
    assert scorer.prompt(doc) == "<image>How many Bars?\nAnswer the question with a single word."
    assert scorer.target(doc) == "3"


values = st.floats(0.001, 1e9)


@given(values, st.floats(-0.0499, 0.0499), st.sampled_from([1, -1]))
def test_within_five_percent(value: float, change: float, sign: int) -> None:
    assert scorer.is_correct(repr(sign * value * (1 + change)), repr(sign * value))


@given(values, st.floats(0.0501, 10), st.sampled_from([1, -1]))
def test_beyond_five_percent(value: float, change: float, side: int) -> None:
    assert not scorer.is_correct(repr(value * (1 + side * change)), repr(value))


@given(st.integers(1, 1000))
def test_percent_sign_divides_by_a_hundred(value: int) -> None:
    assert scorer.is_correct(f"{value}%", str(value / 100))
    assert scorer.is_correct(str(value / 100), f"{value}%")


@given(st.text(alphabet=st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=10))
def test_text_is_compared_without_case(text: str) -> None:
    if scorer.to_number(text) is None:
        assert scorer.is_correct(text.upper(), text.lower())


@given(st.text(max_size=100), st.text(max_size=100))
def test_is_correct_accepts_any_text(reply: str, answer: str) -> None:
    assert scorer.is_correct(reply, answer) in (True, False)
