"""Token importance: from raw scores (``tlq.scoring``) to the weights w_t of the calibration objective."""

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
        clip_quantile: raw importance is capped at this quantile of its layer and group; 1 caps nothing.
        modality_mix: share of the token's modality mean mixed in; 0 is TLQ's own, 1 equals source `modality`.
    """

    power: float = 1.0
    clip_quantile: float = 0.99
    modality_mix: float = 0.0

    def __post_init__(self) -> None:
        if self.power <= 0:
            raise ValueError(f"importance power is {self.power}, must be above 0; use source `uniform` for 0")
        if not 0 < self.clip_quantile <= 1:
            raise ValueError(f"importance clip_quantile is {self.clip_quantile}, must be in (0, 1]")
        if not 0 <= self.modality_mix <= 1:
            raise ValueError(f"importance modality_mix is {self.modality_mix}, must be in [0, 1]")


def token_weights(
    raw: Sequence[NDArray[np.float32]],
    is_image: Sequence[NDArray[np.bool_]],
    source: Source,
    weighting: Weighting,
) -> list[NDArray[np.float32]]:
    """Weights w_t >= 0 with mean 1 over all tokens, for one layer and group.

    `uniform` is 1 everywhere. `modality` gives every image token one value and every text token another, in the ratio
    of their mean importance (MBQ). `token` uses each token's own importance, clipped, raised to a power and mixed with
    its modality's mean.
    """
    image = np.concatenate(is_image)
    if source == "uniform":
        weights = np.ones(image.shape, np.float64)
    elif source == "modality":
        weights = _modality_mean(np.concatenate(raw).astype(np.float64), image)
    elif source in ("token", "block"):
        values = np.concatenate(raw).astype(np.float64)
        values = np.minimum(values, np.quantile(values, weighting.clip_quantile)) ** weighting.power
        weights = (1 - weighting.modality_mix) * values + weighting.modality_mix * _modality_mean(values, image)
    else:
        raise ValueError(f"unknown importance source {source!r}; choose uniform, modality or token")
    total = weights.sum()
    if not np.isfinite(total) or total <= 0:
        raise FloatingPointError(f"token importance sums to {total}: no token has any influence on the loss")
    weights = (weights * (len(weights) / total)).astype(np.float32)
    return np.split(weights, np.cumsum([len(part) for part in is_image])[:-1])


def _modality_mean(values: NDArray[np.float64], image: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Every value replaced by the mean of its modality."""
    means = np.empty_like(values)
    for mask in (image, ~image):
        if mask.any():
            means[mask] = values[mask].mean()
    return means
