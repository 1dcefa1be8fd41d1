"""The token pool: all tokens of the calibration samples in flat arrays, and their order in the micro-batches.

Values per token are flat arrays [tokens] as well. Sample ``i`` occupies ``cu_seqlens[i]:cu_seqlens[i + 1]`` of each of
them, the convention of flash-attention's interface for sequences of varying length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from tlq.samples import Batch

#: Decoder layer and name of the linear group.
GroupKey = tuple[int, str]

#: (layer, group name) -> raw importance of every token of the pool, [tokens] float32.
Importance = dict[GroupKey, NDArray[np.float32]]

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True, eq=False)
class TokenPool:
    """The tokens of all calibration samples, without padding, in the order of the samples.

    Attributes:
        cu_seqlens: [samples + 1] int64, the first token of every sample, and the number of tokens.
        token_ids: [tokens] int32.
        is_image: [tokens], true for image tokens.
        is_answer: [tokens], true for the tokens that the answer's loss is taken on.
    """

    cu_seqlens: NDArray[np.int64]
    token_ids: NDArray[np.int32]
    is_image: NDArray[np.bool_]
    is_answer: NDArray[np.bool_]

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> TokenPool:
        """The tokens of all micro-batches."""
        indices = pool_indices(batches)
        tokens = sum(map(len, indices))
        pool = cls(
            cu_seqlens_of(batches), np.empty(tokens, np.int32), np.empty(tokens, np.bool_), np.empty(tokens, np.bool_)
        )
        for index, batch in zip(indices, batches, strict=True):
            pool.token_ids[index] = batch.input_ids[batch.valid].numpy()
            pool.is_image[index] = batch.is_image[batch.valid].numpy()
            pool.is_answer[index] = batch.is_answer[batch.valid].numpy()
        return pool

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.token_ids)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every sample, [samples]."""
        return np.diff(self.cu_seqlens)

    @property
    def sample_of(self) -> NDArray[np.int64]:
        """Index of the sample of every token, [tokens]."""
        return np.repeat(np.arange(self.samples), self.lengths)

    def split(self, values: NDArray[_Scalar]) -> list[NDArray[_Scalar]]:
        """Views of ``values`` [tokens], one per sample."""
        return [values[start:stop] for start, stop in pairwise(self.cu_seqlens)]

    def positions(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sample, and position in the sample, of the tokens at ``indices`` of the pool."""
        sample = np.searchsorted(self.cu_seqlens, indices, side="right") - 1
        return sample, indices - self.cu_seqlens[sample]


@dataclass(frozen=True, eq=False)
class WeightedTokens:
    """Tokens of a pool that may count in the objective of a linear group.

    Attributes:
        indices: [n] int64, increasing indices into the pool.
        weights: [n] float32; a token of weight 0 does not count.
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float32]

    def dense(self, tokens: int) -> NDArray[np.float32]:
        """The weight of every token of a pool, [tokens]; 0 for the tokens that are not among these."""
        weights = np.zeros(tokens, np.float32)
        weights[self.indices] = self.weights
        return weights


@dataclass(frozen=True, eq=False)
class PoolWeights:
    """The weights w_t of a calibration, for every decoder layer and linear group.

    Attributes:
        cu_seqlens: [samples + 1], of the pool that the indices refer to.
        groups: (layer, group name) -> its tokens.
    """

    cu_seqlens: NDArray[np.int64]
    groups: Mapping[GroupKey, WeightedTokens]

    @classmethod
    def empty(cls) -> PoolWeights:
        """The weights of a method that needs no data."""
        return cls(np.zeros(1, np.int64), {})


def cu_seqlens_of(batches: Sequence[Batch]) -> NDArray[np.int64]:
    """First token of every sample in the pool, and the number of tokens, [samples + 1]."""
    lengths = np.zeros(sum(len(batch.samples) for batch in batches), np.int64)
    for batch in batches:
        lengths[batch.samples] = batch.valid.sum(1).numpy()
    return np.concatenate([[0], np.cumsum(lengths)])


def pool_indices(batches: Sequence[Batch]) -> list[NDArray[np.int64]]:
    """For every micro-batch, the pool index of each of its tokens, row by row without padding."""
    cu_seqlens = cu_seqlens_of(batches)
    return [
        np.concatenate([np.arange(cu_seqlens[sample], cu_seqlens[sample + 1]) for sample in batch.samples])
        for batch in batches
    ]
