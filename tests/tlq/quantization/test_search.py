"""Searches over candidates whose error comes in parts."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tlq.parallel import Ranks
from tlq.quantization.equalization import Candidate, Fold, candidates
from tlq.quantization.errors import GroupInputs, StatisticsError, TokensError
from tlq.quantization.formats import WeightQuantizer, get_scheme
from tlq.quantization.objective import ChunkInputs
from tlq.quantization.search import least_error, successive_halving
from tlq.recipes import RECIPES


class Table:
    """Errors of candidates 0, 1, ... by part, and the number of measured parts."""

    def __init__(self, values: Sequence[Sequence[float]]) -> None:
        self.values, self.asked = values, 0
        self.parts = len(values[0])
        self.tried = [Candidate(torch.ones(1), float(number)) for number in range(len(values))]

    def measure(self, pairs: Sequence[tuple[Candidate, int]]) -> list[float]:
        self.asked += len(pairs)
        return [self.values[int(candidate.alpha)][part] for candidate, part in pairs]

    def total(self, candidate: Candidate) -> float:
        return sum(self.values[int(candidate.alpha)])


def tables(candidates: int = 12, parts: int = 9) -> st.SearchStrategy[list[list[float]]]:
    """Small integers, so that many are equal and sums are exact."""
    return st.integers(1, parts).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(0, 5).map(float), min_size=width, max_size=width), min_size=1, max_size=candidates
        )
    )


@given(values=tables())
def test_exhaustive_search_finds_the_first_minimum(values: list[list[float]]) -> None:
    table = Table(values)
    assert int(least_error(table, table.tried).alpha) == min(range(len(values)), key=lambda number: sum(values[number]))


@given(values=tables(parts=1))
def test_halving_of_one_part_finds_the_first_minimum(values: list[list[float]]) -> None:
    table = Table(values)
    assert int(successive_halving(table, table.tried).alpha) == min(
        range(len(values)), key=lambda number: sum(values[number])
    )


@given(values=st.lists(st.integers(1, 1000), min_size=1, max_size=40, unique=True), parts=st.integers(1, 63))
def test_halving_finds_the_minimum_if_all_parts_rank_alike(values: list[int], parts: int) -> None:
    table = Table([[float(value)] * parts for value in values])
    assert values[int(successive_halving(table, table.tried).alpha)] == min(values)


def test_halving_measures_a_fraction() -> None:
    table = Table([[1.0] * 63 for _ in range(39)])
    successive_halving(table, table.tried)
    assert table.asked < 39 * 63 / 12


@torch.no_grad()
@pytest.mark.parametrize("form", ["statistics", "tokens"])
@pytest.mark.parametrize("seed", range(3))
def test_halving_finds_an_error_close_to_the_minimum(form: str, seed: int) -> None:
    """Errors of heavy-tailed channels, which occur in practice."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.randn(128, generator=generator).mul(1.5).exp()
    x = torch.randn(400, 128, generator=generator) * channels
    u = x + 0.05 * torch.randn(400, 128, generator=generator) * channels
    weight = torch.randn(2048, 128, generator=generator) * 0.05
    w = torch.rand(400, generator=generator)
    ranks, quantizer = Ranks(), WeightQuantizer(get_scheme("w3a16"), torch.float32)
    inputs = GroupInputs([ChunkInputs(x, u, w)], 1, w, 128, False, ranks)
    if form == "statistics":
        errors = StatisticsError(weight, inputs.statistics(weight), quantizer, ranks)
    else:
        errors = TokensError(weight, inputs, quantizer)
    fold = Fold.into(torch.nn.LayerNorm(128, bias=False), 128, 64, torch.float32)
    method = RECIPES["tlq"].equalization
    tried = list(candidates(method, inputs.magnitude("weighted"), weight, quantizer.scheme.group_size, fold))
    places = {id(candidate): number for number, candidate in enumerate(tried)}
    totals = [sum(errors.measure([(candidate, part) for part in range(errors.parts)])) for candidate in tried]
    assert totals[places[id(successive_halving(errors, tried))]] < 1.02 * min(totals)
    assert totals[places[id(least_error(errors, tried))]] == pytest.approx(min(totals))
