"""The token pool: flat arrays against a plain loop over the rows of padded micro-batches."""

from __future__ import annotations

import numpy as np
from support.pools import pool_of

from tlq.importance.gradients import BatchScores, to_pool
from tlq.importance.pool import TokenPool
from tlq.samples import Batch


def test_a_pool_holds_every_token_in_the_order_of_the_samples(batches: list[Batch]) -> None:
    pool = TokenPool.of(batches)
    rows = sorted(
        (sample, row, index) for index, batch in enumerate(batches) for row, sample in enumerate(batch.samples)
    )
    assert [sample for sample, _, _ in rows] == list(range(pool.samples))
    for name, column in (("token_ids", "input_ids"), ("is_image", "is_image"), ("is_answer", "is_answer")):
        for values, (_, row, index) in zip(pool.split(getattr(pool, name)), rows, strict=True):
            batch = batches[index]
            assert values.tolist() == getattr(batch, column)[row][batch.valid[row]].tolist()
    assert (pool.token_ids.dtype, pool.is_image.dtype, pool.is_answer.dtype) == (np.int32, np.bool_, np.bool_)
    assert len(pool) == pool.cu_seqlens[-1] == sum(int(batch.valid.sum()) for batch in batches)


def test_scores_of_micro_batches_become_flat_whatever_their_order(batches: list[Batch]) -> None:
    """Every token is scored with its own id, so that the pool's ids must come back."""
    scores = [
        BatchScores(index, {(0, "qkv"): batch.input_ids[batch.valid].float()}) for index, batch in enumerate(batches)
    ]
    (values,) = to_pool(reversed(scores), batches).values()
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, TokenPool.of(batches).token_ids)


def test_positions_of_pool_indices() -> None:
    pool = pool_of([np.zeros(length, np.bool_) for length in (5, 1, 4)])
    sample, position = pool.positions(np.array([0, 4, 5, 6, 9]))
    assert sample.tolist() == [0, 0, 1, 2, 2]
    assert position.tolist() == [0, 4, 0, 0, 3]
    assert pool.sample_of.tolist() == [0] * 5 + [1] + [2] * 4


def test_a_split_is_a_view() -> None:
    pool = pool_of([np.zeros(2, np.bool_), np.zeros(3, np.bool_)])
    values = np.arange(5.0)
    pool.split(values)[1][0] = 9
    assert values.tolist() == [0, 1, 9, 3, 4]
    assert pool_of([np.zeros(0, np.bool_)] * 2).split(np.empty(0))[1].tolist() == []
