"""TextVQA scorer: every rule of the EvalAI processor, and the accuracy over ten answers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.textvqa import scorer

CLEANED = [
    ("Yes", "yes"),
    ("  yes \n", "yes"),
    ("", ""),
    ("   ", ""),
    ("the cat", "cat"),
    ("A cat and an owl", "cat and owl"),
    ("theatre", "theatre"),
    ("two", "2"),
    ("Ten", "10"),
    ("none", "0"),
    ("zero", "0"),
    ("eleven", "eleven"),
    ("twenty two", "twenty 2"),
    ("1,000", "1000"),
    ("a, b", "b"),
    ("really?", "really"),
    ("don't", "don't"),
    ("dont", "don't"),
    ("DONT", "don't"),
    ("im", "im"),
    ("Im", "im"),
    ("ive", "ive"),
    ("somebody'd", "somebodyd"),
    ("yall'd've", "y'all'd've"),
    ("john's", "john 's"),
    ("stop-sign", "stop sign"),
    ("stop - sign", "stop sign"),
    ("- stop-sign", "stopsign"),
    ("coca_cola", "coca cola"),
    ('"exit"', "exit"),
    ("hello!", "hello"),
    ("he said hello ! hello!you", "he said hello helloyou"),
    ("u.s.a.", "usa"),
    ("3.5", "3.5"),
    ("3.", "3"),
    ("v.8", "v.8"),
    ("." * 32, ""),
    ("." * 33, "."),
    ("10:30", "10:30"),
    ("$5", "$5"),
    ("50%", "50%"),
    ("r&b", "r&b"),
    ("one\ttwo\nthree", "1 2 3"),
    ("ｏｎｅ", "ｏｎｅ"),
    ("１", "１"),
]


@pytest.mark.parametrize(("text", "cleaned"), CLEANED)
def test_clean_answer(text: str, cleaned: str) -> None:
    assert scorer.clean_answer(text) == cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [("im", "i'm"), ("IVE", "i've"), ("." * 40, ""), ("10: 30", "10 30"), ("$5", "5"), ("50%", "50"), ("3.5", "3.5")],
)
def test_repaired_cleaning(text: str, cleaned: str) -> None:
    assert scorer.clean_answer(text, repaired=True) == cleaned


ACCURACIES = [
    ("cat", ["cat"] * 10, 1.0),
    ("dog", ["cat"] * 10, 0.0),
    ("cat", ["cat"] * 1 + ["dog"] * 9, 9 * (1 / 3) / 10),
    ("cat", ["cat"] * 2 + ["dog"] * 8, (2 * (1 / 3) + 8 * (2 / 3)) / 10),
    ("cat", ["cat"] * 3 + ["dog"] * 7, (3 * (2 / 3) + 7) / 10),
    ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
    ("The Cat.", ["cat"] * 10, 1.0),
    ("2", ["two"] * 10, 1.0),
    ("", ["cat"] * 10, 0.0),
    ("", [""] * 10, 1.0),
    ("cat", [], 0.0),
    ("cat", None, 0.0),
    ("cat", ["cat"], 0.0),
    ("a cat", ["cat", "CAT", "the cat", "cat!"] + ["dog"] * 6, 1.0),
    ("cat dog", ["cat"] * 10, 0.0),
    ("x" * 2_000_000, ["cat"] * 10, 0.0),
]


@pytest.mark.parametrize(("reply", "answers", "accuracy"), ACCURACIES)
def test_vqa_accuracy(reply: str, answers: list[str] | None, accuracy: float) -> None:
    assert scorer.vqa_accuracy(reply, answers) == pytest.approx(accuracy)


def test_score_leaves_the_document_alone_and_gives_both_numbers() -> None:
    doc = {"answers": ["I'm"] * 10}
    assert scorer.score(doc, ["im"]) == {"vqa_accuracy": 0.0, "vqa_accuracy_repaired": 1.0}
    assert doc == {"answers": ["I'm"] * 10}


def test_prompt_and_target() -> None:
    doc = {"question": "what does the SIGN say?", "answers": ["b", "a", "a", "b", " "], "ocr_tokens": ["STOP"]}
    assert scorer.prompt(doc) == ("<image>What does the sign say?\nAnswer the question using a single word or phrase.")
    assert scorer.target(doc) == "b"
    assert scorer.target({"answers": None}) == ""
    assert scorer.prompt({"question": "is <image> here?"}).count("<image>") == 1


words = st.text(alphabet="abcdefgh 12.,'-", max_size=20)


@given(words)
def test_case_does_not_matter(text: str) -> None:
    assert scorer.clean_answer(text.upper()) == scorer.clean_answer(text)


@given(st.lists(st.sampled_from(["cat", "dog", "7", "exit"]), min_size=1, max_size=5), st.data())
def test_articles_do_not_matter(parts: list[str], data: st.DataObject) -> None:
    with_articles = [f"{data.draw(st.sampled_from(['', 'a ', 'an ', 'The ']))}{part}" for part in parts]
    assert scorer.clean_answer(" ".join(with_articles)) == scorer.clean_answer(" ".join(parts))


@given(st.sampled_from(sorted(scorer.NUMBERS)), words)
def test_number_words_equal_digits(word: str, rest: str) -> None:
    digit = scorer.NUMBERS[word]
    assert scorer.clean_answer(f"{word} {rest}") == scorer.clean_answer(f"{digit} {rest}")


@given(st.integers(0, 10))
def test_accuracy_by_number_of_matches(matches: int) -> None:
    answers = ["cat"] * matches + ["dog"] * (10 - matches)
    by_definition = (matches * min(1, (matches - 1) / 3) + (10 - matches) * min(1, matches / 3)) / 10
    assert scorer.vqa_accuracy("cat", answers) == pytest.approx(max(0, by_definition))


@given(st.text(max_size=200), st.lists(st.text(max_size=20), max_size=10))
def test_vqa_accuracy_accepts_any_text(reply: str, answers: list[str]) -> None:
    assert 0 <= scorer.vqa_accuracy(reply, answers) <= 1
