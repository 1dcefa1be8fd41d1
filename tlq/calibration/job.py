"""The job of a calibration: the parameters and data that all parts of the calibration share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tlq.importance.token_weights import TokenWeights
from tlq.parallel import Ranks, chunk_ranges
from tlq.quantization.formats import Scheme, WeightQuantizer
from tlq.recipes import Recipe
from tlq.runtime.activations import HostMemory, host_memory
from tlq.samples import Batch

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class CalibrationJob:
    """Parameters and data of one calibration.

    Attributes:
        recipe: the method.
        quantizer: the scheme, and the dtype in which the checkpoint stores scales and norms.
        batches: all micro-batches, the same on every rank; none for a job that needs no data.
        weights: token weights of every layer and group; none for a job that needs no data.
        ranks: this process's place in a group of ranks, on the model's device.
        memory: limit on hidden states in host memory, and the folder for the rest.
    """

    recipe: Recipe
    quantizer: WeightQuantizer
    batches: Sequence[Batch] = ()
    weights: TokenWeights = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)
    memory: HostMemory = field(default_factory=host_memory)

    @property
    def scheme(self) -> Scheme:
        return self.quantizer.scheme

    @property
    def needs_data(self) -> bool:
        """Whether the job reads calibration data."""
        return self.recipe.needs_data(self.scheme)

    @property
    def chunks(self) -> list[range]:
        """Indices of the micro-batches of every reduction chunk; none for a job that needs no data."""
        return chunk_ranges(len(self.batches)) if self.needs_data else []

    @property
    def own_batches(self) -> list[int]:
        """Indices of the micro-batches that this rank works on."""
        chunks = self.chunks
        return [index for chunk in self.ranks.own_chunks(len(chunks)) for index in chunks[chunk]]

    def by_chunk(self, parts: Iterable[T]) -> list[list[T]]:
        """One value per micro-batch of this rank, grouped by chunk."""
        chunks, values = self.chunks, iter(parts)
        return [[next(values) for _ in chunks[chunk]] for chunk in self.ranks.own_chunks(len(chunks))]

    def counted_tokens(self) -> int:
        """Maximum number of tokens with a weight in one linear group."""
        return max((sum(int((part > 0).sum()) for part in parts) for parts in self.weights.values()), default=0)
