"""A model's reply without the thoughts that precede its answer."""

import re

_THOUGHTS = re.compile(r"<(think|analysis)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_UNOPENED = re.compile(r".*</(?:think|analysis)>", re.DOTALL | re.IGNORECASE)


def final_answer(reply: str) -> str:
    """The reply that is scored: without `<think>` and `<analysis>` blocks, and without blanks around it.

    Prompts may end with the opening tag: everything before a closing tag alone is a thought. A thought that the token
    limit cut off stays, because nothing tells it from an answer; raise ``evaluate.max_new_tokens``.
    """
    return _UNOPENED.sub("", _THOUGHTS.sub("", reply)).strip()
