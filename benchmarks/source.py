"""Which benchmark to run: the type of an entry of `evaluate.benchmarks`, without what reads its rows."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BenchmarkSource:
    """Which benchmark to run, and where its rows are if not where the YAML says.

    `data` is a local parquet file, or a folder whose parquet files are taken together in the order of their names; it
    excludes the hub fields. `limit` overrides the evaluation's own;
    `suffix` replaces the instruction after the question.
    """

    task: str
    data: str | None = None
    hub: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str | None = None
    limit: int | None = None
    suffix: str | None = None
