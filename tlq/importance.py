"""Token importance: how much the answer's loss feels an error on each token, at each linear group.

For token t of a group with output y_t the raw importance is g_t = mean over channels of |dL/dy_t|, with L the
cross-entropy of the answer (TLQ, arXiv 2602.07899). Weights stay frozen: only activations carry gradients.
``token_weights`` turns raw importance into the weights w_t of the calibration objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from tlq.architectures import Architecture, check_linears
from tlq.decoder import to_device
from tlq.samples import Batch

Source = Literal["uniform", "modality", "token"]

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


def score_tokens(model: nn.Module, architecture: Architecture, batches: Sequence[Batch], samples: int) -> Importance:
    """Raw importance of every token of every sample, by layer and linear group.

    Raises:
        ValueError: the decoder is not made of the linears of its row.
        FloatingPointError: a loss or a gradient is not finite; the message names the sample or the layer.
    """
    check_linears(model, architecture)
    model.requires_grad_(False)
    device = next(model.parameters()).device
    scores: Importance = {
        (layer, group.name): [np.empty(0, np.float32)] * samples
        for layer in range(len(architecture.decoder_layers(model)))
        for group in architecture.groups
    }
    for batch in tqdm(batches, desc="importance", unit="batch"):
        for key, gradient in _batch_gradients(model, architecture, batch, device).items():
            for row, sample in enumerate(batch.samples):
                scores[key][sample] = gradient[row, batch.valid[row]].numpy()
    return scores


def _batch_gradients(
    model: nn.Module, architecture: Architecture, batch: Batch, device: torch.device
) -> dict[tuple[int, str], Tensor]:
    """g_t [batch, time] of one micro-batch for every (layer, group)."""
    totals: dict[tuple[int, str], Tensor] = {}
    channels: dict[tuple[int, str], int] = {}

    def watch(key: tuple[int, str]) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            channels[key] = channels.get(key, 0) + output.shape[-1]
            output.register_hook(lambda grad: add(key, grad))

        return hook

    def add(key: tuple[int, str], grad: Tensor) -> None:
        total = grad.float().abs().sum(-1)
        totals[key] = totals[key] + total if key in totals else total

    handles = []
    layers = architecture.decoder_layers(model)
    for index, layer in enumerate(layers):
        for group in architecture.groups:
            for path in group.linears:
                hook = watch((index, group.name))
                handles.append(layer.get_submodule(path).register_forward_hook(hook))
    try:
        with _gradients_from(layers[0]):
            logits = model(**to_device(batch.inputs, device), use_cache=False).logits
        answer_loss(logits, batch).backward()
    finally:
        for handle in handles:
            handle.remove()
    gradients = {key: (total / channels[key]).cpu() for key, total in totals.items()}
    for (layer_index, name), gradient in gradients.items():
        if not torch.isfinite(gradient[batch.valid]).all():
            raise FloatingPointError(
                f"layer {layer_index}, group {name}: gradient is not finite; run importance in float32 "
                "(model.dtype) or drop the sample"
            )
    return gradients


@contextmanager
def _gradients_from(layer: nn.Module) -> Any:
    """Make the layer's input the leaf of the graph: embeddings and vision tower need no gradient."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].detach().requires_grad_(), *args[1:])

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in nats: mean over each sample's answer tokens, summed over samples.

    Raises:
        FloatingPointError: the loss of a sample is not finite.
    """
    targets = batch.input_ids[:, 1:].to(logits.device)
    mask = batch.is_answer[:, 1:].to(logits.device)
    per_token = nn.functional.cross_entropy(logits[:, :-1][mask].float(), targets[mask], reduction="none")
    losses = torch.zeros(mask.shape, device=logits.device).masked_scatter(mask, per_token)
    per_sample = losses.sum(1) / mask.sum(1)
    if not torch.isfinite(per_sample).all():
        row = int((~torch.isfinite(per_sample)).nonzero()[0])
        raise FloatingPointError(
            f"sample number {batch.samples[row]}: its loss is not finite; check the model's weights and dtype"
        )
    return per_sample.sum()


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
    elif source == "token":
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
