"""Quantization-exposed layer-wise calibration: the loop over decoder layers.

Inside a layer the linear groups are solved in order. Each sees the inputs that the already quantized layers and groups
really produce (``u``), beside the inputs of the full-precision model (``x``), which give the target. A solved group is
installed in the model at once, so that whatever follows is exposed to it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tlq.architectures import Architecture, LinearGroup, check_linears, get_linear, linear_paths
from tlq.decoder import LayerCalls, enter_decoder, observe, run_layer
from tlq.equalization import Candidate, Fold, candidates
from tlq.objective import Norm, Statistics, Tokens
from tlq.quantizer import (
    QuantizedWeight,
    Scheme,
    fake_quantize,
    fake_quantize_activations,
    round_nearest,
)
from tlq.recipes import Recipe
from tlq.rounding import round_compensated
from tlq.samples import Batch
from tlq.weights import TokenWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupReport:
    """What happened to one linear group; errors are E(V) / sum_t w_t, before with s = 1 and nearest rounding."""

    layer: int
    group: str
    alpha: float
    duo: bool
    error_before: float | None
    error_after: float | None
    tokens: int
    effective_tokens: float | None
    damping: float | None
    seconds: float


@dataclass
class Calibrated:
    """Quantized weights by full module path, and one report per group."""

    weights: dict[str, QuantizedWeight]
    reports: list[GroupReport]

    def report_rows(self) -> list[dict[str, Any]]:
        return [asdict(report) for report in self.reports]


@dataclass
class GroupInputs:
    """Inputs of one linear group at the tokens that count.

    Attributes:
        x: [tokens, in], inputs that the target is computed from.
        u: [tokens, in], inputs of the quantized linear.
        w: [tokens], weights.
    """

    x: Tensor
    u: Tensor
    w: Tensor

    def magnitude(self, how: Literal["mean", "weighted", "max"]) -> Tensor:
        """Magnitude of every channel of u, [in]."""
        if how == "max":
            return self.u.abs().amax(0)
        return self.u.abs().mean(0) if how == "mean" else (self.w @ self.u.abs()) / self.w.sum()


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    architecture: Architecture,
    batches: Sequence[Batch],
    weights: TokenWeights,
    recipe: Recipe,
    scheme: Scheme,
    storage: torch.dtype,
    on_layer: Callable[[int, list[GroupReport]], None] | None = None,
) -> Calibrated:
    """Quantize every decoder layer of ``model`` in place (fake-quantized) and return the codes.

    Args:
        weights: token weights of every layer and group (ignored by recipes that need no data).
        storage: dtype in which the checkpoint keeps scales and norms.
        on_layer: called with the index and reports of each finished layer.

    Raises:
        ValueError: a group size does not divide a layer's width, or data that the recipe needs is missing.
        FloatingPointError: a weight or hidden state is not finite; the message names the layer.
    """
    check_model(model, architecture, scheme)
    if recipe.needs_data:
        check_data(architecture, len(architecture.decoder_layers(model)), batches, weights)
    loop = LayerLoop(model, architecture, batches, weights, recipe, scheme, storage)
    layers = architecture.decoder_layers(model)
    reports: list[GroupReport] = []
    with tqdm(enumerate(layers), total=len(layers), desc=f"{recipe.name} {scheme.name}", unit="layer") as bar:
        for index, layer in bar:
            layer_reports = loop.solve_layer(index, layer)
            reports += layer_reports
            if layer_reports[-1].error_after is not None:
                bar.set_postfix(error=f"{layer_reports[-1].error_after:.3g}")
            if on_layer is not None:
                on_layer(index, layer_reports)
    return Calibrated(loop.quantized, reports)


def check_model(model: nn.Module, architecture: Architecture, scheme: Scheme) -> None:
    """Refuse a job that cannot succeed before any work: linears of another shape, group sizes, finite weights."""
    check_linears(model, architecture)
    check_overrides(architecture, len(architecture.decoder_layers(model)), scheme)
    for index, layer in enumerate(architecture.decoder_layers(model)):
        for group in architecture.groups:
            for path in group.linears:
                weight = get_linear(layer, path).weight
                name = f"{architecture.layers}.{index}.{path}"
                own = group_scheme(architecture, index, group, scheme)
                if own is not None:
                    own.check_width(weight.shape[1], name)
                if not torch.isfinite(weight).all():
                    raise FloatingPointError(f"{name}: weight is not finite; the checkpoint is damaged")


def group_scheme(architecture: Architecture, index: int, group: LinearGroup, scheme: Scheme) -> Scheme | None:
    """The scheme of a group of layer ``index`` with overrides applied; None if it stays in full precision.

    Raises:
        ValueError: an override matches some linears of the group only; they share scales and the norm before them.
    """
    found = {scheme.of(f"{architecture.layers}.{index}.{path}") for path in group.linears}
    if len(found) > 1:
        raise ValueError(
            f"layer {index}, group {group.name}: its linears {', '.join(group.linears)} share an input and need one "
            "scheme; let the override match all of them or none"
        )
    return found.pop()


def check_overrides(architecture: Architecture, layers: int, scheme: Scheme) -> None:
    """Raises ValueError if a pattern matches nothing: a typing error would quietly quantize what should be kept."""
    paths = [path for index in range(layers) for path in linear_paths(architecture, index)]
    for pattern, _ in scheme.overrides:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ValueError(f"override {pattern!r} matches no linear; their paths are like {paths[-1]}")


def check_data(architecture: Architecture, layers: int, batches: Sequence[Batch], weights: TokenWeights) -> None:
    """Refuse missing calibration data: with none of it a method would quietly round to nearest."""
    if not batches:
        raise ValueError("no calibration samples; give some, or use the recipe rtn, which needs none")
    for layer in range(layers):
        for group in architecture.groups:
            parts = weights.get((layer, group.name), [])
            if len(parts) != len(batches) or not any(bool((part > 0).any()) for part in parts):
                raise ValueError(
                    f"layer {layer}, group {group.name}: no token of the calibration data has a weight; "
                    "score this model's tokens again (`dvc repro calibset`)"
                )


class LayerLoop:
    """State carried from layer to layer: hidden states of both paths, and the codes so far."""

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        batches: Sequence[Batch],
        weights: TokenWeights,
        recipe: Recipe,
        scheme: Scheme,
        storage: torch.dtype,
    ) -> None:
        self.architecture, self.recipe, self.storage = architecture, recipe, storage
        self.overall = scheme
        self.scheme = scheme  # of the group at hand
        self.weights = weights
        self.head_dim = _head_dim(model.config)
        self.weight_dtype = storage if scheme.activation_bits is None else torch.float32
        self.quantized: dict[str, QuantizedWeight] = {}
        self.batches = batches if recipe.needs_data else []
        self.calls: list[LayerCalls] = enter_decoder(model, architecture, self.batches) if self.batches else []
        self.inputs_path = recipe.inputs_for(scheme)
        self.full = [call.hidden_states for call in self.calls]
        self.exposed = list(self.full)

    def solve_layer(self, index: int, layer: nn.Module) -> list[GroupReport]:
        """Calibrate, round and install every group of ``layer``; advance both paths past it."""
        reference = self._full_precision_pass(index, layer)
        reports = [self._solve_group(index, layer, group, reference) for group in self.architecture.groups]
        if self.calls and self.inputs_path == "exposed":
            self.exposed = [
                call.next_input(index, run_layer(layer, hidden, call.kwargs[index]))
                for hidden, call in zip(self.exposed, self.calls, strict=True)
            ]
            self._check_finite(index, self.exposed)
        if reference is not None:
            self.full = reference.outputs
            self._check_finite(index, self.full)
        return reports

    # -- what the layer's groups see -----------------------------------------------------------------------------

    def _full_precision_pass(self, index: int, layer: nn.Module) -> _FullPrecision | None:
        """Inputs of every group on the full-precision path, or None if the recipe looks at neither."""
        if not self.calls or "full_precision" not in (self.inputs_path, self.recipe.target):
            return None
        groups = self.architecture.groups
        modules = {group.name: layer.get_submodule(group.linears[0]) for group in groups}
        modules |= {group.parent: layer.get_submodule(group.parent) for group in groups if group.parent}
        gathered: dict[str, list[Tensor]] = {group.name: [] for group in groups}
        parents: dict[str, list[Arguments]] = {group.parent: [] for group in groups if group.parent}
        outputs = []
        for number, (hidden, call) in enumerate(zip(self.full, self.calls, strict=True)):
            seen, output = observe(layer, hidden, call.kwargs[index], modules)
            assert output is not None
            outputs.append(call.next_input(index, output))
            for group in groups:
                gathered[group.name].append(self._rows(seen[group.name], index, group, number))
            for parent in parents:
                parents[parent].append(seen[parent])
        return _FullPrecision({name: torch.cat(parts) for name, parts in gathered.items()}, parents, outputs)

    def _exposed_inputs(self, index: int, layer: nn.Module, group: LinearGroup) -> tuple[Tensor, list[Arguments]]:
        """Inputs of ``group`` behind everything quantized so far, and what its parent module is called with."""
        stop = layer.get_submodule(group.linears[0])
        modules = {group.name: stop}
        if group.parent:
            modules[group.parent] = layer.get_submodule(group.parent)
        rows, parents = [], []
        for number, (hidden, call) in enumerate(zip(self.exposed, self.calls, strict=True)):
            seen, _ = observe(layer, hidden, call.kwargs[index], modules, stop_at=stop)
            rows.append(self._rows(seen[group.name], index, group, number))
            if group.parent:
                parents.append(seen[group.parent])
        return torch.cat(rows), parents

    def _rows(self, seen: Arguments, index: int, group: LinearGroup, number: int) -> Tensor:
        """The inputs [tokens, in] of a linear at the tokens that count, from one micro-batch."""
        (hidden,), _ = seen
        return hidden[self._token_mask(index, group, number).to(hidden.device)].float()

    def _token_mask(self, index: int, group: LinearGroup, number: int) -> Tensor:
        return self.weights[index, group.name][number] > 0

    def _token_weights(self, index: int, group: LinearGroup) -> Tensor:
        parts = [weight[weight > 0] for weight in self.weights[index, group.name]]
        return torch.cat(parts).to(self.full[0].device)

    # -- one group -----------------------------------------------------------------------------------------------

    def _solve_group(
        self, index: int, layer: nn.Module, group: LinearGroup, reference: _FullPrecision | None
    ) -> GroupReport:
        started = time.perf_counter()
        own = group_scheme(self.architecture, index, group, self.overall)
        if own is None:
            return GroupReport(index, group.name, 0.0, False, None, None, 0, None, None, 0.0)
        self.scheme = own
        linears = [get_linear(layer, path) for path in group.linears]
        weight = torch.cat([linear.weight.float() for linear in linears])
        fold = self._fold(layer, group, weight.shape[1])
        if not self.calls:
            chosen = Candidate(torch.ones(weight.shape[1], device=weight.device), 0.0)
            solution = _Solution(chosen, round_nearest(weight, self.scheme, self.storage))
            inputs = None
        else:
            inputs, parent_error = self._group_inputs(index, layer, group, reference)
            solution = self._solve(weight, inputs, fold, parent_error)
        self._install(index, layer, group, fold, solution)
        return GroupReport(
            layer=index,
            group=group.name,
            alpha=solution.chosen.alpha,
            duo=solution.chosen.duo,
            error_before=solution.error_before,
            error_after=solution.error_after,
            tokens=0 if inputs is None else len(inputs.w),
            effective_tokens=None if inputs is None else _effective(inputs.w),
            damping=solution.damping,
            seconds=round(time.perf_counter() - started, 3),
        )

    def _fold(self, layer: nn.Module, group: LinearGroup, in_features: int) -> Fold:
        module = layer.get_submodule(group.fold)
        return Fold.into(module, in_features, self.head_dim, self.storage, self.architecture.norm_offset)

    def _group_inputs(
        self, index: int, layer: nn.Module, group: LinearGroup, reference: _FullPrecision | None
    ) -> tuple[GroupInputs, _ParentError | None]:
        w = self._token_weights(index, group)
        u_parents: list[Arguments] = []
        x_parents: list[Arguments] = []
        if reference is not None:
            x = reference.inputs[group.name]
            x_parents = reference.parents.get(group.parent or "", [])
        if self.inputs_path == "exposed":
            u, u_parents = self._exposed_inputs(index, layer, group)
        else:
            u, u_parents = x, x_parents
        if self.recipe.target == "exposed":
            x, x_parents = u, u_parents
        if not (torch.isfinite(x).all() and torch.isfinite(u).all()):
            raise FloatingPointError(
                f"layer {index}, group {group.name}: its input is not finite; run in float32 or bfloat16 (model.dtype)"
            )
        parent_error = None
        if group.parent and self.recipe.equalization.error == "parent":
            parent_error = _ParentError(
                layer.get_submodule(group.parent),
                [get_linear(layer, path) for path in group.linears],
                x_parents,
                u_parents,
                [weight.to(u.device) for weight in self.weights[index, group.name]],
                self.recipe.equalization.norm,
                self.scheme.activation_bits,
            )
        return GroupInputs(x, u, w), parent_error

    def _solve(self, weight: Tensor, inputs: GroupInputs, fold: Fold, parent_error: _ParentError | None) -> _Solution:
        error = _LinearsError(weight, inputs, self.scheme)
        chosen = self._search(weight, inputs, fold, error, parent_error)
        scaled_weight = weight * chosen.s
        damping = None
        if self.recipe.rounding == "compensated":
            statistics = error.scaled_statistics(chosen.s)
            target, hessian, damping = statistics.shifted_target(scaled_weight, self.recipe.damping)
            if damping > self.recipe.damping:
                logger.warning("damping raised from %g to %g", self.recipe.damping, damping)
            rounded = round_compensated(target, hessian, self.scheme, self.storage)
        else:
            rounded = round_nearest(scaled_weight, self.scheme, self.storage)
        total = float(inputs.w.sum())
        neutral = torch.ones_like(chosen.s)
        before = error(fake_quantize(weight, self.scheme, self.storage), neutral)
        after = error(rounded.dequantize(), chosen.s)
        return _Solution(chosen, rounded, before / total, after / total, damping)

    def _search(
        self,
        weight: Tensor,
        inputs: GroupInputs,
        fold: Fold,
        error: _LinearsError,
        parent_error: _ParentError | None,
    ) -> Candidate:
        """The candidate scales with the smallest error under nearest rounding; the first of equals."""
        method = self.recipe.equalization
        tried = list(candidates(method, inputs.magnitude(method.magnitude), weight, self.scheme.group_size, fold))
        if len(tried) == 1 or method.method == "fixed":
            return tried[-1]

        def cost(candidate: Candidate) -> float:
            quantized = fake_quantize(weight * candidate.s, self.scheme, self.storage)
            if parent_error is not None:
                return parent_error(quantized, candidate.s)
            return error(quantized, candidate.s, method.norm)

        return min(tried, key=cost)

    def _install(self, index: int, layer: nn.Module, group: LinearGroup, fold: Fold, solution: _Solution) -> None:
        """Put the rounded weights and the folded scales into the model."""
        prefix = f"{self.architecture.layers}.{index}"
        rows = [get_linear(layer, path).out_features for path in group.linears]
        for path, part in zip(group.linears, _split(solution.rounded, rows), strict=True):
            self.quantized[f"{prefix}.{path}"] = part
            linear = get_linear(layer, path)
            linear.weight.copy_(part.dequantize(self.weight_dtype))
            if self.scheme.activation_bits is not None:
                linear.register_forward_pre_hook(_quantize_input(self.scheme.activation_bits))
        per_row = fold.per_row(solution.chosen.s)
        if bool((per_row == 1).all()):
            return
        if fold.is_norm:
            fold.weight.copy_(fold.folded_weight(per_row))
            return
        path = f"{prefix}.{group.fold}"
        before = get_linear(layer, group.fold)
        if path in self.quantized:
            self.quantized[path] = self.quantized[path].rescale_rows(1 / per_row)
            before.weight.copy_(self.quantized[path].dequantize(self.weight_dtype))
        else:  # kept in full precision
            before.weight.copy_((before.weight / per_row[:, None]).to(self.storage))
        if before.bias is not None:
            before.bias.copy_((before.bias / per_row).to(self.storage))

    def _check_finite(self, index: int, hidden_states: list[Tensor]) -> None:
        for batch, hidden in zip(self.batches, hidden_states, strict=True):
            if not torch.isfinite(hidden[batch.valid.to(hidden.device)]).all():
                raise FloatingPointError(
                    f"layer {index}: its output is not finite; run in float32 or bfloat16 (model.dtype)"
                )


@dataclass
class _FullPrecision:
    """One layer on the full-precision path: group inputs, parents' arguments, what the next layer is called with."""

    inputs: dict[str, Tensor]
    parents: dict[str, list[Arguments]]
    outputs: list[Tensor]


@dataclass
class _Solution:
    chosen: Candidate
    rounded: QuantizedWeight
    error_before: float | None = None
    error_after: float | None = None
    damping: float | None = None


class _LinearsError:
    """E(V) on the group's own output, in whichever form is cheaper."""

    def __init__(self, weight: Tensor, inputs: GroupInputs, scheme: Scheme) -> None:
        self.weight, self.inputs, self.scheme = weight, inputs, scheme
        self._statistics: Statistics | None = None
        self._tokens: Tokens | None = None

    def __call__(self, quantized: Tensor, s: Tensor, norm: Norm = "l2") -> float:
        """Error of ``quantized`` = V diag(s)."""
        plain = self.scheme.activation_bits is None and norm == "l2"
        if plain and len(self.inputs.w) > self.weight.shape[1]:
            return self.statistics.error(self.weight, quantized / s)
        return self.tokens.error(quantized, s, self.scheme.activation_bits, norm)

    @property
    def statistics(self) -> Statistics:
        if self._statistics is None:
            self._statistics = Statistics.of(self.inputs.x, self.inputs.u, self.inputs.w)
        return self._statistics

    @property
    def tokens(self) -> Tokens:
        if self._tokens is None:
            self._tokens = Tokens(self.inputs.x @ self.weight.T, self.inputs.u, self.inputs.w)
        return self._tokens

    def scaled_statistics(self, s: Tensor) -> Statistics:
        """Statistics of the inputs of V diag(s), activation quantization included."""
        bits = self.scheme.activation_bits
        if bits is None:
            return self.statistics.scaled(s)
        seen = fake_quantize_activations(self.inputs.u / s, bits)
        # A target on exposed inputs means the plain problem of GPTQ: the weight itself is the target.
        wanted = seen if self.inputs.x is self.inputs.u else self.inputs.x / s
        return Statistics.of(wanted, seen, self.inputs.w)


@dataclass
class _ParentError:
    """Error of the output of the module around a group (attention, MLP), as AWQ and MBQ measure it."""

    parent: nn.Module
    linears: list[nn.Linear]
    x_arguments: list[Arguments]
    u_arguments: list[Arguments]
    weights: list[Tensor]
    norm: Norm
    activation_bits: int | None
    _reference: list[Tensor] | None = None

    def __call__(self, quantized: Tensor, s: Tensor) -> float:
        if self._reference is None:
            self._reference = [_first(self.parent(*args, **named)) for args, named in self.x_arguments]
        total = torch.zeros((), dtype=torch.float64)
        with _trial(self.linears, quantized, s, self.activation_bits):
            for (args, named), wanted, weight in zip(self.u_arguments, self._reference, self.weights, strict=True):
                difference = (_first(self.parent(*args, **named)) - wanted).float()
                per_token = difference.abs().sum(-1) if self.norm == "l1" else difference.square().sum(-1)
                total += (per_token * weight).sum(dtype=torch.float64).cpu()
        return float(total)


@contextmanager
def _trial(linears: list[nn.Linear], quantized: Tensor, s: Tensor, bits: int | None) -> Iterator[None]:
    """Let ``linears`` compute with V diag(s) on inputs divided by s, for a while."""

    def scale_input(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = args[0] / s
        return (inputs if bits is None else fake_quantize_activations(inputs, bits), *args[1:])

    rows = [linear.out_features for linear in linears]
    originals = [linear.weight.data for linear in linears]
    with ExitStack() as stack:
        for linear, original, part in zip(linears, originals, quantized.split(rows), strict=True):
            linear.weight.data = part.to(original.dtype)
            stack.callback(setattr, linear.weight, "data", original)
            stack.callback(linear.register_forward_pre_hook(scale_input).remove)
        yield


def _quantize_input(bits: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize_activations(args[0], bits), *args[1:])

    return hook


def _split(stacked: QuantizedWeight, rows: Sequence[int]) -> list[QuantizedWeight]:
    parts = zip(stacked.codes.split(rows), stacked.scale.split(rows), stacked.zero_point.split(rows), strict=True)
    return [QuantizedWeight(*part) for part in parts]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _effective(w: Tensor) -> float:
    w = w.double()
    return round(float(w.sum() ** 2 / w.square().sum()), 1)


def _head_dim(config: Any) -> int:
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
