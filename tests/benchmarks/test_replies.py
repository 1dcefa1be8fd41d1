"""Thoughts are cut from a reply before it is scored."""

import pytest

from benchmarks.replies import final_answer


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
