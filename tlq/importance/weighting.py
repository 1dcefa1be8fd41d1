"""From raw importance scores (``tlq.importance.gradients``) to the weights w_t of the calibration objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tlq.importance.pool import TokenPool

Source = Literal["uniform", "modality", "token", "block"]

#: The losses whose gradients are scored.
LossName = Literal["answer", "block"]

#: Which tokens count as text for source `modality`, see ``Weighting``.
Text = Literal["all", "answer"]


def loss_of(source: Source) -> LossName:
    """The loss whose raw scores a source weighs tokens by."""
    return "block" if source == "block" else "answer"


@dataclass(frozen=True)
class Weighting:
    """From raw importance to token weights.

    Attributes:
        power: exponent on the raw importance.
        clip_quantile: raw importance is capped at this quantile of its layer and group, over the tokens with a gradient
            above 0 (after the last attention, only positions that predict an answer token have one). 1 caps nothing.
        modality_mix: share of the token's modality mean in its weight; 0 is TLQ, 1 leaves one weight per modality.
        least_effective: least effective sample size (sum w)^2 / sum w^2, in tokens, for sources `token` and `block`:
            the weights are mixed with weight 1 by the smallest share that reaches it. 0 mixes nothing.
        text: the tokens that source `modality` counts as text: `all` except image tokens, as in MBQ's paper, or only
            those of the `answer`, as in its code, which is made for captions; other text then gets weight 0.
    """

    power: float = 1.0
    clip_quantile: float = 0.99
    modality_mix: float = 0.0
    least_effective: int = 0
    text: Text = "all"

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ValueError(f"Weighting.power is {self.power}, must be above 0; use source `uniform` for 0")
        if not 0 < self.clip_quantile <= 1:
            raise ValueError(f"Weighting.clip_quantile is {self.clip_quantile}, must be in (0, 1]")
        if not 0 <= self.modality_mix <= 1:
            raise ValueError(f"Weighting.modality_mix is {self.modality_mix}, must be in [0, 1]")
        if self.least_effective < 0:
            raise ValueError(f"Weighting.least_effective is {self.least_effective}, must not be negative")
        if self.text not in ("all", "answer"):
            raise ValueError(f"Weighting.text is {self.text!r}; choose all or answer")

    def least_effective_of(self, source: Source) -> int:
        """The least effective sample size of weights by ``source``: 0 for sources that are never evened out."""
        return self.least_effective if source in ("token", "block") else 0


def token_weights(
    raw: NDArray[np.float32], pool: TokenPool, source: Source, weighting: Weighting
) -> NDArray[np.float32]:
    """Weights w_t >= 0 of one layer and group, with mean 1 over all tokens of the pool.

    Args:
        raw: raw importance of every token, [tokens].

    Returns:
        [tokens].

    Raises:
        ValueError: unknown source, or ``weighting.least_effective`` exceeds the number of tokens.
        FloatingPointError: no token has any importance.
    """
    weights = importance_weights(raw, pool, source, weighting)
    return even_out(weights, weighting.least_effective_of(source)).astype(np.float32)


def importance_weights(
    raw: NDArray[np.float32], pool: TokenPool, source: Source, weighting: Weighting
) -> NDArray[np.float64]:
    """``token_weights`` in double precision and before they are evened out.

    `uniform` is 1 everywhere, `modality` is MBQ's (``modality_weights``). `token` and `block` are each token's own
    importance, clipped, raised to a power, and mixed with the mean of its modality.
    """
    if source == "uniform":
        return np.ones(len(pool), np.float64)
    if source == "modality":
        return modality_weights(raw, pool, weighting.text)
    if source in ("token", "block"):
        return own_weights(raw, pool.is_image, weighting)
    raise ValueError(f"unknown importance source {source!r}; choose uniform, modality, token or block")


def own_weights(raw: NDArray[np.float32], is_image: NDArray[np.bool_], weighting: Weighting) -> NDArray[np.float64]:
    """Weights with mean 1 by each token's own importance, [tokens].

    Raises:
        FloatingPointError: no token has any importance.
    """
    values = _clipped(raw.astype(np.float64), weighting.clip_quantile) ** weighting.power
    mean = _modality_mean(values, is_image)
    return _mean_one((1 - weighting.modality_mix) * values + weighting.modality_mix * mean)


def _clipped(values: NDArray[np.float64], quantile: float) -> NDArray[np.float64]:
    """Values, at most the given quantile of the positive ones."""
    positive = values[values > 0]
    return np.minimum(values, np.quantile(positive, quantile)) if len(positive) else values


def modality_weights(
    raw: NDArray[np.float32], pool: TokenPool, text: Text = "all", least_ratio: float = 0.0
) -> NDArray[np.float64]:
    """MBQ's weights with mean 1, [tokens]: the ratio of modalities for image tokens, 1 for text (arXiv 2412.19509).

    Args:
        raw: importance at the output of the attention or MLP that the group belongs to, [tokens].
        text: the tokens that count as text; tokens of neither modality get weight 0.
        least_ratio: lower bound of the ratio, in MBQ's code its median over layers.
    """
    ratio = max(modality_ratio(raw, pool, text), least_ratio)
    return _mean_one(np.where(pool.is_image, ratio, text_mask(pool, text).astype(np.float64)))


def modality_ratio(raw: NDArray[np.float32], pool: TokenPool, text: Text = "all") -> float:
    """Mean importance of image tokens over that of text tokens, each a mean over samples of the sample's mean.

    Samples without a token of a modality do not enter its mean. A pool that lacks a modality has the ratio 1.

    Raises:
        FloatingPointError: text tokens have no importance.
    """
    image_means, text_means = (
        [
            float(values[mask].mean(dtype=np.float64))
            for values, mask in zip(pool.split(raw), pool.split(marks), strict=True)
            if mask.any()
        ]
        for marks in (pool.is_image, text_mask(pool, text))
    )
    if not image_means or not text_means:
        return 1.0
    if not sum(text_means) > 0:
        raise FloatingPointError(
            f"importance of text tokens sums to {sum(text_means)}: none has any influence on the loss"
        )
    return float(np.mean(image_means) / np.mean(text_means))


def text_mask(pool: TokenPool, text: Text) -> NDArray[np.bool_]:
    """Whether each token counts as text, [tokens]: all except image tokens, or the answer's."""
    return ~pool.is_image if text == "all" else pool.is_answer


def even_out(weights: NDArray[np.float64], least_effective: int) -> NDArray[np.float64]:
    """Mix weights of mean 1 with weight 1 by the smallest share that gives ``least_effective`` effective tokens.

    n weights of variance v, scaled by k towards 1, have an effective sample size of n / (1 + k^2 v).

    Raises:
        ValueError: there are fewer than ``least_effective`` weights.
    """
    if least_effective > len(weights):
        raise ValueError(
            f"{least_effective} effective tokens are needed, the pool has {len(weights)} tokens; lower "
            "Weighting.least_effective, score more samples or, for draws, raise TokenBudget.tokens_per_layer "
            "(or per_width in its place)"
        )
    if not len(weights):
        return weights
    variance = float(weights.var())
    if least_effective * (1 + variance) <= len(weights):
        return weights
    return 1 + np.sqrt((len(weights) / least_effective - 1) / variance) * (weights - 1)


def _mean_one(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    total = weights.sum()
    if not np.isfinite(total) or total <= 0:
        raise FloatingPointError(f"token importance sums to {total}: no token has any influence on the loss")
    return weights * (len(weights) / total)


def _modality_mean(values: NDArray[np.float64], is_image: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Every value replaced by the mean of its modality, [tokens]."""
    means = np.empty_like(values)
    for mask in (is_image, ~is_image):
        if mask.any():
            means[mask] = values[mask].mean()
    return means
