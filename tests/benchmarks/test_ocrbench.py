"""OCRBench scorer: substrings, the formula rule, categories, and no memory of earlier runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.ocrbench import scorer

CASES = [
    ("exit", "exit", "IIIT5K", True),
    ("The sign says EXIT.", "exit", "IIIT5K", True),
    ("exit", "EXIT", "IIIT5K", True),
    ("ex it", "exit", "IIIT5K", False),
    ("exi", "exit", "IIIT5K", False),
    ("", "exit", "IIIT5K", False),
    (" exit ", "exit", "IIIT5K", True),
    ("exit", " exit\n", "IIIT5K", True),
    ("new\nyork", "new york", "docVQA", True),
    ("new york", "new\nyork", "docVQA", True),
    ("new  york", "new york", "docVQA", False),
    ("new\tyork", "new york", "docVQA", False),
    ("$1,000", "1,000", "FUNSD", True),
    ("$1000", "1,000", "FUNSD", False),
    ("cats", "cat", "textVQA", True),
    ("12345", "234", "ORAND", True),
    ("STRASSE", "strasse", "IIIT5K", True),
    ("ｅｘｉｔ", "exit", "IIIT5K", False),
    ("١٢", "12", "IIIT5K", False),
    ("x ^ { 2 }", "x^{2}", "HME100k", True),
    ("x^{2}", "x ^ { 2 }", "HME100k", True),
    ("X^{2}", "x^{2}", "HME100k", False),
    ("x^{2}", "X^{2}", "HME100k", False),
    ("X^{2}", "X^{2}", "HME100k", True),
    ("the formula is \\frac{ a }{ b } .", "\\frac { a } { b }", "HME100k", True),
    ("a\n+ b", "a + b", "HME100k", True),
    ("a\t+ b", "a + b", "HME100k", False),
    ("X^{2}", "x^{2}", "IIIT5K", True),
    ("x ^ 2", "x^2", "IIIT5K", False),
    ("Hme", "hme", "hme100k", True),
    ("e" * 2_000_000 + "xit", "exit", "IIIT5K", True),
    ("e" * 2_000_000, "exit", "IIIT5K", False),
]


@pytest.mark.parametrize(("reply", "answer", "dataset", "correct"), CASES)
def test_is_correct(reply: str, answer: str, dataset: str, correct: bool) -> None:
    assert scorer.is_correct(reply, answer, dataset) is correct


def doc(answer: object, dataset: str = "IIIT5K", question_type: str = "Regular Text Recognition") -> dict[str, object]:
    return {"answer": answer, "dataset": dataset, "question_type": question_type, "question": " what is written? "}


@pytest.mark.parametrize(
    ("answer", "correct"),
    [(["exit"], 1), (["no", "exit"], 1), ("exit", 1), (["no"], 0), ([], 0), (None, 0), ([""], 0), (["", "exit"], 1)],
)
def test_any_ground_truth_counts_and_blank_ones_never(answer: object, correct: int) -> None:
    assert scorer.score(doc(answer), ["exit"])["accuracy"] == correct


@pytest.mark.parametrize(
    ("question_type", "category"),
    [
        ("Regular Text Recognition", "text_recognition"),
        ("Irregular Text Recognition", "text_recognition"),
        ("Artistic Text Recognition", "text_recognition"),
        ("Handwriting Recognition", "text_recognition"),
        ("Digit String Recognition", "text_recognition"),
        ("Non-Semantic Text Recognition", "text_recognition"),
        ("Scene Text-centric VQA", "scene_text_vqa"),
        ("Doc-oriented VQA", "document_vqa"),
        ("Key Information Extraction", "key_information"),
        ("Handwritten Mathematical Expression Recognition", "handwritten_mathematics"),
        ("Something new", "other"),
    ],
)
def test_categories(question_type: str, category: str) -> None:
    assert scorer.score(doc(["exit"], question_type=question_type), ["exit"])[category] == 1.0


def test_the_metric_of_lmms_eval_reads_full_width_characters_as_ascii() -> None:
    scores = scorer.score(doc(["ABC 12"]), ["\uff21\uff22\uff23\u3000\uff11\uff12"])
    assert (scores["accuracy"], scores["accuracy_lmms_eval"]) == (0.0, 1.0)
    formula = scorer.score(doc(["X^2"], dataset="HME100k"), ["X^2"])
    assert (formula["accuracy"], formula["accuracy_lmms_eval"]) == (1.0, 1.0)


def test_no_state_between_runs() -> None:
    def run() -> float:
        return scorer.total([scorer.score(doc(["exit"]), ["exit"])["points"] for _ in range(3)])

    assert run() == run() == 3.0


def test_prompt_and_target() -> None:
    assert scorer.prompt(doc(["a"])) == "<image>what is written?"
    assert scorer.target(doc(["", "a", "b"])) == "a"
    assert scorer.target(doc(None)) == ""


@given(st.text(max_size=20), st.text(alphabet="abcXYZ 12", min_size=1, max_size=10), st.text(max_size=20))
def test_a_quoted_answer_is_found(before: str, answer: str, after: str) -> None:
    assert scorer.is_correct(f"{before} {answer} {after}", answer, "IIIT5K")
    assert scorer.is_correct(f"{before} {answer} {after}", answer, "HME100k")


@given(st.text(alphabet="abcXYZ 12", max_size=20), st.text(alphabet="abcXYZ 12", max_size=5))
def test_formulas_are_compared_without_spaces(reply: str, answer: str) -> None:
    spaced = " ".join(reply)
    assert scorer.is_correct(spaced, answer, "HME100k") == scorer.is_correct(reply, answer, "HME100k")
