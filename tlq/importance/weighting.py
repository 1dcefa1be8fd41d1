"""Token importance: from raw scores (``tlq.importance.gradients``) to the weights w_t of the calibration objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Source = Literal["uniform", "modality", "token", "block"]

#: The losses whose gradients raw scores can be.
LossName = Literal["answer", "block"]


def loss_of(source: Source) -> LossName:
    """The loss whose raw scores a source weighs tokens by."""
    return "block" if source == "block" else "answer"


#: (layer, group name) -> one array per sample, one float per token.
Importance = dict[tuple[int, str], list[NDArray[np.float32]]]


@dataclass(frozen=True)
class Weighting:
    """From raw importance to token weights.

    Attributes:
        power: exponent on the raw importance.
        clip_quantile: raw importance is capped at this quantile of its layer and group, taken over the tokens that have
            any: behind the last attention only those do that predict a token of the answer. 1 caps nothing.
        modality_mix: share of the token's modality mean mixed in; 0 is TLQ's own, 1 leaves one weight per modality.
        least_effective: least effective sample size (sum w)^2 / sum w^2, in tokens, of sources `token` and `block`: as
            little of weight 1 is mixed in as reaches it; 0 asks for none.
        text: which tokens source `modality` counts as text: `all` that are not of an image, as MBQ's paper does, or
            those of the `answer` only, as its code does, made for captions: other text then has no weight.
    """

    power: float = 1.0
    clip_quantile: float = 0.99
    modality_mix: float = 0.0
    least_effective: int = 0
    text: Literal["all", "answer"] = "all"

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ValueError(f"importance power is {self.power}, must be above 0; use source `uniform` for 0")
        if not 0 < self.clip_quantile <= 1:
            raise ValueError(f"importance clip_quantile is {self.clip_quantile}, must be in (0, 1]")
        if not 0 <= self.modality_mix <= 1:
            raise ValueError(f"importance modality_mix is {self.modality_mix}, must be in [0, 1]")
        if self.least_effective < 0:
            raise ValueError(f"importance least_effective is {self.least_effective}, must not be negative")
        if self.text not in ("all", "answer"):
            raise ValueError(f"importance text is {self.text!r}; choose all or answer")


def token_weights(
    raw: Sequence[NDArray[np.float32]],
    is_image: Sequence[NDArray[np.bool_]],
    source: Source,
    weighting: Weighting,
) -> list[NDArray[np.float32]]:
    """Weights w_t >= 0 with mean 1 over all tokens, for one layer and group.

    `uniform` is 1 everywhere, `modality` is MBQ's (``modality_weights``). `token` and `block` use each token's own
    importance, clipped, raised to a power, mixed with its modality's mean and evened out.

    Raises:
        ValueError: unknown source, or more effective tokens asked for than there are tokens.
        FloatingPointError: no token has any importance.
    """
    if source == "modality":
        return modality_weights(raw, is_image)
    image = np.concatenate(is_image)
    if source == "uniform":
        weights = np.ones(image.shape, np.float64)
    elif source in ("token", "block"):
        values = np.concatenate(raw).astype(np.float64)
        values = _clipped(values, weighting.clip_quantile) ** weighting.power
        weights = (1 - weighting.modality_mix) * values + weighting.modality_mix * _modality_mean(values, image)
        weights = evened_out(_mean_one(weights), weighting.least_effective)
    else:
        raise ValueError(f"unknown importance source {source!r}; choose uniform, modality, token or block")
    return _split(weights, is_image)


def _clipped(values: NDArray[np.float64], quantile: float) -> NDArray[np.float64]:
    """Values with those above the quantile of the positive ones lowered to it."""
    positive = values[values > 0]
    return np.minimum(values, np.quantile(positive, quantile)) if len(positive) else values


def modality_weights(
    raw: Sequence[NDArray[np.float32]],
    is_image: Sequence[NDArray[np.bool_]],
    is_answer: Sequence[NDArray[np.bool_]] | None = None,
    least_ratio: float = 0.0,
) -> list[NDArray[np.float32]]:
    """MBQ's weights with mean 1: the ratio of modalities for an image token, 1 for a text token (arXiv 2412.19509).

    Args:
        raw: importance at the output of the attention or MLP that the group belongs to.
        is_answer: what counts as text, all else being left out of the objective (see ``Weighting.text``); without
            marks every token that is not of an image is text.
        least_ratio: the ratio is raised to this, in MBQ's code its median over layers.
    """
    text = text_tokens(is_image, is_answer)
    ratio = max(modality_ratio(raw, is_image, text), least_ratio)
    weights = np.where(np.concatenate(is_image), ratio, np.concatenate(text).astype(np.float64))
    return _split(_mean_one(weights), is_image)


def modality_ratio(
    raw: Sequence[NDArray[np.float32]], is_image: Sequence[NDArray[np.bool_]], is_text: Sequence[NDArray[np.bool_]]
) -> float:
    """Mean importance of image tokens over that of text tokens, each a mean over samples of the sample's own mean.

    Samples without a token of a modality have no part in its mean; a pool without one has the ratio 1.

    Raises:
        FloatingPointError: text tokens have no importance.
    """
    image, text = (
        [float(values[mask].mean(dtype=np.float64)) for values, mask in zip(raw, marks, strict=True) if mask.any()]
        for marks in (is_image, is_text)
    )
    if not image or not text:
        return 1.0
    if not sum(text) > 0:
        raise FloatingPointError(f"importance of text tokens sums to {sum(text)}: none has any influence on the loss")
    return float(np.mean(image) / np.mean(text))


def text_tokens(
    is_image: Sequence[NDArray[np.bool_]], is_answer: Sequence[NDArray[np.bool_]] | None
) -> Sequence[NDArray[np.bool_]]:
    """Tokens that count as text: those of the answer, or without such marks all that are not of an image."""
    return [~marks for marks in is_image] if is_answer is None else is_answer


def evened_out(weights: NDArray[np.float64], least_effective: int) -> NDArray[np.float64]:
    """Weights of mean 1 with as little of weight 1 mixed in as makes ``least_effective`` of them effective.

    With a share k of their own, n weights of variance v have an effective sample size of n / (1 + k^2 v).

    Raises:
        ValueError: there are fewer weights.
    """
    if least_effective > len(weights):
        raise ValueError(
            f"{least_effective} effective tokens are needed, the pool has {len(weights)} tokens; lower "
            "calibset.weighting.least_effective, or raise importance.samples or, for draws, tokens_per_layer"
        )
    variance = float(weights.var())
    if least_effective * (1 + variance) <= len(weights):
        return weights
    return 1 + np.sqrt((len(weights) / least_effective - 1) / variance) * (weights - 1)


def _mean_one(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    total = weights.sum()
    if not np.isfinite(total) or total <= 0:
        raise FloatingPointError(f"token importance sums to {total}: no token has any influence on the loss")
    return weights * (len(weights) / total)


def _split(weights: NDArray[np.float64], is_image: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.float32]]:
    return np.split(weights.astype(np.float32), np.cumsum([len(part) for part in is_image])[:-1])


def _modality_mean(values: NDArray[np.float64], image: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Every value replaced by the mean of its modality."""
    means = np.empty_like(values)
    for mask in (image, ~image):
        if mask.any():
            means[mask] = values[mask].mean()
    return means
