"""The report of a model with experts: one row for each of their groups in a layer, and how many got further tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tasks.report.results import ExpertGroups, group_table
from tasks.report.tokens import modality_shares, relative_importance, set_share
from tlq.importance.pool import TokenPool
from tlq.results import GroupReport


def report(group: str, tokens: int, error: float, routed: float | None = None, further: int = 0) -> GroupReport:
    return GroupReport(
        0,
        group,
        0.5,
        False,
        2 * error,
        error,
        tokens,
        float(tokens),
        seconds=1.0,
        peak_memory_bytes=tokens,
        routed_effective_tokens=routed,
        further_tokens=further,
    )


GROUPS = [
    report("qkv", 100, 1.0),
    report("experts.0.gate_up", 30, 2.0, 30.0),
    report("experts.0.down", 30, 3.0, 30.0),
    report("experts.1.gate_up", 50, 4.0, 2.5, 45),
    report("experts.1.down", 50, 5.0, 2.0, 45),
]


def test_the_experts_of_a_layer_are_a_row_for_each_of_their_groups() -> None:
    table = group_table(GROUPS).set_index("group")
    assert list(table.index) == ["qkv", "experts.gate_up", "experts.down"]
    assert table.loc["experts.gate_up", "tokens"] == 80
    assert table.loc["experts.gate_up", "error_after"] == 3.0
    assert table.loc["experts.down", "seconds"] == 2.0
    assert table.loc["experts.down", "peak_memory_bytes"] == 50
    assert table.loc["qkv", "alpha"] == 0.5


def test_experts_with_few_tokens_are_counted() -> None:
    assert ExpertGroups.of(GROUPS[:1]) is None
    found = ExpertGroups.of(GROUPS)
    assert found == ExpertGroups(4, 2, 2.0)
    assert str(found).startswith("2 of 4 linear groups of experts got further tokens; the router sends one of them 2 ")


def test_experts_count_together_in_the_pictures_of_tokens() -> None:
    pool = TokenPool(
        np.array([0, 4]), np.zeros(4, np.int32), np.array([True, True, False, False]), np.zeros(4, np.bool_)
    )
    scores = {
        (0, "qkv"): np.array([1, 1, 1, 1], np.float32),
        (0, "experts"): np.array([3, 1, 0, 0], np.float32),
        (0, "experts.0.down"): np.array([1, 0, 0, 0], np.float32),
        (0, "experts.1.down"): np.zeros(4, np.float32),  # no token is routed to it
    }
    (relative,) = relative_importance(scores, pool)
    assert relative == pytest.approx([2.0, 1.0, 0.5, 0.5])
    rows = [("qkv", 0, 1.0), ("qkv", 2, 1.0), ("experts.0.down", 0, 3.0), ("experts.1.down", 0, 1.0)]
    chosen = pd.DataFrame(
        [
            {"layer": 0, "group": group, "sample": 0, "position": position, "is_image": position < 2, "weight": weight}
            for group, position, weight in rows
        ]
    )
    (share,) = set_share(chosen, pool, 2)
    assert share == pytest.approx([1.0, 0.0, 0.5, 0.0])
    shares = modality_shares(scores, chosen, pool).set_index("group")
    assert list(shares.index) == ["qkv", "experts"]
    assert shares.loc["experts", "importance"] == 100
    assert shares.loc["experts", "chosen"] == 100
    assert shares.loc["qkv", "chosen"] == 50
