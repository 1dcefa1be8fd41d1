"""Choose example answers whose correctness changed against full precision, with their questions and pictures."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
from PIL import Image

from benchmarks.compare import FULL, RIGHT
from benchmarks.data import BenchmarkError
from benchmarks.harness import Question, read_questions
from benchmarks.source import BenchmarkSource
from tasks.files import EVALUATION, existing
from tlq.inputs.images import IMAGE_ERRORS

logger = logging.getLogger(__name__)

_WIDEST = 320  # pixels of a picture on the page
_COLUMNS = ["task", "doc", "prompt", "target", "reply", "score"]

Change = Literal["lost", "gained"]


@dataclass(frozen=True)
class ChangedAnswer:
    """An item that is right in full precision and wrong in the variant (``lost``), or the other way round (``gained``).

    Attributes:
        benchmark, item: name of the benchmark, and id of the item.
        question: the question as the model gets it; the whole prompt, with the marks of the chat template, if the
            benchmark's data cannot be read.
        target: the reference answer.
        full_reply, reply: replies of full precision and of the variant.
        pictures: the pictures of the question, reduced.
        missing: why there are no pictures; None if there are.
    """

    benchmark: str
    item: str
    change: Change
    question: str
    target: str
    full_reply: str
    reply: str
    pictures: list[Image.Image] = field(default_factory=list)
    missing: str | None = None


def read_changed_answers(
    variants: Sequence[str], sources: Sequence[BenchmarkSource], most: int
) -> dict[str, list[ChangedAnswer]]:
    """By variant, up to ``most`` lost and up to ``most`` gained answers.

    Raises:
        FileNotFoundError: a variant has not been evaluated.
    """
    full = _read_items(FULL, "baseline")
    rows = {name: choose_changes(_read_items(name, f"evaluate@{name}"), full, most) for name in variants}
    ids: dict[str, set[str]] = {}
    for chosen in rows.values():
        for task, doc in zip(chosen["task"], chosen["doc"], strict=True):
            ids.setdefault(task, set()).add(doc)
    shown = {source.task: _Shown.read(source, ids[source.task]) for source in sources if source.task in ids}
    return {name: [_answer(row, shown) for row in chosen.to_dict("records")] for name, chosen in rows.items()}


def choose_changes(items: pd.DataFrame, full: pd.DataFrame, most: int) -> pd.DataFrame:
    """Up to ``most`` lost and up to ``most`` gained items, from as many different benchmarks as there are.

    Within a benchmark the items with the smallest hash of their id come first, so that variants that lost the same
    item show the same item.

    Returns:
        columns of items.parquet, reply_full and change (``lost`` or ``gained``); the lost items are first.
    """
    both = items.merge(full[["task", "doc", "reply", "score"]], on=["task", "doc"], suffixes=("", "_full"))
    right, right_full = both["score"] >= RIGHT, both["score_full"] >= RIGHT
    parts = []
    for change, rows in (("lost", both[right_full & ~right]), ("gained", both[right & ~right_full])):
        order = rows.assign(change=change, rank=[_rank(*key) for key in zip(rows["task"], rows["doc"], strict=True)])
        order = order.sort_values("rank")
        order["turn"] = order.groupby("task").cumcount()
        parts.append(order.sort_values(["turn", "task"]).head(most))
    return pd.concat(parts, ignore_index=True)


def _rank(task: str, doc: str) -> str:
    return hashlib.sha256(f"{task}:{doc}".encode()).hexdigest()


def _read_items(variant: str, stage: str) -> pd.DataFrame:
    return pd.read_parquet(existing(EVALUATION / variant / "items.parquet", stage), columns=_COLUMNS)


@dataclass(frozen=True)
class _Shown:
    """Questions of a benchmark by item; ``missing`` says why there are none."""

    questions: Mapping[str, Question]
    missing: str | None = None

    @classmethod
    def read(cls, source: BenchmarkSource, ids: set[str]) -> _Shown:
        if source.data is None:
            return cls(
                {}, "the benchmark is on the hub; a local copy as `data` of evaluate.benchmarks shows its pictures"
            )
        try:
            return cls(read_questions(source, ids))
        except (BenchmarkError, OSError) as error:
            logger.warning("the report shows no pictures of %s", error)
            return cls({}, str(error))


def _answer(row: Mapping[Any, Any], shown: Mapping[str, _Shown]) -> ChangedAnswer:
    benchmark = shown.get(row["task"], _Shown({}, "evaluate.benchmarks does not name the benchmark any more"))
    question = benchmark.questions.get(row["doc"])
    missing: str | None = benchmark.missing or "the benchmark's data has no such item, or its picture is damaged"
    pictures: list[Image.Image] = []
    if question is not None:
        try:
            pictures, missing = [_reduced(image.decode()) for image in question.images], None
        except IMAGE_ERRORS as error:
            missing = f"the picture is damaged: {error}"
    return ChangedAnswer(
        benchmark=row["task"],
        item=row["doc"],
        change="lost" if row["change"] == "lost" else "gained",
        question=row["prompt"] if question is None else question.text,
        target=row["target"],
        full_reply=row["reply_full"],
        reply=row["reply"],
        pictures=pictures,
        missing=missing,
    )


def _reduced(picture: Image.Image) -> Image.Image:
    picture.thumbnail((_WIDEST, _WIDEST))
    return picture
