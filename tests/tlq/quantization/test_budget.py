"""The distribution of a size budget: names of budgets, and the exact choice."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tlq.quantization.allocation import Unit, allocate
from tlq.quantization.budget import Budget
from tlq.quantization.formats import MIXED, SCHEMES, get_scheme


def random_units(seed: int, count: int = 5) -> list[Unit]:
    """Units of three candidates whose losses fall with their sizes."""
    generator = np.random.default_rng(seed)
    units = []
    for number in range(count):
        sizes = np.cumsum(generator.integers(5, 50, 3))
        losses = np.sort(generator.exponential(size=3))[::-1] * 10.0 ** generator.integers(-6, 1)
        names = ("small", "middle", "large")
        units.append(
            Unit(
                number,
                "o",
                (),
                100,
                dict(zip(names, map(int, sizes), strict=True)),
                dict(zip(names, map(float, losses), strict=True)),
            )
        )
    return units


def loss_and_size(units: list[Unit], chosen: tuple[str, ...] | list[str]) -> tuple[float, int]:
    pairs = list(zip(units, chosen, strict=True))
    return sum(unit.losses[name] for unit, name in pairs), sum(unit.sizes[name] for unit, name in pairs)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    units = random_units(seed)
    least = loss_and_size(units, ["small"] * 5)[1]
    budget = least + 60
    every = [loss_and_size(units, chosen) for chosen in itertools.product(units[0].sizes, repeat=5)]
    best = min(loss for loss, size in every if size <= budget)
    loss, size = loss_and_size(units, allocate(units, budget))
    assert size <= budget
    assert loss == pytest.approx(best, rel=1e-5)


def test_the_smallest_and_the_largest_budget() -> None:
    units = random_units(0)
    least = loss_and_size(units, ["small"] * 5)[1]
    assert allocate(units, least) == ["small"] * 5
    assert allocate(units, 10**6) == ["large"] * 5
    with pytest.raises(ValueError, match=f"need at least {least} bytes, the budget leaves {least - 1}"):
        allocate(units, least - 1)


def test_a_loss_that_is_not_finite_names_its_group() -> None:
    broken = Unit(3, "gate_up", (), 1, {"w2a16s": 1}, {"w2a16s": float("nan")})
    with pytest.raises(ValueError, match="layer 3, group gate_up: the loss of w2a16s is not finite"):
        allocate([*random_units(0), broken], 10**6)


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("mix3.5", Budget(3.5)),
        ("mix3", Budget(3.0)),
        ("mix4.2gb", Budget(4.2, "GB")),
        ("w3a16", None),
        ("mix", None),
        ("mix-3", None),
        ("mix3.5.1", None),
        ("mix3.5GB", None),
    ],
)
def test_names_of_budgets(name: str, budget: Budget | None) -> None:
    assert Budget.of_name(name) == budget
    if budget is not None:
        assert budget.name == name
        assert get_scheme(name).budget == budget
        assert get_scheme(name).name == name
    else:
        assert name in SCHEMES or pytest.raises(ValueError, get_scheme, name)


def test_bytes_of_budgets() -> None:
    assert Budget(3.5).bytes_for(800, 10**6) == 350
    assert Budget(0.002, "GB").bytes_for(800, 10**6) == 10**6
    assert Budget(2).enlarged(226, 800, 0) == Budget(2.26)
    assert Budget(1, "GB").enlarged(226, 800, 1_234_000_000) == Budget(1.24, "GB")


def test_a_mix_takes_no_group_size() -> None:
    with pytest.raises(ValueError, match=r"scheme mix3\.5 has the groups of its parts; remove group_size: 64"):
        get_scheme("mix3.5", 64)


def test_sizes_of_weights() -> None:
    """A row of 256 weights: its codes, and two bytes for the scale of each group; zero-points have the codes' bits."""
    sizes = {name: get_scheme(name).bytes_of(8, 256, torch.bfloat16) for name in SCHEMES}
    assert sizes["w3a16s"] == 8 * (96 + 2 * 2)
    assert sizes["w4a8"] == 8 * (128 + 2)
    assert sizes["w4a16"] == 8 * (128 + 2 * 2) + 8
    assert sizes["w2a16s"] < sizes["w3a16s"] < sizes["w4a16s"] < sizes["w8a16s"]


def test_parts_of_mixes_are_symmetric_and_keep_activations() -> None:
    parts = [get_scheme(name) for name in MIXED if name in SCHEMES]
    assert len(parts) == len(MIXED) - 1
    assert all(part.symmetric and part.activation_bits is None for part in parts)


def test_a_mix_in_words() -> None:
    chosen = (("a.*", "w8a16s"), ("b", "w2a16s"), ("c", "w2a16s"), ("d", "full_precision"))
    mix = replace(get_scheme("mix3"), budget=None, overrides=chosen)
    assert (mix.bits_in_words, mix.tag, mix.mixed) == ("2 and 8", "mixed-precision", True)
    uniform = replace(get_scheme("w4a16"), overrides=(("a", "full_precision"),))
    assert (uniform.bits_in_words, uniform.tag, uniform.mixed) == ("4", "4-bit", False)
    assert replace(mix, overrides=(("a", "w3a16s"),)).bits_in_words == "3"
