"""The items of a benchmark: the question that a model answers, and its reply."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.divergence import AnswerMeter, Divergence, ItemKey
from tlq.inputs.images import as_rgb


@dataclass(frozen=True)
class Reference:
    """A reference answer, which the model is measured on.

    Attributes:
        tokens: ids to append to the context.
        start: first of ``tokens`` that belongs to the answer; those before it are the template's (``</think>``).
        conversation: text that ends with ``tokens``, where they do not follow the prompt of generation.
    """

    tokens: tuple[int, ...] = ()
    start: int = 0
    conversation: str | None = None


@dataclass(frozen=True)
class Work:
    """One item to answer."""

    key: ItemKey
    prompt: str
    images: tuple[Any, ...]
    max_new_tokens: int
    reference: Reference = Reference()
    length: int = 0


@dataclass(frozen=True)
class Finished:
    """One finished item. If it could not be answered, ``failure`` is the reason and the reply is empty."""

    key: ItemKey
    reply: str = ""
    divergence: Divergence | None = None
    failure: str | None = None


@dataclass(frozen=True)
class AnswerOptions:
    """Options of the models that answer.

    Attributes:
        batch_size: items per batch; halved when memory runs out.
        max_new_tokens: longest reply in tokens, in place of the tasks' own lengths.
        meter: measures reference answers; None measures none.
        finished: items answered by an earlier, interrupted run.
        on_batch: called with each batch of finished items.
    """

    batch_size: int
    max_new_tokens: int | None = None
    meter: AnswerMeter | None = None
    finished: Mapping[ItemKey, Finished] = field(default_factory=dict)
    on_batch: Callable[[Sequence[Finished]], None] = lambda batch: None


def pixels(image: Any) -> Any:
    """PIL image, RGB, from an EncodedImage or a PIL image."""
    return image.decode() if hasattr(image, "decode") else as_rgb(image)
