"""The demo's calibration samples, and evaluation on its held-out items: score, KL and NLL against full precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from transformers import PreTrainedModel

from benchmarks.data import BenchmarkSource
from benchmarks.divergence import AnswerMeter, ReferenceReader, ReferenceRecorder
from benchmarks.harness import Benchmark, load_benchmarks, run_benchmarks
from benchmarks.items import AnswerOptions
from tasks.command import device
from tasks.config.sections import Columns, PrepareParams
from tasks.stages.prepare import draw, read_table
from tlq.export.loading import load_model
from tlq.models.checkpoint import checkpoint_dtype_of, read_config
from tlq.models.processor import load_processor
from tlq.samples import Sample

MODEL = Path("data/demo/model")
WORLD = Path("data/demo/world")


#: The four kinds of question in the demo world: sources of calibration samples, and benchmarks.
SOURCES = ("demo-signs", "demo-chart", "demo-text", "demo-shapes")
BENCHMARKS = ("textvqa", "chartqa", "ocrbench", "mmmu")


def calibration_samples(size: int, seed: int = 0, sources: Sequence[str] = SOURCES) -> list[Sample]:
    """Samples of the demo world, drawn with a seed as stage ``prepare`` draws them, and only those of ``sources``."""
    path = WORLD / "calibration.parquet"
    drawn = size if set(sources) == set(SOURCES) else pq.read_metadata(path).num_rows
    params = PrepareParams(
        kind="parquet", path=str(path), samples=drawn, seed=seed, columns=Columns(id="id", source="source")
    )
    return [sample for sample in draw(*read_table(params), params)[0] if sample.source in sources][:size]


class Laboratory:
    """The full-precision demo model, its held-out items, and its answers to them.

    Attributes:
        checkpoint_dtype: dtype of the stored weights.
        full: score, NLL, KL and number of items of full precision.
    """

    def __init__(self, items: int, folder: Path, model: Path = MODEL, benchmarks: Sequence[str] = BENCHMARKS) -> None:
        self.model = load_model(model, torch.float32, device())
        self.processor = load_processor(model)
        self.checkpoint_dtype = checkpoint_dtype_of(read_config(model), model)
        sources = [BenchmarkSource(f"demo_{name}", str(WORLD / f"{name}.parquet")) for name in benchmarks]
        self.benchmarks: dict[str, Benchmark] = load_benchmarks(sources, items, seed=0)
        self.reference = folder / "reference"
        self.full = self.measure(self.model, ReferenceRecorder(self.reference))

    @cached_property
    def reader(self) -> ReferenceReader:
        return ReferenceReader(self.reference)

    def measure(self, model: PreTrainedModel, meter: AnswerMeter) -> dict[str, float]:
        """Score in percent, NLL and KL in nats per answer token: means over benchmarks."""
        results = run_benchmarks(self.benchmarks, model, self.processor, AnswerOptions(64, meter=meter))
        frames = [pd.DataFrame([asdict(item) for item in result.items]) for result in results]
        means = [(100 * frame["score"].mean(), frame["nll"].mean(), frame["kl"].mean()) for frame in frames]
        score, nll, kl = np.mean(means, axis=0)
        return {"score": float(score), "nll": float(nll), "kl": float(kl), "items": sum(map(len, frames))}
