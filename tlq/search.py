"""The search for equalization scales: the error of a candidate, in parts, and the candidate with the least.

Every form of the error is a sum of parts that are not negative, over output channels, or over virtual shards of
tokens. A candidate whose parts already exceed the best error so far has lost, and the rest of its parts is not
computed: the same winner as an exhaustive search for less work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tlq.equalization import Candidate
from tlq.objective import Norm, Statistics, Tokens
from tlq.quantizer import Scheme, fake_quantize, fake_quantize_activations
from tlq.ranks import Ranks

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_ROW_PARTS = 8
_LEAST_ROWS = 64


@dataclass
class ShardInputs:
    """Inputs of one linear group at the tokens that count, from one virtual shard.

    Attributes:
        x: [tokens, in], inputs that the target is computed from.
        u: [tokens, in], inputs of the quantized linear; the same tensor as ``x`` where the paths are one.
        w: [tokens] float32, weights.
    """

    x: Tensor
    u: Tensor
    w: Tensor


@dataclass
class GroupInputs:
    """Inputs of one linear group: those of this rank's shards, and how many tokens all shards have.

    Attributes:
        own: inputs of this rank's shards, in order.
        shards: shards of all ranks.
        w: [tokens], weights of all shards.
        in_features: width of the inputs.
        same: whether x and u are the same.
    """

    own: list[ShardInputs]
    shards: int
    w: Tensor
    in_features: int
    same: bool
    ranks: Ranks

    def magnitude(self, how: Literal["mean", "weighted", "max"]) -> Tensor:
        """Magnitude of every channel of u, [in]."""
        shape = (self.in_features,)
        if how == "max":
            largest = torch.zeros(shape, device=self.ranks.device)
            for part in self.own:
                largest = torch.maximum(largest, part.u.float().abs().amax(0))
            return self.ranks.maximum(largest)
        if how == "mean":
            parts = (part.u.float().abs().sum(0) for part in self.own)
            return self.ranks.ordered_sum(parts, shape) / len(self.w)
        parts = (part.w @ part.u.float().abs() for part in self.own)
        return self.ranks.ordered_sum(parts, shape) / float(self.w.sum())

    def statistics(self, seen: Callable[[ShardInputs], ShardInputs] | None = None) -> Statistics:
        """Second moments over all shards.

        Args:
            seen: what the inputs of a shard are turned into first.
        """
        shards = (part if seen is None else seen(part) for part in self.own)
        parts = (Statistics.of(part.x, part.u, part.w) for part in shards)
        return Statistics.added(parts, self.in_features, self.same, self.ranks)


class CandidateErrors(Protocol):
    """The error of any candidate, in parts.

    Attributes:
        spread: whether ``parts`` gives this rank's parts only, the others' being on the other ranks.
    """

    spread: bool

    def parts(self, candidate: Candidate, start: int = 0) -> Iterator[float]:
        """The parts from number ``start`` on, under nearest rounding."""
        ...


def least_error(errors: CandidateErrors, tried: Sequence[Candidate], shards: int, ranks: Ranks) -> Candidate:
    """The candidate with the smallest error, the first of equals; the same for any number of ranks."""
    search = _search_spread if errors.spread else _search_dealt
    totals = search(errors, tried, shards, ranks)
    return tried[int(torch.argmin(totals))]


def _search_dealt(errors: CandidateErrors, tried: Sequence[Candidate], _shards: int, ranks: Ranks) -> Tensor:
    """Errors [candidates], infinite for those that lost; every rank computes the candidates dealt to it."""
    totals = torch.full((len(tried),), torch.inf, dtype=torch.float64)
    first = {number: next(errors.parts(tried[number])) for number in ranks.dealt(len(tried))}
    best = torch.inf
    for number in sorted(first, key=first.__getitem__):
        total = _sum_below([first[number]], errors.parts(tried[number], 1), best)
        totals[number] = sum(total) if total is not None else torch.inf
        best = min(best, float(totals[number]))
    return ranks.minimum(totals)


def _search_spread(errors: CandidateErrors, tried: Sequence[Candidate], shards: int, ranks: Ranks) -> Tensor:
    """Errors [candidates], infinite for those that lost; all ranks work on one candidate at a time."""
    totals = torch.full((len(tried),), torch.inf, dtype=torch.float64)
    first = [next(errors.parts(candidate), 0.0) for candidate in tried]
    ranking = ranks.sum(torch.tensor(first, dtype=torch.float64)).argsort(stable=True).tolist()
    best = torch.inf
    for number in ranking:
        own = _sum_below([first[number]], errors.parts(tried[number], 1), best)
        count = len(ranks.own_shards(shards))
        table = ranks.table([torch.inf] * count if own is None else own[:count], shards)
        totals[number] = table.sum()
        best = min(best, float(totals[number]))
    return totals


def _sum_below(first: list[float], rest: Iterator[float], bound: float) -> list[float] | None:
    """All parts, or None as soon as their sum exceeds ``bound``."""
    parts, total = list(first), sum(first)
    for part in rest:
        if total > bound:
            return None
        parts.append(part)
        total += part
    return None if total > bound else parts


class StatisticsError:
    """E(V) on the group's own output from second moments; parts are every eighth output channel."""

    spread = False

    def __init__(self, weight: Tensor, statistics: Statistics, scheme: Scheme, storage: torch.dtype) -> None:
        self.weight, self.statistics, self.scheme, self.storage = weight, statistics, scheme, storage
        self.of_weight = statistics.of_weight(weight)
        rows = len(weight)
        count = min(_ROW_PARTS, max(1, rows // _LEAST_ROWS))
        self.rows = [torch.arange(part, rows, count, device=weight.device) for part in range(count)]

    def parts(self, candidate: Candidate, start: int = 0) -> Iterator[float]:
        for rows in self.rows[start:]:
            original = self.weight[rows]
            quantized = fake_quantize(original * candidate.s, self.scheme, self.storage).div_(candidate.s)
            yield self.of_weight.error(rows, quantized.sub_(original))

    def total(self, quantized: Tensor, s: Tensor) -> float:
        """Error of V diag(s) = ``quantized`` [out, in]."""
        change = quantized / s - self.weight
        return sum(self.of_weight.error(rows, change[rows]) for rows in self.rows)


class TokensError:
    """E(V) on the group's own output, token by token; parts are virtual shards."""

    spread = True

    def __init__(
        self, weight: Tensor, inputs: GroupInputs, scheme: Scheme, storage: torch.dtype, norm: Norm = "l2"
    ) -> None:
        self.weight, self.scheme, self.storage, self.norm = weight, scheme, storage, norm
        self.inputs = inputs
        self.shards = [Tokens(part.x.float() @ weight.T, part.u, part.w) for part in inputs.own]

    def parts(self, candidate: Candidate, start: int = 0) -> Iterator[float]:
        quantized = fake_quantize(self.weight * candidate.s, self.scheme, self.storage)
        return (self._error(shard, quantized, candidate.s, self.norm) for shard in self.shards[start:])

    def total(self, quantized: Tensor, s: Tensor) -> float:
        """Squared error of V diag(s) = ``quantized`` [out, in]."""
        own = [self._error(shard, quantized, s, "l2") for shard in self.shards]
        return float(self.inputs.ranks.table(own, self.inputs.shards).sum())

    def _error(self, shard: Tokens, quantized: Tensor, s: Tensor, norm: Norm) -> float:
        return shard.error(quantized, s, self.scheme.activation_bits, norm)


@dataclass
class ParentShard:
    """What the module around a group is called with on both paths, per micro-batch of a virtual shard."""

    x: list[Arguments]
    u: list[Arguments]
    weights: list[Tensor]


class ParentError:
    """Error of the output of the module around a group (attention, MLP), as AWQ and MBQ measure it; by shard."""

    spread = True

    def __init__(
        self,
        parent: nn.Module,
        linears: list[nn.Linear],
        weight: Tensor,
        shards: list[ParentShard],
        norm: Norm,
        scheme: Scheme,
        storage: torch.dtype,
    ) -> None:
        self.parent, self.linears, self.weight, self.shards = parent, linears, weight, shards
        self.norm, self.scheme, self.storage = norm, scheme, storage
        self.wanted = [[_first(parent(*args, **named)) for args, named in shard.x] for shard in shards]

    def parts(self, candidate: Candidate, start: int = 0) -> Iterator[float]:
        quantized = fake_quantize(self.weight * candidate.s, self.scheme, self.storage)
        for shard, wanted in zip(self.shards[start:], self.wanted[start:], strict=True):
            with _trial(self.linears, quantized, candidate.s, self.scheme.activation_bits):
                error = self._error(shard, wanted)
            yield error

    def _error(self, shard: ParentShard, wanted: list[Tensor]) -> float:
        total = 0.0
        for (args, named), reference, weight in zip(shard.u, wanted, shard.weights, strict=True):
            difference = (_first(self.parent(*args, **named)) - reference).float()
            per_token = difference.abs().sum(-1) if self.norm == "l1" else difference.square().sum(-1)
            total += float((per_token * weight).sum(dtype=torch.float64))
        return total


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


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
