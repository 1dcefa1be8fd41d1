"""Errors of a linear group: their inputs, and the measures that a recipe can name.

``LinearsError`` measures E(V) on the group's own output, from second moments (``StatisticsError``) or token by token
(``TokensError``). ``ParentError`` measures the output of the module around the group, as AWQ and MBQ do. A new measure
is one class with the methods of ``ErrorMeasure`` and one row in ``ERROR_MEASURES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from tlq.models.decoder import first_output
from tlq.models.linear_groups import LinearGroup
from tlq.parallel import Ranks
from tlq.quantization.equalization import Candidate
from tlq.quantization.formats import Scheme, WeightQuantizer, fake_quantize_activations
from tlq.quantization.objective import ChunkInputs, Norm, Statistics, Tokens

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

_ROW_PARTS = 63
_LEAST_ROWS = 32
#: Output rows whose errors are computed together.
ROWS_TOGETHER = 512
#: Parts of an error that is measured token by token.
FEW_PARTS = 4


@dataclass
class GroupInputs:
    """Inputs of one linear group for this rank's chunks, and the weights of all ranks' tokens.

    Attributes:
        own: inputs of this rank's chunks, in order.
        chunks: number of chunks of all ranks.
        w: [tokens], token weights of all chunks.
        in_features: width of the inputs.
        same: whether x and u are the same.
    """

    own: list[ChunkInputs]
    chunks: int
    w: Tensor
    in_features: int
    same: bool
    ranks: Ranks

    def magnitude(self, how: Literal["mean", "weighted", "max"]) -> Tensor:
        """Magnitude of every channel of u, [in]."""
        shape = (self.in_features,)
        if how == "max":
            largest = torch.zeros(shape, device=self.ranks.device)
            for part in (part for part in self.own if len(part.u)):
                largest = torch.maximum(largest, part.u.float().abs().amax(0))
            return self.ranks.all_reduce_max(largest)
        if how == "mean":
            parts = (part.u.float().abs().sum(0) for part in self.own)
            return self.ranks.ordered_sum(parts, shape) / len(self.w)
        parts = (part.w @ part.u.float().abs() for part in self.own)
        return self.ranks.ordered_sum(parts, shape) / float(self.w.sum())

    def second_moments(self) -> Tensor:
        """sum_t w_t u_t^2 of every channel, [in]."""
        parts = (part.w @ part.u.float().square() for part in self.own)
        return self.ranks.ordered_sum(parts, (self.in_features,))

    def statistics(self, weight: Tensor, transform: Callable[[ChunkInputs], ChunkInputs] | None = None) -> Statistics:
        """Second moments over all chunks, for W = ``weight`` [out, in].

        Args:
            transform: function applied to the inputs of every chunk first.
        """
        own = self.own if transform is None else [transform(part) for part in self.own]
        return Statistics.added(weight, own, self.same, self.ranks)


class CandidateErrors(Protocol):
    """The error of any candidate, in parts.

    Attributes:
        parts: number of parts.
    """

    parts: int

    def measure(self, pairs: Sequence[tuple[Candidate, int]]) -> list[float]:
        """Partial error of every pair (candidate, index of the part), under nearest rounding.

        All ranks call this with the same pairs and receive the same values.
        """
        ...


class StatisticsError:
    """E(V) on the group's own output from second moments; a part is every n-th output channel, computed by one rank."""

    def __init__(self, weight: Tensor, statistics: Statistics, quantizer: WeightQuantizer, ranks: Ranks) -> None:
        self.weight, self.statistics, self.quantizer, self.ranks = weight, statistics, quantizer, ranks
        self.parts = row_parts(len(weight))

    def measure(self, pairs: Sequence[tuple[Candidate, int]]) -> list[float]:
        def nearest(rows: slice, s: Tensor) -> Tensor:
            return self.quantizer.fake_quantize(self.weight[rows] * s)

        return self._distributed([(part, candidate.s) for candidate, part in pairs], nearest)

    def total(self, quantized: Tensor, s: Tensor) -> float:
        """Error of V diag(s) = ``quantized`` [out, in]."""
        every_part = [(part, s) for part in range(self.parts)]
        return sum(self._distributed(every_part, lambda rows, _s: quantized[rows].clone()))

    def _distributed(
        self, requests: Sequence[tuple[int, Tensor]], scaled: Callable[[slice, Tensor], Tensor]
    ) -> list[float]:
        """Parts of the error of V diag(s), whose rows ``scaled`` computes; a batch of requests is one rank's work."""
        values = torch.zeros(len(requests), dtype=torch.float64)
        computed: list[tuple[slice, Tensor]] = []
        together = _computed_together(len(requests), len(self.weight) // self.parts)
        for batch in (together[index] for index in self.ranks.assigned(len(together))):
            changes = []
            for part, s in requests[batch]:
                rows = slice(part, None, self.parts)
                changes.append((rows, scaled(rows, s).div_(s).sub_(self.weight[rows])))
            computed.append((batch, self.statistics.errors(changes)))
        for batch, errors in computed:  # only now does a GPU have to finish
            values[batch] = errors.cpu()
        return self.ranks.all_reduce(values).tolist()


def _computed_together(count: int, rows: int) -> list[slice]:
    """Batches of ``count`` parts of ``rows`` output channels each; they do not depend on the number of ranks."""
    together = max(1, ROWS_TOGETHER // rows)
    return [slice(start, min(start + together, count)) for start in range(0, count, together)]


def row_parts(rows: int) -> int:
    """Number of parts, odd so that a stride over output channels does not alias with the head dimension."""
    return min(_ROW_PARTS, max(1, (rows // _LEAST_ROWS - 1) | 1))


class TokensError:
    """E(V) on the group's own output, token by token; a part is every n-th output channel, at each rank's tokens.

    Reference outputs are kept part by part, so that measuring a part reads no others.
    """

    def __init__(self, weight: Tensor, inputs: GroupInputs, quantizer: WeightQuantizer, norm: Norm = "l2") -> None:
        self.weight, self.inputs, self.quantizer, self.norm = weight, inputs, quantizer, norm
        # With quantized activations, every part quantizes all tokens again.
        most = _ROW_PARTS if quantizer.scheme.activation_bits is None else FEW_PARTS
        self.parts = min(most, row_parts(len(weight)))
        self.tokens = [Tokens([], part.u, part.w) for part in inputs.own]
        for batch in _computed_together(self.parts, len(weight) // self.parts):
            rows = [weight[part :: self.parts] for part in range(self.parts)[batch]]
            stacked, sizes = torch.cat(rows), [len(part) for part in rows]
            for tokens, own in zip(self.tokens, inputs.own, strict=True):
                tokens.y += [y.contiguous() for y in (own.x.float() @ stacked.T).split(sizes, 1)]

    def measure(self, pairs: Sequence[tuple[Candidate, int]]) -> list[float]:
        def nearest(rows: slice, s: Tensor) -> Tensor:
            return self.quantizer.fake_quantize(self.weight[rows] * s)

        return self._by_token([(part, candidate.s) for candidate, part in pairs], nearest, self.norm)

    def total(self, quantized: Tensor, s: Tensor) -> float:
        """Squared error of V diag(s) = ``quantized`` [out, in]."""
        every_part = [(part, s) for part in range(self.parts)]
        return sum(self._by_token(every_part, lambda rows, _s: quantized[rows].clone(), "l2"))

    def _by_token(
        self, requests: Sequence[tuple[int, Tensor]], scaled: Callable[[slice, Tensor], Tensor], norm: Norm
    ) -> list[float]:
        """Parts of the error of V diag(s), whose rows ``scaled`` computes, at the tokens of all ranks."""
        bits = self.quantizer.scheme.activation_bits
        own: list[Tensor] = []
        for batch in _computed_together(len(requests), len(self.weight) // self.parts):
            parts = [part for part, _ in requests[batch]]
            rows = [scaled(slice(part, None, self.parts), s) for part, s in requests[batch]]
            if bits is None:  # V in place of V diag(s), because it is smaller than the inputs
                stacked = torch.cat(
                    [quantized.div_(s) for quantized, (_, s) in zip(rows, requests[batch], strict=True)]
                )
                own.append(_by_chunk([tokens.errors(parts, stacked, norm) for tokens in self.tokens], len(parts)))
                continue
            for part, quantized, (_, s) in zip(parts, rows, requests[batch], strict=True):
                # the quantized inputs differ from candidate to candidate
                errors = [tokens.scaled(s, bits).errors([part], quantized, norm) for tokens in self.tokens]
                own.append(_by_chunk(errors, 1))
        return self.inputs.ranks.table(own, self.inputs.chunks).sum(1).tolist()


def _by_chunk(errors: Sequence[Tensor], parts: int) -> Tensor:
    """Errors [parts] of every chunk as [parts, chunks]."""
    return torch.stack(list(errors), 1) if errors else torch.zeros(parts, 0, dtype=torch.float64)


class LinearsError:
    """E(V) on the group's own output, in the cheaper of its two forms; each form is computed on first use."""

    def __init__(
        self, weight: Tensor, inputs: GroupInputs, quantizer: WeightQuantizer, needs_statistics: bool = False
    ) -> None:
        """``needs_statistics``: whether rounding needs the second moments in any case."""
        self.weight, self.inputs, self.quantizer = weight, inputs, quantizer
        self.needs_statistics = needs_statistics

    @cached_property
    def cheapest(self) -> StatisticsError | TokensError:
        """The form that needs fewer operations."""
        if from_statistics(len(self.inputs.w), self.weight.shape[1], self.quantizer.scheme, self.needs_statistics):
            return StatisticsError(self.weight, self.inputs.statistics(self.weight), self.quantizer, self.inputs.ranks)
        return self.by_token("l2")

    def by_token(self, norm: Norm) -> TokensError:
        return TokensError(self.weight, self.inputs, self.quantizer, norm)

    def uses(self, statistics: Statistics) -> bool:
        """Whether errors are measured with these statistics."""
        return isinstance(self.cheapest, StatisticsError) and self.cheapest.statistics is statistics

    def statistics_for(self, s: Tensor) -> tuple[Statistics, Tensor | None]:
        """Statistics for rounding V diag(s).

        Returns:
            (statistics, s) where s must still be applied, or (statistics, None) where the inputs were already divided
            by s because the quantized activations depend on it.
        """
        bits = self.quantizer.scheme.activation_bits
        if bits is None:
            if isinstance(self.cheapest, StatisticsError):
                return self.cheapest.statistics, s
            return self.inputs.statistics(self.weight), s

        def quantized(part: ChunkInputs) -> ChunkInputs:
            u = fake_quantize_activations(part.u / s, bits)
            # With one stream for both, this is GPTQ's original problem, whose target is the weight itself.
            return ChunkInputs(u if self.inputs.same else part.x / s, u, part.w)

        return self.inputs.statistics(self.weight * s, quantized), None


def from_statistics(tokens: int, in_features: int, scheme: Scheme, needs_statistics: bool) -> bool:
    """Whether to measure E(V) from second moments: with more tokens than channels and full-precision activations.

    If rounding needs the moments in any case, half as many tokens suffice.
    """
    return scheme.activation_bits is None and tokens * (2 if needs_statistics else 1) > in_features


@dataclass
class ParentChunk:
    """Arguments of the module around a group in both streams, and token weights, per micro-batch of a chunk."""

    x: list[Arguments]
    u: list[Arguments]
    weights: list[Tensor]


@dataclass
class ParentCalls:
    """The module around a group, the group's linears in it, and its calls by chunk of this rank."""

    module: nn.Module
    linears: list[nn.Linear]
    own: list[ParentChunk]


class ParentError:
    """Error of the output of the module around a group (attention, MLP), as AWQ and MBQ measure it.

    A part is every fourth chunk; every rank measures its own chunks.
    """

    def __init__(
        self, parent: ParentCalls, weight: Tensor, inputs: GroupInputs, quantizer: WeightQuantizer, norm: Norm
    ) -> None:
        self.parent, self.weight, self.inputs, self.quantizer, self.norm = parent, weight, inputs, quantizer, norm
        self.parts = min(FEW_PARTS, inputs.chunks)
        self.references = [
            [first_output(parent.module(*args, **named)) for args, named in chunk.x] for chunk in parent.own
        ]

    def measure(self, pairs: Sequence[tuple[Candidate, int]]) -> list[float]:
        numbers = self.inputs.ranks.own_chunks(self.inputs.chunks)
        own = []
        nothing = torch.zeros((), dtype=torch.float64, device=self.weight.device)
        for candidate, part in pairs:
            quantized = self.quantizer.fake_quantize(self.weight * candidate.s)
            with _trial(self.parent.linears, quantized, candidate.s, self.quantizer.scheme.activation_bits):
                errors = [
                    self._error(chunk, references) if number % self.parts == part else nothing
                    for number, chunk, references in zip(numbers, self.parent.own, self.references, strict=True)
                ]
            own.append(_by_chunk([error[None] for error in errors], 1))
        return self.inputs.ranks.table(own, self.inputs.chunks).sum(1).tolist()

    def _error(self, chunk: ParentChunk, references: list[Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.weight.device)
        for (args, named), reference, weight in zip(chunk.u, references, chunk.weights, strict=True):
            difference = (first_output(self.parent.module(*args, **named)) - reference).float()
            per_token = difference.abs().sum(-1) if self.norm == "l1" else difference.square().sum(-1)
            total += (per_token * weight).sum(dtype=torch.float64)
        return total


@contextmanager
def _trial(linears: list[nn.Linear], quantized: Tensor, s: Tensor, bits: int | None) -> Iterator[None]:
    """Inside this context ``linears`` compute with V diag(s), on inputs divided by s."""

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


class ErrorMeasure(Protocol):
    """An error that the search for scales can minimise."""

    def parent_of(self, group: LinearGroup) -> str | None:
        """Path of the module around ``group`` whose calls this measure needs; None if it needs none."""
        ...

    def bytes_needed(self, tokens: int, hidden_bytes: int) -> int:
        """Memory beyond the group's inputs, for ``tokens`` hidden states of ``hidden_bytes`` each."""
        ...

    def errors(self, linears: LinearsError, parent: ParentCalls | None, norm: Norm) -> CandidateErrors:
        """The errors of candidates for one group; ``parent`` is None if ``parent_of`` returns None."""
        ...


class LinearsMeasure:
    """Error of the output of the group's linears."""

    def parent_of(self, group: LinearGroup) -> str | None:
        return None

    def bytes_needed(self, tokens: int, hidden_bytes: int) -> int:
        return 0

    def errors(self, linears: LinearsError, parent: ParentCalls | None, norm: Norm) -> CandidateErrors:
        return linears.cheapest if norm == "l2" else linears.by_token(norm)


class ParentMeasure(LinearsMeasure):
    """Error of the output of the module around the group, or of the linears for a group without such a module."""

    def parent_of(self, group: LinearGroup) -> str | None:
        return group.parent

    def bytes_needed(self, tokens: int, hidden_bytes: int) -> int:
        """Arguments of the module in both streams, its reference output, and the output of a candidate."""
        return 4 * tokens * hidden_bytes

    def errors(self, linears: LinearsError, parent: ParentCalls | None, norm: Norm) -> CandidateErrors:
        if parent is None:
            return super().errors(linears, parent, norm)
        return ParentError(parent, linears.weight, linears.inputs, linears.quantizer, norm)


#: Error measures by the name that ``Equalization.error`` gives them.
ERROR_MEASURES: dict[str, ErrorMeasure] = {"linears": LinearsMeasure(), "parent": ParentMeasure()}
