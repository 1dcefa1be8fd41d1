"""Read the results of the other stages once: scores, calibration reports and sizes of every variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd

from benchmarks.compare import FULL
from benchmarks.results import Comparison, EvaluationRun, Metrics
from tasks.config.sections import VariantParams
from tasks.files import EVALUATION, MODELS, existing
from tlq.models.linear_groups import kind_of
from tlq.quantization.formats import FULL_PRECISION, Scheme
from tlq.recipes import Recipe
from tlq.results import CalibrationReport, GroupReport

_MEASURED = ("error_before", "error_after", "effective_tokens", "seconds", "peak_memory_bytes")
#: Fields of ``GroupReport`` that the report shows.
GROUP_COLUMNS = ("layer", "group", "alpha", "duo", "tokens", *_MEASURED)

_WEIGHTS = ("*.safetensors", "*.bin")
_DEMO = "demo_"


@dataclass(frozen=True)
class ExpertGroups:
    """Linear groups of experts, and those of them that the router sends too few tokens.

    Attributes:
        count, few: numbers of groups.
        least: the fewest effective tokens that the router sends to one of them.
    """

    count: int
    few: int
    least: float

    @classmethod
    def of(cls, groups: Sequence[GroupReport]) -> ExpertGroups | None:
        """None without experts, and for a recipe that needs no data."""
        routed = [group for group in groups if group.routed_effective_tokens is not None]
        if not routed:
            return None
        least = min(group.routed_effective_tokens or 0.0 for group in routed)
        return cls(len(routed), sum(group.further_tokens > 0 for group in routed), least)

    def __str__(self) -> str:
        return (
            f"{self.few} of {self.count} linear groups of experts got further tokens; the router sends one of them "
            f"{self.least:.4g} effective tokens"
        )


@dataclass(frozen=True)
class Variant:
    """One quantized model.

    Attributes:
        name: <recipe>-<scheme>, the folder of its checkpoint.
        recipe, scheme: recipe and scheme that the variant was made with.
        metrics: evaluation/<name>/metrics.json.
        groups: a row per layer and linear group, see ``group_table``; unmeasured values are missing.
        experts: of a model with experts, how many groups of experts there are, and how many got further tokens.
        weight_bytes: size of the weight files.
        run: evaluation/<name>/run.json; None if an older version evaluated the variant.
        carried_over: number of tensors that the model does not name, which the checkpoint has as they were.
    """

    name: str
    recipe: Recipe
    scheme: Scheme
    metrics: Metrics
    groups: pd.DataFrame
    weight_bytes: int
    run: EvaluationRun | None = None
    experts: ExpertGroups | None = None
    carried_over: int = 0

    @property
    def mean(self) -> Comparison:
        return self.metrics.mean

    @property
    def has_errors(self) -> bool:
        """Whether calibration measured errors; recipes that need no data measure none."""
        return bool(self.groups["error_after"].notna().any())

    @property
    def has_exponents(self) -> bool:
        return self.recipe.equalization.method != "none"

    @property
    def error_unit(self) -> str:
        """Unit of the errors of this variant; errors in different units cannot be compared."""
        equalization = self.recipe.equalization
        place = {"linears": "the group's linears", "parent": "the parent module"}[equalization.error]
        return f"{ {'l2': 'squared', 'l1': 'absolute'}[equalization.norm] } error at the output of {place}"


@dataclass(frozen=True)
class Results:
    """Results of full precision and of every variant, with the variants of one scheme next to each other."""

    full: Metrics
    full_bytes: int
    variants: list[Variant]
    full_run: EvaluationRun | None = None

    @property
    def evaluated(self) -> str | None:
        """``2026-11-27 06:24 UTC``: the end of the newest evaluation; None if no evaluation has a date."""
        runs = [self.full_run, *(variant.run for variant in self.variants)]
        newest = max((run.finished for run in runs if run is not None), default=None)
        return None if newest is None else f"{datetime.fromisoformat(newest):%Y-%m-%d %H:%M} UTC"

    @property
    def benchmarks(self) -> list[str]:
        return list(self.full.benchmarks)

    @property
    def recipes(self) -> list[str]:
        return list(dict.fromkeys(variant.recipe.name for variant in self.variants))

    @property
    def schemes(self) -> list[str]:
        return list(dict.fromkeys(variant.scheme.name for variant in self.variants))

    @property
    def metrics(self) -> list[Metrics]:
        return [self.full, *(variant.metrics for variant in self.variants)]


def read_results(variants: VariantParams, model: Path) -> Results:
    """Results of the variants that params.yaml names.

    Raises:
        FileNotFoundError: a stage has not run.
        ValueError: a file does not hold what its stage writes.
    """
    read = [read_variant(name) for name in variants.names]
    return Results(
        full=read_metrics(FULL),
        full_bytes=weight_bytes(model),
        variants=sorted(read, key=lambda variant: variants.schemes.index(variant.scheme.name)),
        full_run=read_run(FULL),
    )


def read_variant(name: str) -> Variant:
    """Results of one variant. Raises: as ``read_results``."""
    report = read_calibration(name)
    return Variant(
        name=name,
        recipe=report.recipe,
        scheme=report.scheme,
        metrics=read_metrics(name),
        groups=group_table(report.groups),
        weight_bytes=weight_bytes(MODELS / name),
        run=read_run(name),
        experts=ExpertGroups.of(report.groups),
        carried_over=len(report.carried_over),
    )


def group_table(groups: Sequence[GroupReport]) -> pd.DataFrame:
    """A row per layer and linear group, columns GROUP_COLUMNS; experts of a layer are one row for each of their groups.

    Of experts: mean exponent, errors and effective tokens, the sum of tokens and seconds.
    """
    table = pd.DataFrame([asdict(group) for group in groups], columns=list(GROUP_COLUMNS))
    table = table.astype(dict.fromkeys(_MEASURED, float))
    kinds = table["group"].map(kind_of)
    if (kinds == table["group"]).all():
        return table
    how = dict.fromkeys(GROUP_COLUMNS[2:], "mean")
    how |= {"duo": "any", "tokens": "sum", "seconds": "sum", "peak_memory_bytes": "max"}
    grouped = table.assign(group=kinds).groupby(["layer", "group"], sort=False, as_index=False)
    return grouped.agg(how)[list(GROUP_COLUMNS)]


def read_metrics(name: str) -> Metrics:
    """evaluation/<name>/metrics.json of a variant or of full precision. Raises: as ``read_results``."""
    stage = "baseline" if name == FULL else f"evaluate@{name}"
    return Metrics.load(existing(EVALUATION / name / "metrics.json", stage))


def read_run(name: str) -> EvaluationRun | None:
    """evaluation/<name>/run.json; None if an older version made the evaluation. Raises: as ``read_results``."""
    path = EVALUATION / name / "run.json"
    return EvaluationRun.load(path) if path.exists() else None


def read_calibration(name: str) -> CalibrationReport:
    """calibration.json of a variant. Raises: as ``read_results``."""
    return CalibrationReport.load(existing(MODELS / name / "calibration.json", f"calibrate@{name}"))


def weight_bytes(folder: Path) -> int:
    """Bytes of the weight files of a checkpoint.

    Raises:
        FileNotFoundError: the folder has no weight files.
    """
    for pattern in _WEIGHTS:
        sizes = [path.stat().st_size for path in folder.glob(pattern)]
        if sizes:
            return sum(sizes)
    raise FileNotFoundError(f"{folder}: no {' or '.join(_WEIGHTS)}; it must be a checkpoint directory")


def is_demo(benchmark: str) -> bool:
    """Whether a benchmark belongs to the demo world; its scores are never reported under a real benchmark's name."""
    return benchmark.startswith(_DEMO)


def scheme_title(scheme: Scheme) -> str:
    """`W3A16`."""
    return scheme.name.upper()


def scheme_words(scheme: Scheme) -> str:
    """A scheme in words: `3-bit asymmetric weights, groups of 128 input channels; full-precision activations`."""
    if scheme.is_mix:
        kept = ", and of full precision" if FULL_PRECISION in dict(scheme.overrides).values() else ""
        return f"a mix of symmetric weights with {scheme.bits_in_words} bits{kept}; full-precision activations"
    symmetry = "symmetric" if scheme.symmetric else "asymmetric"
    size, bits = scheme.group_size, scheme.activation_bits
    scales = "one scale per output channel" if size is None else f"groups of {size} input channels"
    activations = "full-precision activations" if bits is None else f"{bits}-bit activations, one scale per token"
    return f"{scheme.weight_bits}-bit {symmetry} weights, {scales}; {activations}"


def size_unit(size: int) -> tuple[float, str]:
    """Divisor and name of the unit that suits a size."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return unit, name
    return 1e3, "kB"
