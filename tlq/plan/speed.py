"""How fast this machine is at the work of a job: a measurement of a few seconds on the job's own model and samples.

A decoder layer of every kind runs forward and backward with its real weights, on the first samples. The parts of
solving a linear group are timed on matrices small enough for a second in all: matrix products, a Cholesky
factorisation, rounding to nearest, and the column loop of compensated rounding.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tlq.models.carried import CarriedStates, leaving
from tlq.models.decoder import enter_decoder, run_layer
from tlq.models.processor import load_processor
from tlq.models.sizes import ModelSizes
from tlq.models.streaming import StreamedModel
from tlq.plan.needs import Plan, gib
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.quantization.objective import Factor
from tlq.quantization.ranges import Ranges
from tlq.quantization.rounding import round_compensated
from tlq.runtime.activations import Activations, host_memory
from tlq.runtime.memory import device_memory
from tlq.samples import Batch, Sample, encode_batches, image_token_id

logger = logging.getLogger(__name__)

#: A measurement is repeated until it took as long, in seconds; the fastest run counts.
_LEAST_SECONDS = 0.15
_WIDTH, _ROWS = 2048, 512
_SMALL = 256
#: Operations per weight and token of a layer's passes for ``LayerSpeed``, each of which runs twice.
_OPERATIONS = 16

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class LayerSpeed:
    """Seconds per token of a decoder layer, forward, and backward without gradients of weights.

    ``backward`` is not a number if it was not measured.
    """

    forward: float
    backward: float


@dataclass(frozen=True)
class Speed:
    """What this machine was measured to do.

    Attributes:
        layers: by the index of the first layer of those that are alike (``ModelSizes.alike``).
        enter: seconds per token for embeddings, vision tower and connector.
        read: bytes of weights per second, read and converted.
        products: floating-point operations per second of float32 matrix products.
        factor: those of a Cholesky factorisation.
        nearest: weights per second rounded to nearest.
        columns: weights per second in the column loop of compensated rounding, without its matrix products.
        ranges: weights per second and tried pair of scale and zero-point in the search for ranges.
    """

    layers: dict[int, LayerSpeed]
    enter: float
    read: float
    products: float
    factor: float
    nearest: float
    columns: float
    ranges: float


@dataclass(frozen=True)
class Probe:
    """What a machine is measured with.

    Attributes:
        samples: of the job; none if it reads none.
        batch_size: samples of a micro-batch of the job; fewer are measured if a layer takes long for as many.
        max_tokens: longest sample allowed.
        gradients: whether the job scores importance.
    """

    samples: Sequence[Sample]
    batch_size: int
    max_tokens: int
    gradients: bool = True


def speed_for(plans: Sequence[Plan], model: StreamedModel, probe: Probe) -> Speed | None:
    """The measured speed, or None with a warning if the device is too small for one of the plans, or to measure.

    Raises: as ``measure_speed``.
    """
    least, available = max(plan.least for plan in plans), device_memory(model.device)
    if least > available:
        logger.warning(
            "time unknown: at least %s are needed on %s, %s are free",
            gib(least),
            model.device.type,
            gib(available),
        )
        return None
    try:
        return measure_speed(model, probe)
    except (torch.OutOfMemoryError, MemoryError) as error:
        logger.warning("time unknown: memory ran out while this machine was measured (%s)", error)
        return None


@torch.no_grad()
def measure_speed(model: StreamedModel, probe: Probe) -> Speed:
    """Measure this machine with the model and the first samples of a job.

    Raises:
        ValueError: a sample is longer than allowed, or cannot be encoded.
    """
    device, samples = model.device, probe.samples
    seconds, tensors = _timed_once(lambda: model.read(model.layer_names(0)), device)
    weights = sum(tensor.numel() for tensor in tensors.values())
    read = weights * model.checkpoint_dtype.itemsize / seconds
    del tensors
    solving = _solving(device, model.checkpoint_dtype)
    if not samples:
        return Speed({}, 0.0, read, *solving)
    processor, image = load_processor(model.folder), image_token_id(model.config)
    (batch,) = encode_batches(samples[:1], processor, image, 1, probe.max_tokens)
    count = min(probe.batch_size, int(solving[0] / (_OPERATIONS * weights * batch.valid.numel())))  # in a second
    if count > 1:
        (batch,) = encode_batches(samples[:count], processor, image, count, probe.max_tokens)
    enter, layers = layer_speeds(model, batch, probe.gradients)
    return Speed(layers, enter, read, *solving)


@torch.no_grad()
def layer_speeds(model: StreamedModel, batch: Batch, gradients: bool = True) -> tuple[float, dict[int, LayerSpeed]]:
    """Seconds per token to enter the decoder, and the speed of layers by ``ModelSizes.alike``."""
    tokens, device = batch.valid.numel(), model.device
    with model.entrance() as entered:
        enter, (call,) = _timed(lambda: enter_decoder(entered, model.architecture, [batch], device), device)
    layers: dict[int, LayerSpeed] = {}
    every, memory = model.architecture.decoder_layers(model.skeleton), host_memory()
    carried = CarriedStates(lambda: Activations(memory, device))
    for index, layer in model.layers(sorted({*ModelSizes(model).alike, *leaving(every)})):
        with call.arguments(index, carried, 0) as kwargs:
            layers[index] = _layer_speed(layer, call.hidden_states, kwargs, tokens, gradients)
    return enter / tokens, layers


def _layer_speed(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], tokens: int, gradients: bool) -> LayerSpeed:
    forward, _ = _timed(lambda: run_layer(layer, hidden, kwargs), hidden.device)
    if not gradients:
        return LayerSpeed(forward / tokens, math.nan)

    def both() -> Tensor:
        with torch.enable_grad():
            first = hidden.detach().requires_grad_()
            output = run_layer(layer, first, kwargs)
            (gradient,) = torch.autograd.grad(output, [first], output.detach())
            return gradient

    together, _ = _timed(both, hidden.device)
    return LayerSpeed(forward / tokens, (together - forward) / tokens)


def _solving(device: torch.device, scale_dtype: torch.dtype) -> tuple[float, float, float, float, float]:
    """Rates of products, factor, nearest, columns and ranges (see ``Speed``)."""
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(_ROWS, _WIDTH, generator=generator, device=device)
    square = torch.randn(_WIDTH, _WIDTH, generator=generator, device=device)
    product, moments = _timed(lambda: square @ square.T, device)
    moments.diagonal().add_(_WIDTH)
    factor, _ = _timed(lambda: torch.linalg.cholesky_ex(moments)[0], device)
    quantizer = WeightQuantizer(get_scheme("w4a16"), scale_dtype)
    nearest, _ = _timed(lambda: quantizer.fake_quantize(rows), device)
    short = rows[:, :_SMALL].contiguous()
    small = Factor.of(moments[:_SMALL, :_SMALL].contiguous())
    assert small is not None
    columns, _ = _timed(lambda: round_compensated([short], small, quantizer), device)
    search = Ranges("search", "ones")
    wide, _ = _timed(lambda: search.qparams(short, replace(quantizer, scheme=get_scheme("w2a16")), None), device)
    return (
        2 * _WIDTH**3 / product,
        _WIDTH**3 / 3 / factor,
        rows.numel() / nearest,
        short.numel() / columns,
        short.numel() * search.points * search.zero_points / wide,
    )


def _timed(compute: Callable[[], _Result], device: torch.device) -> tuple[float, _Result]:
    """Seconds of the fastest of several runs of ``compute``, after one without measurement; and its last result."""
    compute()
    fastest, spent = math.inf, 0.0
    while spent < _LEAST_SECONDS:
        seconds, result = _timed_once(compute, device)
        fastest, spent = min(fastest, seconds), spent + seconds
    return fastest, result


def _timed_once(compute: Callable[[], _Result], device: torch.device) -> tuple[float, _Result]:
    """Seconds of a run of ``compute``, and its result."""
    _wait(device)
    started = time.perf_counter()
    result = compute()
    _wait(device)
    return time.perf_counter() - started, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
