"""Quantization-exposed layer-wise calibration: the loop over decoder layers.

Inside a layer the linear groups are solved in order. Each sees the inputs that the already quantized layers and groups
really produce (``u``), beside the inputs of the full-precision model (``x``), which give the target. A solved group is
installed in the layer at once, so that whatever follows is exposed to it.

Ranks share the work: each runs its own micro-batches through the layer, candidates and output rows are dealt, and
every rank installs the same result (see ``tlq.parallel``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlq.calibration.streams import FullPrecision, Paths
from tlq.importance.token_weights import TokenWeights
from tlq.models.architectures import Architecture, LinearGroup, check_linears, get_linear, linear_paths
from tlq.models.streaming import LayeredModel, ResidentModel
from tlq.parallel import Ranks, shard_ranges
from tlq.quantization.equalization import Candidate, Fold, candidates
from tlq.quantization.formats import QuantizedWeight, Scheme, fake_quantize_activations, round_nearest
from tlq.quantization.objective import Norm, ShardInputs, Statistics
from tlq.quantization.rounding import Factor, round_compensated
from tlq.quantization.search import (
    Arguments,
    CandidateErrors,
    GroupInputs,
    ParentError,
    ParentShard,
    StatisticsError,
    TokensError,
    least_error,
    successive_halving,
)
from tlq.recipes import Recipe
from tlq.results import GroupReport
from tlq.runtime.activations import HostMemory, host_memory
from tlq.samples import Batch

logger = logging.getLogger(__name__)

_LEAST_ROWS = 512
_ROW_PARTS = 8


@dataclass
class LayerResult:
    """What calibration makes of one decoder layer.

    Attributes:
        index: number of the layer.
        weights: quantized weights by full module path.
        others: every other tensor of the layer by full name (norms and biases with folded scales, layers kept).
        reports: one per linear group.
    """

    index: int
    weights: dict[str, QuantizedWeight]
    others: dict[str, Tensor]
    reports: list[GroupReport]


@dataclass
class Calibrated:
    """All layers of a calibrated model."""

    layers: list[LayerResult]

    @property
    def weights(self) -> dict[str, QuantizedWeight]:
        """Quantized weights by full module path."""
        return {path: weight for layer in self.layers for path, weight in layer.weights.items()}

    @property
    def reports(self) -> list[GroupReport]:
        return [report for layer in self.layers for report in layer.reports]


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    weights: TokenWeights,
    recipe: Recipe,
    scheme: Scheme,
    checkpoint_dtype: torch.dtype,
) -> Calibrated:
    """Quantize every decoder layer of a model in memory, in place (fake-quantized), and return the codes.

    Args and errors: as ``calibrate_layers``.
    """
    return Calibrated(list(calibrate_layers(ResidentModel(model), batches, weights, recipe, scheme, checkpoint_dtype)))


@torch.no_grad()
def calibrate_layers(
    model: LayeredModel,
    batches: Sequence[Batch],
    weights: TokenWeights,
    recipe: Recipe,
    scheme: Scheme,
    checkpoint_dtype: torch.dtype,
    ranks: Ranks | None = None,
    finished: Mapping[int, Callable[[], LayerResult]] | None = None,
    memory: HostMemory | None = None,
) -> Iterator[LayerResult]:
    """Quantize one decoder layer after the other. ``ranks.clock`` tells what the time went into.

    Args:
        batches: all micro-batches, the same on every rank.
        weights: token weights of every layer and group (ignored by recipes that need no data).
        checkpoint_dtype: dtype in which the checkpoint keeps scales and norms.
        ranks: this process's place in a group; alone without it.
        finished: results of layers done before, the first ones in order; they are not computed again.
        memory: where hidden states are kept.

    Raises:
        ValueError: a group size does not divide a layer's width, or data that the recipe needs is missing.
        FloatingPointError: a weight or hidden state is not finite; the message names the layer.
    """
    architecture = model.architecture
    layers = len(architecture.decoder_layers(model.skeleton))
    check_shapes(model.skeleton, architecture, scheme)
    if recipe.needs_data:
        check_data(architecture, layers, batches, weights)
    finished = finished or {}
    if len(finished) == layers:
        return
    loop = LayerLoop(model, batches, weights, recipe, scheme, checkpoint_dtype, ranks, memory)
    order = range(layers) if recipe.needs_data else range(len(finished), layers)
    coming = model.layers(order)
    for _ in order:
        with loop.clock.phase("load"):
            index, layer = next(coming)
            check_weights(layer, architecture, index)
        if index in finished:
            with loop.clock.phase("replay"):
                loop.replay_layer(index, layer, finished[index]())
        else:
            yield loop.solve_layer(index, layer)


def check_shapes(model: nn.Module, architecture: Architecture, scheme: Scheme) -> None:
    """Refuse a job that cannot succeed before any work: linears of another shape, group sizes, overrides."""
    check_linears(model, architecture)
    layers = architecture.decoder_layers(model)
    check_overrides(architecture, len(layers), scheme)
    for index, layer in enumerate(layers):
        for group in architecture.groups:
            own = group_scheme(architecture, index, group, scheme)
            for path in group.linears:
                if own is not None:
                    own.check_width(get_linear(layer, path).in_features, f"{architecture.layers}.{index}.{path}")


def check_weights(layer: nn.Module, architecture: Architecture, index: int) -> None:
    """Raises FloatingPointError if a weight of the layer is not finite."""
    for path in architecture.linears:
        if not torch.isfinite(get_linear(layer, path).weight).all():
            raise FloatingPointError(
                f"{architecture.layers}.{index}.{path}: weight is not finite; the checkpoint is damaged"
            )


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
    """Solves the groups of one layer after the other."""

    def __init__(
        self,
        model: LayeredModel,
        batches: Sequence[Batch],
        weights: TokenWeights,
        recipe: Recipe,
        scheme: Scheme,
        checkpoint_dtype: torch.dtype,
        ranks: Ranks | None = None,
        memory: HostMemory | None = None,
    ) -> None:
        self.architecture, self.recipe, self.checkpoint_dtype = model.architecture, recipe, checkpoint_dtype
        self.ranks = ranks or Ranks(device=model.device)
        self.clock = self.ranks.clock
        self.overall = scheme
        self.scheme = scheme  # of the group at hand
        self.weights = weights
        self.head_dim = _head_dim(model.skeleton.config)
        self.weight_dtype = checkpoint_dtype if scheme.activation_bits is None else torch.float32
        self.shards = shard_ranges(len(batches)) if recipe.needs_data else []
        own = self.ranks.own_shards(len(self.shards))
        numbers = [number for shard in own for number in self.shards[shard]]
        memory = memory or host_memory()
        self.paths = Paths(model, batches, numbers, weights, recipe, scheme, self.ranks, memory)

    def solve_layer(self, index: int, layer: nn.Module) -> LayerResult:
        """Calibrate, round and install every group of ``layer``; advance both paths past it."""
        with self.clock.phase("forward"):
            reference = self.paths.full_precision(index, layer)
        weights: dict[str, QuantizedWeight] = {}
        reports = [self._solve_group(index, layer, group, reference, weights) for group in self.architecture.groups]
        with self.clock.phase("forward"):
            self.paths.advance_exposed(index, layer)
        prefix = f"{self.architecture.layers}.{index}."
        names = {f"{path}.weight" for path in weights}
        others = {f"{prefix}{name}": value for name, value in layer.state_dict().items()}
        others = {name: value.to(self.checkpoint_dtype) for name, value in others.items() if name not in names}
        return LayerResult(index, weights, others, reports)

    def replay_layer(self, index: int, layer: nn.Module, result: LayerResult) -> None:
        """Advance both paths past a layer that was solved before, exactly as solving it did."""
        self.paths.advance_full_precision(index, layer)
        prefix = f"{self.architecture.layers}.{index}."
        own = dict(layer.named_parameters())
        for name, value in result.others.items():
            own[name.removeprefix(prefix)].copy_(value)
        for path, weight in result.weights.items():
            linear = get_linear(layer, path.removeprefix(prefix))
            scheme = self.overall.of(path)
            assert scheme is not None
            self._install_linear(linear, weight, scheme)
        self.paths.advance_exposed(index, layer)

    def _by_shard(self, parts: Sequence[Any]) -> list[list[Any]]:
        """Something per micro-batch of this rank, gathered by shard."""
        edges = [len(self.shards[shard]) for shard in self.ranks.own_shards(len(self.shards))]
        taken = iter(parts)
        return [[next(taken) for _ in range(count)] for count in edges]

    # -- one group -----------------------------------------------------------------------------------------------

    def _solve_group(
        self,
        index: int,
        layer: nn.Module,
        group: LinearGroup,
        reference: FullPrecision | None,
        weights: dict[str, QuantizedWeight],
    ) -> GroupReport:
        """Quantize one group, install it, and put its codes into ``weights``."""
        started = time.perf_counter()
        own = group_scheme(self.architecture, index, group, self.overall)
        if own is None:
            return GroupReport(index, group.name, 0.0, False, None, None, 0, None, None, 0.0)
        self.scheme = own
        linears = [get_linear(layer, path) for path in group.linears]
        weight = torch.cat([linear.weight.float() for linear in linears])
        fold = self._fold(layer, group, weight.shape[1])
        inputs = None
        if not self.recipe.needs_data:
            chosen = Candidate(torch.ones(weight.shape[1], device=weight.device), 0.0)
            solution = _Solution(chosen, round_nearest(weight, self.scheme, self.checkpoint_dtype))
        else:
            with self.clock.phase("search"):
                inputs, parent_error = self._group_inputs(index, layer, group, reference, weight)
            solution = self._solve(weight, inputs, fold, parent_error)
        self._install(index, layer, group, fold, solution, weights)
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
        return Fold.into(module, in_features, self.head_dim, self.checkpoint_dtype, self.architecture.norm_offset)

    def _group_inputs(
        self, index: int, layer: nn.Module, group: LinearGroup, reference: FullPrecision | None, weight: Tensor
    ) -> tuple[GroupInputs, ParentError | None]:
        u_parents: list[Arguments] = []
        x_parents: list[Arguments] = []
        if reference is not None:
            x = reference.inputs.pop(group.name)
            x_parents = reference.parents.get(group.parent or "", [])
        if self.paths.sees_exposed:
            with self.clock.phase("forward"):
                u, u_parents = self.paths.exposed_inputs(index, layer, group)
        else:
            u, u_parents = x, x_parents
        if self.recipe.target == "exposed":
            x, x_parents = u, u_parents
        by_batch = [self.paths.weights_of(index, group, number) for number in range(len(self.paths.calls))]
        same = x is u
        own = []
        for x_parts, u_parts, w_parts in zip(*map(self._by_shard, (x, u, by_batch)), strict=True):
            exposed = torch.cat(u_parts)
            w = torch.cat([part[part > 0] for part in w_parts])
            own.append(ShardInputs(exposed if same else torch.cat(x_parts), exposed, w))
        everywhere = torch.cat([part[part > 0] for part in self.weights[index, group.name]])
        inputs = GroupInputs(own, len(self.shards), everywhere, weight.shape[1], same, self.ranks)
        if group.parent is None or self.recipe.equalization.error != "parent":
            return inputs, None
        shards = [self._by_shard(parts) for parts in (x_parents, u_parents, by_batch)]
        return inputs, ParentError(
            layer.get_submodule(group.parent),
            [get_linear(layer, path) for path in group.linears],
            weight,
            [ParentShard(*parts) for parts in zip(*shards, strict=True)],
            inputs,
            self.recipe.equalization.norm,
            self.scheme,
            self.checkpoint_dtype,
        )

    def _solve(self, weight: Tensor, inputs: GroupInputs, fold: Fold, parent_error: ParentError | None) -> _Solution:
        error = _LinearsError(weight, inputs, self.scheme, self.checkpoint_dtype, self.recipe.rounding == "compensated")
        with self.clock.phase("search"):
            chosen = self._search(weight, inputs, fold, error, parent_error)
        with self.clock.phase("round"):
            rounded, damping = self._round(error, chosen.s)
        with self.clock.phase("search"):
            total = float(inputs.w.sum())
            measured = error.cheapest
            neutral = Candidate(torch.ones_like(chosen.s), 0.0)
            before = sum(measured.measure([(neutral, part) for part in range(measured.parts)]))
            after = measured.total(rounded.dequantize(), chosen.s)
        return _Solution(chosen, rounded, before / total, after / total, damping)

    def _round(self, error: _LinearsError, s: Tensor) -> tuple[QuantizedWeight, float | None]:
        """Codes of W diag(s) as the recipe rounds, and the damping that took."""
        if self.recipe.rounding == "nearest":
            return round_nearest(error.weight * s, self.scheme, self.checkpoint_dtype), None
        statistics, scales = error.statistics_behind(s)
        factor, damping = statistics.factor(self.recipe.damping, scales, keep=error.measures_by(statistics))
        if damping > self.recipe.damping and self.ranks.leads:
            logger.warning("damping raised from %g to %g", self.recipe.damping, damping)

        def target(rows: slice) -> Tensor:
            return statistics.shifted_target(error.weight[rows] * s, factor, rows, scales)

        return self._round_compensated(target, error.weight.shape, factor), damping

    def _round_compensated(
        self, target: Callable[[slice], Tensor], shape: torch.Size, factor: Factor
    ) -> QuantizedWeight:
        """Codes of all output rows, in equal parts that depend on their number alone.

        A rank rounds as many of its parts at a time as have together no more rows than there are columns, at least
        one; two copies of them are held.
        """
        count = 1
        while count < _ROW_PARTS and shape[0] >= 2 * count * _LEAST_ROWS and shape[0] % (2 * count) == 0:
            count *= 2
        rows = shape[0] // count
        own = list(self.ranks.assigned(count))
        together = max(1, shape[1] // rows)
        rounded: dict[int, QuantizedWeight] = {}
        for start in range(0, len(own), together):
            numbers = own[start : start + together]
            targets = (target(slice(number * rows, (number + 1) * rows)) for number in numbers)
            found = round_compensated(targets, factor, self.scheme, self.checkpoint_dtype)
            rounded |= zip(numbers, found, strict=True)
        room = partial(QuantizedWeight.empty, rows, shape[1], self.scheme, self.checkpoint_dtype, factor.upper.device)
        parts = [rounded.get(number) or room() for number in range(count)]
        for number, part in enumerate(parts):
            for tensor in (part.codes, part.scale, part.zero_point):
                self.ranks.broadcast(tensor, self.ranks.owner(number))
        return QuantizedWeight.stacked(parts)

    def _search(
        self,
        weight: Tensor,
        inputs: GroupInputs,
        fold: Fold,
        error: _LinearsError,
        parent_error: ParentError | None,
    ) -> Candidate:
        """The candidate scales with the smallest error under nearest rounding, as the recipe searches for them."""
        method = self.recipe.equalization
        if method.method == "none":
            return Candidate(torch.ones(weight.shape[1], device=weight.device), 0.0)
        tried = list(candidates(method, inputs.magnitude(method.magnitude), weight, self.scheme.group_size, fold))
        if len(tried) == 1 or method.method == "fixed":
            return tried[-1]
        errors: CandidateErrors = parent_error or (
            error.cheapest if method.norm == "l2" else error.by_token(method.norm)
        )
        return successive_halving(errors, tried) if method.search == "halving" else least_error(errors, tried)

    def _install(
        self,
        index: int,
        layer: nn.Module,
        group: LinearGroup,
        fold: Fold,
        solution: _Solution,
        weights: dict[str, QuantizedWeight],
    ) -> None:
        """Put the rounded weights and the folded scales into the layer, and the codes into ``weights``."""
        prefix = f"{self.architecture.layers}.{index}"
        rows = [get_linear(layer, path).out_features for path in group.linears]
        for path, part in zip(group.linears, solution.rounded.split(rows), strict=True):
            weights[f"{prefix}.{path}"] = part
            self._install_linear(get_linear(layer, path), part, self.scheme)
        per_row = fold.per_row(solution.chosen.s)
        if bool((per_row == 1).all()):
            return
        if fold.is_norm:
            fold.weight.copy_(fold.folded_weight(per_row))
            return
        path = f"{prefix}.{group.fold}"
        before = get_linear(layer, group.fold)
        if path in weights:
            weights[path] = weights[path].rescale_rows(1 / per_row)
            before.weight.copy_(weights[path].dequantize(self.weight_dtype))
        else:  # kept in full precision
            before.weight.copy_((before.weight / per_row[:, None]).to(self.checkpoint_dtype))
        if before.bias is not None:
            before.bias.copy_((before.bias / per_row).to(self.checkpoint_dtype))

    def _install_linear(self, linear: nn.Linear, weight: QuantizedWeight, scheme: Scheme) -> None:
        linear.weight.copy_(weight.dequantize(self.weight_dtype))
        if scheme.activation_bits is not None:
            linear.register_forward_pre_hook(_quantize_input(scheme.activation_bits))


@dataclass
class _Solution:
    chosen: Candidate
    rounded: QuantizedWeight
    error_before: float | None = None
    error_after: float | None = None
    damping: float | None = None


class _LinearsError:
    """E(V) on the group's own output, in whichever form is cheaper; each form is made when first asked for."""

    def __init__(
        self, weight: Tensor, inputs: GroupInputs, scheme: Scheme, checkpoint_dtype: torch.dtype, compensated: bool
    ) -> None:
        """``compensated``: whether rounding will need the statistics anyway."""
        self.weight, self.inputs, self.scheme, self.checkpoint_dtype = weight, inputs, scheme, checkpoint_dtype
        self.compensated = compensated

    @cached_property
    def cheapest(self) -> StatisticsError | TokensError:
        tokens = len(self.inputs.w) * (2 if self.compensated else 1)
        if self.scheme.activation_bits is None and tokens > self.weight.shape[1]:
            statistics = self.inputs.statistics(self.weight)
            return StatisticsError(self.weight, statistics, self.scheme, self.checkpoint_dtype, self.inputs.ranks)
        return self.by_token("l2")

    def by_token(self, norm: Norm) -> TokensError:
        return TokensError(self.weight, self.inputs, self.scheme, self.checkpoint_dtype, norm)

    def measures_by(self, statistics: Statistics) -> bool:
        """Whether errors are measured by these statistics."""
        return isinstance(self.cheapest, StatisticsError) and self.cheapest.statistics is statistics

    def statistics_behind(self, s: Tensor) -> tuple[Statistics, Tensor | None]:
        """Statistics for the codes of V diag(s), and the scales that its inputs have yet to be divided by.

        They are in the inputs already where these are quantized behind them.
        """
        bits = self.scheme.activation_bits
        if bits is None:
            if isinstance(self.cheapest, StatisticsError):
                return self.cheapest.statistics, s
            return self.inputs.statistics(self.weight), s

        def quantized(part: ShardInputs) -> ShardInputs:
            seen = fake_quantize_activations(part.u / s, bits)
            # A target on exposed inputs means the plain problem of GPTQ: the weight itself is the target.
            return ShardInputs(seen if self.inputs.same else part.x / s, seen, part.w)

        return self.inputs.statistics(self.weight * s, quantized), None


def _quantize_input(bits: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize_activations(args[0], bits), *args[1:])

    return hook


def _effective(w: Tensor) -> float:
    w = w.double()
    return round(float(w.sum() ** 2 / w.square().sum()), 1)


def _head_dim(config: Any) -> int:
    text = config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
