"""The search for equalization scales: the error of a candidate, in parts, and the candidate with the least.

Every form of the error is a sum of parts that are not negative: over output channels, or over tokens. So not every
candidate must be known in full. ``least_error`` drops one as soon as its parts exceed the error of another that is
known: the same winner as an exhaustive search. ``successive_halving`` drops the worse half after every doubling of the
measured parts: a fraction of the work, for a candidate whose error is close to the least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tlq.parallel import Ranks
from tlq.quantization.equalization import Candidate
from tlq.quantization.formats import Scheme, fake_quantize, fake_quantize_activations
from tlq.quantization.objective import Norm, ShardInputs, Statistics, Tokens

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_ROW_PARTS = 63
_LEAST_ROWS = 32
_ROWS_TOGETHER = 512
_FIRST_PARTS = 1
_FEW_PARTS = 4


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
            return self.ranks.all_reduce_max(largest)
        if how == "mean":
            parts = (part.u.float().abs().sum(0) for part in self.own)
            return self.ranks.ordered_sum(parts, shape) / len(self.w)
        parts = (part.w @ part.u.float().abs() for part in self.own)
        return self.ranks.ordered_sum(parts, shape) / float(self.w.sum())

    def statistics(self, weight: Tensor, seen: Callable[[ShardInputs], ShardInputs] | None = None) -> Statistics:
        """Second moments over all shards, for W = ``weight`` [out, in].

        Args:
            seen: what the inputs of a shard are turned into first.
        """
        own = self.own if seen is None else [seen(part) for part in self.own]
        return Statistics.added(weight, own, self.same, self.ranks)


class CandidateErrors(Protocol):
    """The error of any candidate, in parts.

    Attributes:
        parts: how many there are.
    """

    parts: int

    def measure(self, pairs: Sequence[tuple[Candidate, int]]) -> list[float]:
        """Parts by number of candidates under nearest rounding; all ranks ask for the same and get the same."""
        ...


def least_error(errors: CandidateErrors, tried: Sequence[Candidate]) -> Candidate:
    """The candidate with the smallest error, the first of equals; the same for any number of ranks.

    The first part of every candidate tells which is worth knowing in full first; the others go part by part for as
    long as they stay below it.
    """
    totals = errors.measure([(candidate, 0) for candidate in tried])
    rest = range(1, errors.parts)
    likely = min(range(len(tried)), key=totals.__getitem__)
    for value in errors.measure([(tried[likely], part) for part in rest]):
        totals[likely] += value
    left = [number for number in range(len(tried)) if number != likely]
    for part in rest:
        left = [number for number in left if totals[number] <= totals[likely]]
        for number, value in zip(left, errors.measure([(tried[number], part) for number in left]), strict=True):
            totals[number] += value
    return tried[min(sorted([likely, *left]), key=totals.__getitem__)]


def successive_halving(errors: CandidateErrors, tried: Sequence[Candidate]) -> Candidate:
    """The candidate that successive halving leaves (Jamieson and Talwalkar, arXiv 1502.07943); the first of equals.

    All are compared on a few parts, the better half on twice as many, and so on until those left have seen all.
    """
    left, totals, measured = list(range(len(tried))), [0.0] * len(tried), 0
    while len(left) > 1 and measured < errors.parts:
        following = min(errors.parts, max(_FIRST_PARTS, 2 * measured))
        pairs = [(number, part) for part in range(measured, following) for number in left]
        values = errors.measure([(tried[number], part) for number, part in pairs])
        for (number, _), value in zip(pairs, values, strict=True):
            totals[number] += value
        measured = following
        left = sorted(left, key=lambda number: (totals[number], number))[: -(-len(left) // 2)]
    return tried[min(left, key=lambda number: (totals[number], number))]


class StatisticsError:
    """E(V) on the group's own output from second moments; parts are every so many-th output channel, dealt to ranks."""

    def __init__(
        self, weight: Tensor, statistics: Statistics, scheme: Scheme, checkpoint_dtype: torch.dtype, ranks: Ranks
    ) -> None:
        self.weight, self.statistics, self.scheme, self.checkpoint_dtype = weight, statistics, scheme, checkpoint_dtype
        self.ranks = ranks
        self.parts = _row_parts(len(weight))

    def measure(self, pairs: Sequence[tuple[Candidate, int]]) -> list[float]:
        def nearest(rows: slice, s: Tensor) -> Tensor:
            return fake_quantize(self.weight[rows] * s, self.scheme, self.checkpoint_dtype)

        return self._dealt([(part, candidate.s) for candidate, part in pairs], nearest)

    def total(self, quantized: Tensor, s: Tensor) -> float:
        """Error of V diag(s) = ``quantized`` [out, in]."""
        return sum(self._dealt([(part, s) for part in range(self.parts)], lambda rows, _s: quantized[rows].clone()))

    def _dealt(self, asked: Sequence[tuple[int, Tensor]], scaled: Callable[[slice, Tensor], Tensor]) -> list[float]:
        """Parts of the error of V diag(s), whose rows ``scaled`` makes; some together, on one rank."""
        values = torch.zeros(len(asked), dtype=torch.float64)
        chunks = _chunks(len(asked), len(self.weight) // self.parts)
        for chunk in (chunks[number] for number in self.ranks.assigned(len(chunks))):
            changes = []
            for part, s in asked[chunk]:
                rows = slice(part, None, self.parts)
                changes.append((rows, scaled(rows, s).div_(s).sub_(self.weight[rows])))
            values[chunk] = torch.tensor(self.statistics.errors(changes), dtype=torch.float64)
        return self.ranks.all_reduce(values).tolist()


def _chunks(count: int, rows: int) -> list[slice]:
    """Which of ``count`` parts of so many output rows are computed together: the same for any number of ranks."""
    together = max(1, _ROWS_TOGETHER // rows)
    return [slice(start, min(start + together, count)) for start in range(0, count, together)]


def _row_parts(rows: int) -> int:
    """An odd number: every so many-th channel must not always be the same one of every head."""
    return min(_ROW_PARTS, max(1, (rows // _LEAST_ROWS - 1) | 1))


class TokensError:
    """E(V) on the group's own output, token by token; parts are output channels, every rank looks at its own tokens."""

    def __init__(
        self, weight: Tensor, inputs: GroupInputs, scheme: Scheme, checkpoint_dtype: torch.dtype, norm: Norm = "l2"
    ) -> None:
        self.weight, self.scheme, self.checkpoint_dtype, self.norm = weight, scheme, checkpoint_dtype, norm
        self.inputs = inputs
        # Where activations are quantized, every part quantizes all tokens once more.
        most = _ROW_PARTS if scheme.activation_bits is None else _FEW_PARTS
        self.parts = min(most, _row_parts(len(weight)))
        self.shards = [Tokens(part.x.float() @ weight.T, part.u, part.w) for part in inputs.own]

    def measure(self, pairs: Sequence[tuple[Candidate, int]]) -> list[float]:
        own: list[list[float]] = []
        for chunk in _chunks(len(pairs), len(self.weight) // self.parts):
            asked = [(slice(part, None, self.parts), candidate.s) for candidate, part in pairs[chunk]]
            scaled = [
                (rows, fake_quantize(self.weight[rows] * s, self.scheme, self.checkpoint_dtype), s) for rows, s in asked
            ]
            if self.scheme.activation_bits is None:
                parts = [(rows, quantized.div_(s)) for rows, quantized, s in scaled]
                own += _turned([shard.errors(parts, self.norm) for shard in self.shards], len(parts))
            else:  # the inputs are others for every candidate
                own += [self._by_shard(rows, quantized, s, self.norm) for rows, quantized, s in scaled]
        return self.inputs.ranks.table(own, self.inputs.shards).sum(1).tolist()

    def total(self, quantized: Tensor, s: Tensor) -> float:
        """Squared error of V diag(s) = ``quantized`` [out, in]."""
        own = self._by_shard(slice(None), quantized, s, "l2")
        return float(self.inputs.ranks.table([own], self.inputs.shards).sum())

    def _by_shard(self, rows: slice, quantized: Tensor, s: Tensor, norm: Norm) -> list[float]:
        bits = self.scheme.activation_bits
        return [shard.of_rows(rows).error(quantized, s, bits, norm) for shard in self.shards]


def _turned(by_shard: Sequence[Sequence[float]], parts: int) -> list[list[float]]:
    """Values by shard and part as values by part and shard."""
    return [[values[part] for values in by_shard] for part in range(parts)]


@dataclass
class ParentShard:
    """What the module around a group is called with on both paths, per micro-batch of a virtual shard."""

    x: list[Arguments]
    u: list[Arguments]
    weights: list[Tensor]


class ParentError:
    """Error of the output of the module around a group (attention, MLP), as AWQ and MBQ measure it.

    Parts are every fourth virtual shard; every rank looks at its own.
    """

    def __init__(
        self,
        parent: nn.Module,
        linears: list[nn.Linear],
        weight: Tensor,
        own: list[ParentShard],
        inputs: GroupInputs,
        norm: Norm,
        scheme: Scheme,
        checkpoint_dtype: torch.dtype,
    ) -> None:
        self.parent, self.linears, self.weight, self.own, self.inputs = parent, linears, weight, own, inputs
        self.norm, self.scheme, self.checkpoint_dtype = norm, scheme, checkpoint_dtype
        self.parts = min(_FEW_PARTS, inputs.shards)
        self.wanted = [[_first(parent(*args, **named)) for args, named in shard.x] for shard in own]

    def measure(self, pairs: Sequence[tuple[Candidate, int]]) -> list[float]:
        numbers = self.inputs.ranks.own_shards(self.inputs.shards)
        own = []
        for candidate, part in pairs:
            quantized = fake_quantize(self.weight * candidate.s, self.scheme, self.checkpoint_dtype)
            with _trial(self.linears, quantized, candidate.s, self.scheme.activation_bits):
                own.append(
                    [
                        self._error(shard, wanted) if number % self.parts == part else 0.0
                        for number, shard, wanted in zip(numbers, self.own, self.wanted, strict=True)
                    ]
                )
        return self.inputs.ranks.table(own, self.inputs.shards).sum(1).tolist()

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
        inputs = inputs if bits is None else fake_quantize_activations(inputs, bits)
        return (inputs.to(args[0].dtype), *args[1:])

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
