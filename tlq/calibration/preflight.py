"""Checks before and during a calibration. A job that cannot succeed is refused before any work."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from tlq.calibration.job import CalibrationJob
from tlq.importance.token_weights import TokenWeights
from tlq.models.architectures import Architecture, check_linears, get_linear, linear_paths
from tlq.models.linear_groups import EXPERTS, LinearGroup
from tlq.models.streaming import LayeredModel
from tlq.quantization.formats import FULL_PRECISION, Scheme, WeightQuantizer
from tlq.samples import Batch


def check_job(model: LayeredModel, job: CalibrationJob) -> None:
    """Refuse a job that cannot succeed.

    Raises:
        ValueError: see ``check_shapes`` and ``check_data``; or the ranks' device is not the model's.
    """
    if job.ranks.device.type != model.device.type:
        raise ValueError(
            f"the ranks compute on {job.ranks.device}, the model is on {model.device}; create "
            "Ranks with the model's device"
        )
    check_shapes(model.skeleton, model.architecture, job.scheme)
    if job.needs_data:
        layers = len(model.architecture.decoder_layers(model.skeleton))
        check_data(model.architecture, layers, job.batches, job.weights)


def check_shapes(model: nn.Module, architecture: Architecture, scheme: Scheme) -> None:
    """Check that the scheme fits the model.

    Raises:
        ValueError: a linear is missing or is not a Linear, a group size does not divide its width, or an override
            matches no linear or only some linears of a group.
    """
    check_linears(model, architecture)
    if architecture.joined and scheme.mixed:
        raise ValueError(
            f"scheme {scheme.name}: checkpoints of {architecture.model_type} keep several linears in one tensor, and "
            "nothing loads those of several schemes; choose one scheme for all of them, with overrides to "
            f"{FULL_PRECISION} at most"
        )
    layers = architecture.decoder_layers(model)
    check_overrides(architecture, len(layers), scheme)
    for index, layer in enumerate(layers):
        check_experts(architecture, index, scheme)
        for group in architecture.groups[index]:
            of_group = group_scheme(architecture, index, group, scheme)
            for path in group.linears:
                if of_group is not None and of_group.budget is None:  # a mix leaves out what does not fit
                    of_group.check_width(get_linear(layer, path).in_features, f"{architecture.layers}.{index}.{path}")


def check_weights(layer: nn.Module, architecture: Architecture, index: int) -> None:
    """Raise FloatingPointError if a weight of the layer is not finite."""
    for path in architecture.linears(index):
        if not torch.isfinite(get_linear(layer, path).weight).all():
            raise FloatingPointError(
                f"{architecture.layers}.{index}.{path}: weight is not finite; the checkpoint is damaged"
            )


def group_scheme(architecture: Architecture, index: int, group: LinearGroup, scheme: Scheme) -> Scheme | None:
    """The scheme of a group of layer ``index`` with overrides applied; None if it stays in full precision.

    Raises:
        ValueError: an override matches only some linears of the group, which share scales and the preceding norm.
    """
    schemes = {scheme.of(f"{architecture.layers}.{index}.{path}") for path in group.linears}
    if len(schemes) > 1:
        raise ValueError(
            f"layer {index}, group {group.name}: its linears {', '.join(group.linears)} share an input and need one "
            "scheme; let the override match all of them or none"
        )
    return schemes.pop()


def check_experts(architecture: Architecture, index: int, scheme: Scheme) -> None:
    """Raise ValueError if linears of experts of a layer have different schemes: engines compute them together."""
    paths = [path for group in architecture.groups[index] if group.experts for path in group.linears]
    if len({scheme.of(f"{architecture.layers}.{index}.{path}") for path in paths}) > 1:
        raise ValueError(
            f"layer {index}: an override gives some linears of its experts another scheme, but engines compute all "
            "experts of a layer together; let the override match all of them (*.experts.*) or none"
        )


def group_quantizer(
    architecture: Architecture, index: int, group: LinearGroup, quantizer: WeightQuantizer
) -> WeightQuantizer | None:
    """The quantizer of a group: its scheme as in ``group_scheme``, and the dtype of the scales."""
    scheme = group_scheme(architecture, index, group, quantizer.scheme)
    return None if scheme is None else WeightQuantizer(scheme, quantizer.scale_dtype)


def check_overrides(architecture: Architecture, layers: int, scheme: Scheme) -> None:
    """Raise ValueError if a pattern matches no linear, because a typing error would quantize a layer to keep."""
    paths = [path for index in range(layers) for path in linear_paths(architecture, index)]
    for pattern, _ in scheme.overrides:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(f"override {pattern!r} matches no linear; their paths are like {paths[-1]}")


def check_data(architecture: Architecture, layers: int, batches: Sequence[Batch], weights: TokenWeights) -> None:
    """Raise ValueError if calibration data is missing, because without data every method would round to nearest."""
    if not batches:
        raise ValueError("no calibration samples; give some, or use the recipe rtn, which needs none")
    for layer in range(layers):
        # An expert that no token is routed to gets further tokens (``tlq.calibration.routing``).
        of_experts = [key for key in weights if key[0] == layer and key[1].startswith(EXPERTS)]
        for group in architecture.groups[layer]:
            keys = [(layer, group.name)] if group.experts is None else of_experts
            if not any(_counts(weights.get(key, []), len(batches)) for key in keys):
                raise ValueError(
                    f"layer {layer}, group {group.name}: no token of the calibration data has a weight; "
                    "compute the token weights again, for this model and these samples"
                )


def _counts(parts: Sequence[Tensor], batches: int) -> bool:
    """Whether every micro-batch has its weights, and a token has a weight above 0."""
    return len(parts) == batches and any(bool((part > 0).any()) for part in parts)
