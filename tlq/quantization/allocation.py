"""Bits for every linear group under a size budget: the multiple-choice knapsack problem.

Choose one candidate for each unit so that the sum of losses is least and the sum of sizes is within the budget. The
problem is solved exactly, as an integer linear program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array


@dataclass(frozen=True)
class Unit:
    """Linears that have one scheme: a linear group, or all experts of a decoder layer.

    Attributes:
        layer, name: decoder layer, and name of the group.
        patterns: module paths of its linears, or patterns of them.
        weights: number of weights.
        sizes: bytes by candidate.
        losses: loss by candidate; the candidates are the same.
    """

    layer: int
    name: str
    patterns: tuple[str, ...]
    weights: int
    sizes: Mapping[str, int]
    losses: Mapping[str, float]


def allocate(units: Sequence[Unit], budget: int) -> list[str]:
    """The candidate of every unit.

    Args:
        budget: bytes for all units.

    Raises:
        ValueError: the smallest candidates together exceed the budget, or a loss is not finite.
    """
    least = sum(min(unit.sizes.values()) for unit in units)
    if least > budget:
        raise ValueError(f"the linears need at least {least} bytes, the budget leaves {budget}")
    choices = [(number, name) for number, unit in enumerate(units) for name in unit.sizes]
    losses = np.array([units[number].losses[name] for number, name in choices])
    if not np.isfinite(losses).all():
        number, name = choices[int(np.argmin(np.isfinite(losses)))]
        raise ValueError(f"layer {units[number].layer}, group {units[number].name}: the loss of {name} is not finite")
    sizes = np.array([units[number].sizes[name] for number, name in choices], float)
    columns = np.arange(len(choices))
    once = coo_array((np.ones(len(choices)), ([number for number, _ in choices], columns)))
    constraints = [
        LinearConstraint(once.tocsr(), 1, 1),
        LinearConstraint(sizes[None] / max(least, 1), -np.inf, budget / max(least, 1)),
    ]
    scale = losses.max() or 1.0
    solved = milp(losses / scale, integrality=np.ones(len(choices)), bounds=Bounds(0, 1), constraints=constraints)
    if solved.x is None:
        raise ValueError(f"no choice of bits was found: {solved.message}")
    return [name for (_, name), chosen in zip(choices, solved.x, strict=True) if chosen > 0.5]  # noqa: PLR2004
