"""The scores of a variant: the contents of metrics.json, summary.json and run.json, with load and save."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

#: Fields in nats or probabilities, rounded to six places; other floats are percentages, rounded to hundredths.
_FINE = ("nll", "kl", "kl_low", "kl_high", "mcnemar_p")


@dataclass(frozen=True)
class Part:
    """A sub-score: mean in [0, 1] or sum of points, and the number of items."""

    value: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """One benchmark, or the mean over benchmarks, of one variant, in percent; nll and kl are in nats per token.

    ``n`` of the ``asked`` items were scored, and ``pairs`` of them also in full precision. A field is None if it was
    not compared or measured.
    """

    score: float
    low: float
    high: float
    n: int
    asked: int
    pairs: int | None = None
    retention: float | None = None
    retention_low: float | None = None
    retention_high: float | None = None
    lost: int | None = None
    gained: int | None = None
    mcnemar_p: float | None = None
    nll: float | None = None
    kl: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Parse an entry. Raises ValueError for a missing or unknown key, or a value that is not a number."""
        known = {each.name for each in fields(cls)}
        if unknown := values.keys() - known:
            raise ValueError(f"unknown key {', '.join(sorted(unknown))}")
        if missing := [name for name in ("score", "low", "high", "n", "asked") if values.get(name) is None]:
            raise ValueError(f"no {', '.join(missing)}")
        numbers = {name: value for name, value in values.items() if name != "parts" and value is not None}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} is {value!r}, needs a number")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def rounded(self) -> Self:
        """Round percentages to hundredths, nats and p-values to six places."""
        rounded: dict[str, Any] = {
            name: round(value, 6 if name in _FINE else 2)
            for name, value in self.to_dict().items()
            if isinstance(value, float)
        }
        return replace(self, **rounded)

    @property
    def flips(self) -> float | None:
        """Percent of the pairs that went from right to wrong or from wrong to right."""
        if self.lost is None or self.gained is None or not self.pairs:
            return None
        return 100 * (self.lost + self.gained) / self.pairs

    @property
    def retention_interval(self) -> tuple[float, float, float] | None:
        """Retention, its low end and its high end; None without a retention."""
        if self.retention is None or self.retention_low is None or self.retention_high is None:
            return None
        return self.retention, self.retention_low, self.retention_high

    @property
    def score_text(self) -> str:
        """``71.2 ± 2.1 (598/600)``: score, half of its interval, and the numbers of items if some are missing."""
        missing = f" ({self.n}/{self.asked})" if self.n < self.asked else ""
        return f"{self.score:.1f} ± {(self.high - self.low) / 2:.1f}{missing}"

    @property
    def retention_text(self) -> str | None:
        """``98.0 ± 1.0``: retention and half of its interval; None without a retention."""
        if self.retention_interval is None:
            return None
        retention, low, high = self.retention_interval
        return f"{retention:.1f} ± {(high - low) / 2:.1f}"

    @property
    def kl_text(self) -> str | None:
        """``0.0408 ± 0.0163``: KL and half of its interval; without an interval KL alone, None without KL."""
        if self.kl is None:
            return None
        if self.kl_low is None or self.kl_high is None or self.kl_low == self.kl_high:
            return f"{self.kl:.4f}"
        return f"{self.kl:.4f} ± {(self.kl_high - self.kl_low) / 2:.4f}"

    @property
    def kl_interval_text(self) -> str | None:
        """``0.0245 to 0.0571``: low and high end of the interval of KL; None without an interval."""
        if self.kl_low is None or self.kl_high is None:
            return None
        return f"{self.kl_low:.4f} to {self.kl_high:.4f}"


@dataclass(frozen=True)
class BenchmarkMetrics(Comparison):
    """One benchmark in metrics.json.

    Attributes:
        skipped: chosen items that were not scored.
        empty_replies: number of empty replies; None in files of older versions.
        parts: sub-scores by name.
    """

    skipped: int = 0
    empty_replies: int | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        parts = {name: Part(**part) for name, part in values.get("parts", {}).items()}
        return super().from_dict({**values, "parts": parts})


@dataclass(frozen=True)
class Metrics:
    """evaluation/<variant>/metrics.json: every benchmark and their mean."""

    variant: str
    benchmarks: Mapping[str, BenchmarkMetrics]
    mean: Comparison

    @property
    def entries(self) -> Iterator[tuple[str, Comparison]]:
        """``mean`` first, then every benchmark by name."""
        yield "mean", self.mean
        yield from self.benchmarks.items()

    def entry(self, name: str) -> Comparison:
        """The metrics of a benchmark or of ``mean``."""
        return self.mean if name == "mean" else self.benchmarks[name]

    def to_dict(self) -> dict[str, Any]:
        benchmarks = {name: entry.to_dict() for name, entry in self.benchmarks.items()}
        return {"variant": self.variant, "benchmarks": benchmarks, "mean": self.mean.to_dict()}

    def summary(self) -> Summary:
        """The content of summary.json."""
        return Summary(
            score=self.mean.score,
            benchmarks={name: entry.score for name, entry in self.benchmarks.items()},
            retention=self.mean.retention,
            kl=self.mean.kl,
            nll=self.mean.nll,
            n=self.mean.n,
            skipped=sum(entry.skipped for entry in self.benchmarks.values()),
        )

    def save(self, path: Path) -> None:
        _write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that ``save`` has written. Raises ValueError, with path and entry, for any other content."""
        content = json.loads(path.read_text())
        try:
            variant, benchmarks, mean = (content[key] for key in ("variant", "benchmarks", "mean"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: no {error}; evaluate the variant again") from error
        try:
            name = "mean"
            overall = Comparison.from_dict(mean)
            entries = {}
            for name, values in benchmarks.items():
                entries[name] = BenchmarkMetrics.from_dict(values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: {name}: {error}; evaluate the variant again") from error
        return cls(variant, entries, overall)


@dataclass(frozen=True)
class Summary:
    """evaluation/<variant>/summary.json: one readable row of ``dvc metrics show``."""

    score: float
    benchmarks: Mapping[str, float]
    n: int
    skipped: int
    retention: float | None = None
    kl: float | None = None
    nll: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """One flat row without the values that were not measured."""
        measured = {"retention": self.retention, "kl": self.kl, "nll": self.nll}
        known = {name: value for name, value in measured.items() if value is not None}
        return {"score": self.score, **self.benchmarks, **known, "n": self.n, "skipped": self.skipped}

    def save(self, path: Path) -> None:
        _write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that ``save`` has written. Raises ValueError if a number is missing."""
        content: dict[str, Any] = json.loads(path.read_text())
        names = [each.name for each in fields(cls) if each.name != "benchmarks"]
        if missing := [name for name in ("score", "n", "skipped") if name not in content]:
            raise ValueError(f"{path}: no {', '.join(missing)}; evaluate the variant again")
        known = {name: content[name] for name in names if name in content}
        return cls(benchmarks={name: value for name, value in content.items() if name not in names}, **known)


@dataclass(frozen=True)
class EvaluationRun:
    """evaluation/<variant>/run.json: when, where and how fast the items were answered.

    It is a file of its own, because metrics.json has the same bytes whenever an evaluation is repeated.

    Attributes:
        finished: UTC date and time of the end, ``2026-11-27T06:24:42Z``.
        device: name of the device.
        backend: ``hf`` or ``vllm``.
        items: items answered in this run; those of an interrupted run before it are not counted.
        seconds: time for these items: replies, reference answers and scores, without loading the model.
        peak_memory_bytes: peak of allocated memory on a GPU, of resident memory of the process on a CPU; None if it was
            not measured.
    """

    finished: str
    device: str
    backend: str
    items: int
    seconds: float
    peak_memory_bytes: int | None = None

    @property
    def items_per_second(self) -> float | None:
        """None if an interrupted run before this one had answered all items."""
        return self.items / self.seconds if self.items and self.seconds else None

    def save(self, path: Path) -> None:
        _write_json(asdict(self), path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that ``save`` has written. Raises ValueError, with the path, for any other content."""
        try:
            return cls(**json.loads(path.read_text()))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}; evaluate the variant again") from error


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write to a temporary file, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
