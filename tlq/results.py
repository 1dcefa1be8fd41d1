"""The report of a calibration: the content of calibration.json, with load and save."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from tlq.quantization.formats import Scheme
from tlq.quantization.ranges import Ranges
from tlq.recipes import Equalization, Recipe
from tlq.runtime.files import write_text

T = TypeVar("T")


@dataclass(frozen=True)
class GroupReport:
    """The calibration of one linear group.

    Attributes:
        layer, group: index of the decoder layer, and name of the group.
        alpha, duo: the exponent of the per-channel scales, and whether the weight magnitude was used.
        error_before, error_after: E(V) / sum_t w_t; "before" uses s = 1 and nearest rounding; None if not measured.
        tokens, effective_tokens: tokens whose error counted, and their effective sample size.
        routed_effective_tokens: of an expert, the effective sample size of the tokens that the router sends to it.
        further_tokens: of an expert with too few of them, the tokens that were added (``tlq.calibration.routing``).
        damping: fraction of the Hessian's mean diagonal that was added; None without compensated rounding.
        seconds: time to solve the group.
        peak_memory_bytes: memory peak of the process when the layer was finished.
    """

    layer: int
    group: str
    alpha: float
    duo: bool
    error_before: float | None
    error_after: float | None
    tokens: int
    effective_tokens: float | None
    damping: float | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    routed_effective_tokens: float | None = None
    further_tokens: int = 0


@dataclass(frozen=True)
class LayerReport:
    """The calibration of one decoder layer; times and memory peaks are those of the leading rank.

    A field is None if a file of an older version lacks it, or if there is no device.
    """

    layer: int
    groups: Sequence[GroupReport]
    seconds: float | None = None
    phases: Mapping[str, float] | None = None
    ranks: int | None = None
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Parse a layer. Raises ValueError if the layer or one of its groups has an unknown key or lacks one."""
        groups = [_from_dict(GroupReport, group, "its groups have") for group in values.get("groups", ())]
        return _from_dict(cls, {**values, "groups": groups}, "its layers have")

    def to_dict(self) -> dict[str, Any]:
        """The layer without its groups."""
        return {name: value for name, value in asdict(self).items() if name != "groups"}


@dataclass(frozen=True)
class CalibrationReport:
    """calibration.json of a checkpoint: the recipe, the scheme, and what happened in every layer.

    Attributes:
        carried_over: tensors that transformers' model does not name; they are in the checkpoint as they were.
    """

    recipe: Recipe
    scheme: Scheme
    layers: Sequence[LayerReport]
    carried_over: Sequence[str] = ()

    @property
    def groups(self) -> list[GroupReport]:
        return [group for layer in self.layers for group in layer.groups]

    def save(self, path: Path) -> None:
        content = {
            "recipe": asdict(self.recipe),
            "scheme": asdict(self.scheme),
            "groups": [asdict(group) for group in self.groups],
            "layers": [layer.to_dict() for layer in self.layers],
            "carried_over": list(self.carried_over),
        }
        write_text(json.dumps(content, indent=1) + "\n", path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that ``save`` has written. Raises ValueError, with the path, for any other content."""
        content = json.loads(path.read_text())
        remedy = f"make it again with `dvc repro -f calibrate@{path.parent.name}`"
        missing = [name for name in ("recipe", "scheme", "groups") if name not in content]
        if missing:
            raise ValueError(f"{path}: has no {', '.join(missing)}; {remedy}")
        try:
            layers = _layers(content["groups"], content.get("layers", ()))
            carried_over = tuple(content.get("carried_over", ()))
            return cls(_recipe(content["recipe"]), _scheme(content["scheme"]), layers, carried_over)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {remedy}") from error


def _layers(groups: Sequence[Mapping[str, Any]], layers: Sequence[Mapping[str, Any]]) -> list[LayerReport]:
    """Layers with their groups; files of older versions have only groups."""
    by_layer: dict[int, list[Mapping[str, Any]]] = {}
    for group in groups:
        by_layer.setdefault(group["layer"], []).append(group)
    described = {layer["layer"]: layer for layer in layers}
    return [
        LayerReport.from_dict({"layer": index, **described.get(index, {}), "groups": by_layer[index]})
        for index in sorted(by_layer)
    ]


def _recipe(values: Mapping[str, Any]) -> Recipe:
    equalization = _from_dict(Equalization, values.get("equalization", {}), "its equalization has")
    ranges = _from_dict(Ranges, values.get("ranges", {}), "its ranges have")
    return _from_dict(Recipe, {**values, "equalization": equalization, "ranges": ranges}, "its recipe has")


def _scheme(values: Mapping[str, Any]) -> Scheme:
    overrides = tuple((pattern, name) for pattern, name in values.get("overrides", ()))
    return _from_dict(Scheme, {**values, "overrides": overrides}, "its scheme has")


def _from_dict(cls: type[T], values: Mapping[str, Any], subject: str) -> T:
    """An instance of a dataclass; ``subject`` begins the message of the error."""
    known = {each.name for each in fields(cls)}  # type: ignore[arg-type]
    if unknown := values.keys() - known:
        raise ValueError(f"{subject} an unknown key {', '.join(sorted(unknown))}")
    try:
        return cls(**values)
    except TypeError as error:
        required = [each.name for each in fields(cls) if each.default is MISSING and each.default_factory is MISSING]  # type: ignore[arg-type]
        raise ValueError(f"{subject} no {', '.join(name for name in required if name not in values)}") from error
