"""Record in MLflow where a result comes from: tags of a run, and its data sets."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pyarrow.parquet as pq
import torch

from benchmarks.data import BenchmarkSource
from tasks.files import CALIBSET, PREPARED
from tasks.registry.lineage import read_lineage
from tlq.quantization.formats import Scheme
from tlq.recipes import Recipe

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

_CONTEXT = "mlflow.data.context"


def machine() -> dict[str, str]:
    """Tags that describe this machine."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "hardware.cpu": _cpu_model(),
        "hardware.cores": str(os.cpu_count()),
        "hardware.memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
        "hardware.gpus": ", ".join(gpus) or "none",
    }


def _cpu_model() -> str:
    """Name of the processor, or its architecture if the system gives no name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def lineage(variant: str) -> dict[str, str]:
    """Tags that say what ``variant`` was made with: git commit, changed files, package versions, DVC hashes."""
    found = read_lineage([variant])
    tags = {"git_commit": found.commit or "", "git_dirty": str(bool(found.changed))}
    if found.changed:
        tags["git_changed"] = ", ".join(found.changed)
    tags |= {f"version.{name}": number for name, number in found.versions.items()}
    return tags | {f"dvc.{output.path}": output.md5 for output in found.outputs}


def calibration_inputs(recipe: Recipe, scheme: Scheme | None = None) -> list[DatasetInput]:
    """The data sets that a recipe calibrates on for a scheme; without one, for some scheme.

    Files that are missing (after ``dvc pull models``) are left out.
    """
    paths = {}
    if recipe.needs_data(scheme):
        paths["calibration"] = PREPARED / "calibration.parquet"
        if recipe.tokens == "set":
            paths["tokens"] = CALIBSET / "tokens.parquet"
    return [_local(name, path, "calibration") for name, path in paths.items() if path.exists()]


def benchmark_inputs(sources: Sequence[BenchmarkSource]) -> list[DatasetInput]:
    """The data sets that a variant is scored on; local files that are missing are left out."""
    return list(_benchmark_inputs(sources))


def _benchmark_inputs(sources: Sequence[BenchmarkSource]) -> Iterator[DatasetInput]:
    for source in sources:
        if source.data is None:
            yield _hub(source)
        elif Path(source.data).exists():
            yield _local(source.task, Path(source.data), "evaluation")


def benchmark_digest(source: BenchmarkSource) -> str:
    """Digest of a benchmark's rows if the file is local, else of the choice of rows from the hub."""
    if source.data is not None and Path(source.data).exists():
        return file_digest(Path(source.data))
    place = [source.data, source.hub, source.subset, source.revision, source.split]
    return hashlib.md5(json.dumps([source.task, *place]).encode(), usedforsecurity=False).hexdigest()


def file_digest(path: Path) -> str:
    """MD5 of a file, the hash that DVC uses; cached by path, size and modification time."""
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _file_digest(path: Path, _size: int, _mtime: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _local(name: str, path: Path, context: str) -> DatasetInput:
    """Data set of a parquet file, with its digest and its number of rows."""
    rows = pq.read_metadata(path).num_rows
    source = {"uri": str(path.resolve())}
    profile = {"num_rows": rows, "size_bytes": path.stat().st_size}
    return _input(name, file_digest(path), "local", source, profile, context)


def _hub(source: BenchmarkSource) -> DatasetInput:
    """Data set of the Hugging Face hub."""
    fields = {
        "path": source.hub or _hub_id(source.task),
        "config_name": source.subset,
        "split": source.split,
        "revision": source.revision,
    }
    return _input(source.task, benchmark_digest(source), "hugging_face", fields, None, "evaluation")


def _hub_id(task: str) -> str:
    """The data set that a benchmark's YAML names."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    from benchmarks.harness import FOLDER

    entry = TaskManager(include_path=str(FOLDER), include_defaults=False).task_index[task]
    return str(load_yaml(entry.yaml_path)["dataset_path"])


def _input(
    name: str, digest: str, kind: str, source: dict[str, Any], profile: dict[str, Any] | None, context: str
) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=name,
        digest=digest,
        source_type=kind,
        source=json.dumps(source),
        profile=None if profile is None else json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag(_CONTEXT, context)])
