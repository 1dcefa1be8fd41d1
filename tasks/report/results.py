"""What the other stages left, read once: scores, calibration reports and sizes of every variant."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.compare import FULL
from tasks.config.params import VariantParams
from tasks.stages.files import EVALUATION, MODELS

#: Columns of calibration.json's groups that the report shows; a file of another version may lack the optional ones.
REQUIRED = ("layer", "group", "alpha", "duo", "error_before", "error_after", "tokens", "effective_tokens")
OPTIONAL = ("seconds", "peak_memory_bytes")

_WEIGHTS = ("*.safetensors", "*.bin")
_DEMO = "demo_"


@dataclass(frozen=True)
class Variant:
    """One quantized model.

    Attributes:
        name: <recipe>-<scheme>, the folder of its checkpoint.
        recipe, scheme: the rows it was made with, as calibration.json holds them.
        metrics: evaluation/<name>/metrics.json.
        groups: a row per layer and linear group, columns REQUIRED and OPTIONAL; what was not measured is missing.
        weight_bytes: size of the weight files.
    """

    name: str
    recipe: dict[str, Any]
    scheme: dict[str, Any]
    metrics: dict[str, Any]
    groups: pd.DataFrame
    weight_bytes: int

    @property
    def mean(self) -> dict[str, Any]:
        mean: dict[str, Any] = self.metrics["mean"]
        return mean

    @property
    def has_errors(self) -> bool:
        """Whether calibration measured errors: recipes that look at no data do not."""
        return bool(self.groups["error_after"].notna().any())

    @property
    def has_exponents(self) -> bool:
        return bool(self.recipe["equalization"]["method"] != "none")

    @property
    def error_unit(self) -> str:
        """What the errors of this variant measure; those of two units cannot be compared."""
        choices = self.recipe["equalization"]
        of = {"linears": "the group's linears", "parent": "the parent module"}[choices["error"]]
        return f"{ {'l2': 'squared', 'l1': 'absolute'}[choices['norm']] } error at the output of {of}"


@dataclass(frozen=True)
class Results:
    """Full precision and every variant, those of one scheme together: they are what one compares."""

    full: dict[str, Any]
    full_bytes: int
    variants: list[Variant]

    @property
    def benchmarks(self) -> list[str]:
        return list(self.full["benchmarks"])

    @property
    def recipes(self) -> list[str]:
        return list(dict.fromkeys(variant.recipe["name"] for variant in self.variants))

    @property
    def schemes(self) -> list[str]:
        return list(dict.fromkeys(variant.scheme["name"] for variant in self.variants))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [self.full, *(variant.metrics for variant in self.variants)]


def read_results(variants: VariantParams, model: Path) -> Results:
    """Results of the variants that params.yaml names.

    Raises:
        FileNotFoundError: a stage has not run.
        ValueError: a file does not hold what its stage writes.
    """
    found = [read_variant(name) for name in variants.names]
    return Results(
        full=_read_json(EVALUATION / FULL / "metrics.json", "baseline"),
        full_bytes=weight_bytes(model),
        variants=sorted(found, key=lambda variant: variants.schemes.index(variant.scheme["name"])),
    )


def read_variant(name: str) -> Variant:
    """Raises: as ``read_results``."""
    path = MODELS / name / "calibration.json"
    report = _read_json(path, f"calibrate@{name}")
    missing = [key for key in ("recipe", "scheme", "groups") if key not in report]
    if missing:
        raise ValueError(f"{path}: has no {', '.join(missing)}; make it again with `dvc repro -f calibrate@{name}`")
    return Variant(
        name=name,
        recipe=report["recipe"],
        scheme=report["scheme"],
        metrics=_read_json(EVALUATION / name / "metrics.json", f"evaluate@{name}"),
        groups=_groups(report["groups"], path),
        weight_bytes=weight_bytes(MODELS / name),
    )


def _groups(rows: Sequence[Mapping[str, Any]], path: Path) -> pd.DataFrame:
    frame = pd.DataFrame.from_records(list(rows))
    missing = [name for name in REQUIRED if name not in frame]
    if missing:
        raise ValueError(f"{path}: its groups have no {', '.join(missing)}; run `dvc repro` with this version")
    frame = frame.reindex(columns=[*REQUIRED, *OPTIONAL])
    numbers = ("error_before", "error_after", "effective_tokens", *OPTIONAL)
    return frame.astype(dict.fromkeys(numbers, float))


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a checkpoint.

    Raises:
        FileNotFoundError: there are none.
    """
    for pattern in _WEIGHTS:
        sizes = [path.stat().st_size for path in folder.glob(pattern)]
        if sizes:
            return sum(sizes)
    raise FileNotFoundError(f"{folder}: no {' or '.join(_WEIGHTS)}; it must be a checkpoint directory")


def is_demo(benchmark: str) -> bool:
    """Whether it is one of the demo world's: these are never reported under a real benchmark's name."""
    return benchmark.startswith(_DEMO)


def scheme_title(scheme: Mapping[str, Any]) -> str:
    """`W3A16`."""
    return str(scheme["name"]).upper()


def scheme_words(scheme: Mapping[str, Any]) -> str:
    """`3-bit asymmetric weights in groups of 128, activations in full precision`."""
    symmetry = "symmetric" if scheme["symmetric"] else "asymmetric"
    size = scheme["group_size"]
    scales = "one scale per output channel" if size is None else f"groups of {size} input channels"
    bits = scheme["activation_bits"]
    activations = "full-precision activations" if bits is None else f"{bits}-bit activations, one scale per token"
    return f"{scheme['weight_bits']}-bit {symmetry} weights, {scales}; {activations}"


def size_unit(size: int) -> tuple[float, str]:
    """Divisor and name of the unit in which a size is best read."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return unit, name
    return 1e3, "kB"


def _read_json(path: Path, stage: str) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; run `dvc repro {stage}` first")
    content: dict[str, Any] = json.loads(path.read_text())
    return content
