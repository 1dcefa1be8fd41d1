"""Recipes as data: every method is one row of this table.

| choice       | values                                                                              |
|--------------|-------------------------------------------------------------------------------------|
| importance   | source of the token weights: `uniform`, `modality`, `token`, `block`                |
| tokens       | tokens whose error counts: `all`, or the token-level calibration `set`              |
| inputs       | inputs of the quantized linear: `full_precision`, or `exposed` to the groups        |
|              | quantized before it                                                                 |
| target       | inputs that its reference output is computed from, with the same values             |
| equalization | choice of the per-channel scales s (AWQ's idea)                                     |
| ranges       | scale and zero-point of a group: from `minmax`, or by `search`                      |
| rounding     | `nearest`, or `compensated` by error feedback (GPTQ's idea)                         |
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from tlq.importance.weighting import Source
from tlq.quantization.equalization import Equalization
from tlq.quantization.errors import ERROR_MEASURES, ErrorMeasure
from tlq.quantization.formats import Scheme
from tlq.quantization.ranges import Ranges
from tlq.quantization.rounding import ROUNDINGS, Rounding

InputPath = Literal["full_precision", "exposed"]


@dataclass(frozen=True)
class Recipe:
    """A quantization method.

    Attributes:
        inputs_quantized_activations: replaces ``inputs`` if the scheme also quantizes activations.
        rounding: key of ``tlq.quantization.rounding.ROUNDINGS``.
        damping: fraction of the Hessian's mean diagonal that is added to its diagonal (GPTQ's ``percdamp``).
    """

    name: str
    importance: Source = "uniform"
    tokens: Literal["all", "set"] = "all"
    inputs: InputPath = "exposed"
    target: InputPath = "full_precision"
    inputs_quantized_activations: InputPath | None = None
    equalization: Equalization = field(default_factory=Equalization)
    ranges: Ranges = field(default_factory=Ranges)
    rounding: str = "nearest"
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.damping < 0:
            raise ValueError(
                f"damping is {self.damping}, must not be negative; it is a share of the Hessian's diagonal"
            )
        _check("rounding", self.rounding, ROUNDINGS)
        _check("equalization.error", self.equalization.error, ERROR_MEASURES)

    def needs_data(self, scheme: Scheme | None = None) -> bool:
        """Whether the recipe reads calibration data for a scheme; without one, for some scheme.

        Plain round-to-nearest depends on the weights only.
        """
        return self.equalization.method != "none" or self.rounding_method.needs_data or self.ranges.needs_data(scheme)

    @property
    def rounding_method(self) -> Rounding:
        return ROUNDINGS[self.rounding]

    @property
    def error_measure(self) -> ErrorMeasure:
        return ERROR_MEASURES[self.equalization.error]

    def sees(self, path: InputPath, scheme: Scheme) -> bool:
        """Whether the recipe needs inputs from ``path``, for the quantized linear or for the target."""
        return path == self.inputs_for(scheme) or (path == "full_precision" and path == self.target)

    def inputs_for(self, scheme: Scheme) -> InputPath:
        if scheme.activation_bits is not None and self.inputs_quantized_activations is not None:
            return self.inputs_quantized_activations
        return self.inputs


def _check(name: str, key: str, registry: Collection[str]) -> None:
    if key not in registry:
        raise ValueError(f"{name} is {key!r}; choose one of {', '.join(registry)}")


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
        # arXiv 2210.17323: Hessian of the quantized layer's inputs, target on the same inputs.
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
            ranges=Ranges("search", most_bits=2),
            rounding="compensated",
        ),
    )
}


def get_recipe(name: str) -> Recipe:
    """The recipe of this name. Raises ValueError if the name is unknown."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
