"""Section `evaluate` of params.yaml: also read by stages that score nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.data import BenchmarkSource


@dataclass(frozen=True)
class EvaluateParams:
    """Section `evaluate` of params.yaml.

    Attributes:
        benchmarks: what to run, see BenchmarkSource.
        data: folder that all local benchmark files are in: what DVC watches; None where DVC does not run the stage.
        limit: items per benchmark, None for all; `seed` chooses them, the same ones for every variant.
        batch_size: items at a time, halved when memory runs out; `auto` starts with 32 on a CPU and 256 on a GPU.
        max_new_tokens: upper bound on the tokens that a benchmark lets a reply have, None for the benchmark's own.
        min_pixels, max_pixels: bounds on image size, None for the processor's own.
        dtype: of the computation; `auto` is the checkpoint's own.
        backend: `hf`, or `vllm` where that package is installed.
        divergence: measure NLL and KL on the reference answers.
        divergence_limit: answers measured per benchmark, None for all (full precision stores vocabulary-size rows).
        resamples: of the bootstrap.
        max_skipped: share of items that may be unusable before the run is refused.
    """

    benchmarks: tuple[BenchmarkSource, ...]
    data: str | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int | Literal["auto"] = "auto"
    max_new_tokens: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    backend: Literal["hf", "vllm"] = "hf"
    divergence: bool = True
    divergence_limit: int | None = None
    resamples: int = 2000
    max_skipped: float = 0.05

    def __post_init__(self) -> None:
        if not self.benchmarks:
            raise ValueError("benchmarks is empty; name at least one")
        for source in self.benchmarks:
            if self.data and source.data and not Path(source.data).is_relative_to(self.data):
                raise ValueError(
                    f"{source.task}: {source.data} is outside evaluate.data = {self.data}, the folder that DVC "
                    "watches; move it there, or set evaluate.data to a folder that holds all local benchmark files"
                )
        for name in ("limit", "batch_size", "max_new_tokens", "divergence_limit", "resamples"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.max_skipped <= 1:
            raise ValueError(f"max_skipped is {self.max_skipped}; it is a share between 0 and 1")
