"""Recipes as data: every method is one row of choices.

| choice       | values                                                                              |
|--------------|-------------------------------------------------------------------------------------|
| importance   | where token weights come from (`uniform`, `modality`, `token`, `block`)             |
| tokens       | whose error counts: `all`, or the token-level calibration `set`                     |
| inputs       | what the quantized linear is calibrated on: `full_precision`, or `exposed` to the   |
|              | groups quantized before it                                                          |
| target       | what its reference output is computed from, likewise                                |
| equalization | how per-channel scales s are found (AWQ's idea)                                     |
| rounding     | `nearest`, or `compensated` by error feedback (GPTQ's idea)                         |
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tlq.importance.weighting import Source
from tlq.quantization.formats import Scheme
from tlq.quantization.objective import Norm

InputPath = Literal["full_precision", "exposed"]


@dataclass(frozen=True)
class Equalization:
    """How the per-channel scales of V = Q(W diag(s)) diag(1/s) are chosen.

    Attributes:
        method: `none` (s = 1), `fixed` (one exponent) or `grid` (the exponent with the smallest error).
        alpha: the exponent of `fixed`.
        points: grid points in [0, 1).
        search: `exhaustive` finds the exponent with the smallest error; `halving` drops the worse half of them each
            time it has seen the error of twice as many output channels.
        duo: also try exponents on the weight magnitude, s = |x|^a / |w|^(1 - a).
        error: measured on the output of the group's `linears`, or of the `parent` module.
        norm: `l2` (squared) or `l1` error.
        magnitude: activation magnitude as `mean` of |x| over the tokens, `weighted` by their importance, or `max`.
        folds: groups that may be scaled: those behind `norms` only, also those behind a linear of `matching` width
            (AWQ's code), or `all`: under grouped-query attention the input channels of the output projection that
            come from one value channel then get one scale.
    """

    method: Literal["none", "fixed", "grid"] = "none"
    alpha: float = 0.5
    points: int = 20
    search: Literal["exhaustive", "halving"] = "exhaustive"
    duo: bool = False
    error: Literal["linears", "parent"] = "linears"
    norm: Norm = "l2"
    magnitude: Literal["mean", "weighted", "max"] = "mean"
    folds: Literal["norms", "matching", "all"] = "all"

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"equalization.points is {self.points}, must be at least 2 for a grid")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"equalization.alpha is {self.alpha}, must be in [0, 1]")


@dataclass(frozen=True)
class Recipe:
    """A quantization method. ``inputs_w4a8`` replaces ``inputs`` where activations are quantized too."""

    name: str
    importance: Source = "uniform"
    tokens: Literal["all", "set"] = "all"
    inputs: InputPath = "exposed"
    target: InputPath = "full_precision"
    inputs_quantized_activations: InputPath | None = None
    equalization: Equalization = field(default_factory=Equalization)
    rounding: Literal["nearest", "compensated"] = "nearest"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(
                f"damping is {self.damping}, must not be negative; it is a share of the Hessian's diagonal"
            )

    @property
    def needs_data(self) -> bool:
        """Round-to-nearest without scales looks at weights only."""
        return self.equalization.method != "none" or self.rounding != "nearest"

    def sees(self, path: InputPath, scheme: Scheme) -> bool:
        """Whether inputs on ``path`` are looked at: by the quantized linear, or full precision's for the target."""
        return path == self.inputs_for(scheme) or (path == "full_precision" and path == self.target)

    def inputs_for(self, scheme: Scheme) -> InputPath:
        if scheme.activation_bits is not None and self.inputs_quantized_activations is not None:
            return self.inputs_quantized_activations
        return self.inputs


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("rtn"),
        # arXiv 2211.10438, equation 4, alpha 0.5, folded into norms.
        Recipe(
            "smoothquant",
            inputs="full_precision",
            equalization=Equalization("fixed", alpha=0.5, duo=True, magnitude="max", folds="norms"),
        ),
        # arXiv 2306.00978 with llm-compressor's choices: duo scaling, error of the parent module.
        Recipe(
            "awq",
            target="exposed",
            equalization=Equalization("grid", duo=True, error="parent", folds="matching"),
        ),
        # arXiv 2210.17323: Hessian of the inputs the quantized layer sees, target on the same inputs.
        Recipe("gptq", target="exposed", rounding="compensated"),
        # arXiv 2412.19509: L1 error of the parent module, image tokens weighted by the ratio of mean gradients.
        Recipe(
            "mbq",
            importance="modality",
            inputs="full_precision",
            inputs_quantized_activations="exposed",
            equalization=Equalization("grid", error="parent", norm="l1", folds="matching"),
        ),
        # arXiv 2602.07899.
        Recipe(
            "tlq",
            importance="token",
            tokens="set",
            equalization=Equalization("grid", search="halving", duo=True, magnitude="weighted"),
        ),
        Recipe(
            "tlq-c",
            importance="token",
            tokens="set",
            equalization=Equalization("grid", search="halving", duo=True, magnitude="weighted"),
            rounding="compensated",
        ),
    )
}


def get_recipe(name: str) -> Recipe:
    """Raises ValueError if there is no such recipe."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
