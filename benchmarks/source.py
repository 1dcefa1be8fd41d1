"""The type of an entry of `evaluate.benchmarks`, without the code that reads its rows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchmarkSource:
    """A benchmark to run, and the source of its rows if it is not the YAML's.

    `data` is a local parquet file, or a folder whose parquet files are concatenated in the order of their names; it
    excludes the hub fields. `limit` overrides the evaluation's limit. `suffix` replaces the instruction after the
    question.
    """

    task: str
    data: str | None = None
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str | None = None
    limit: int | None = None
    suffix: str | None = None
