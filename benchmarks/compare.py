"""Compare a variant with full precision on the same items.

- Score: mean over items, in percent, with a bootstrap interval.
- Retention: variant's mean as a percentage of full precision's, both over the items that the two share; its interval
  resamples items in pairs, so that the difficulty of an item cancels out.
- Flips: items right in full precision and wrong in the variant (``lost``), and the other way round (``gained``); an
  item is right from a score of 0.5. Exact McNemar test: without a difference each flip is a fair coin.
- KL: mean over answer tokens; each item's KL is already a comparison with full precision, so its interval resamples
  items, each with all its tokens.
- Mean over benchmarks: every benchmark has the same weight; the interval resamples within each benchmark.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from benchmarks.results import Comparison, Metrics

FULL = "full"
RIGHT = 0.5
INTERVAL = (2.5, 97.5)
# Maximum of resamples times items in memory at a time.
CHUNK = 4_000_000

Floats = npt.NDArray[np.float64]


def mcnemar_p(lost: int, gained: int) -> float:
    """Two-sided exact McNemar test: p-value of a split at least as uneven in lost + gained fair coin flips."""
    if not lost + gained:
        return 1.0
    from scipy.stats import binomtest  # a second, which runs without two variants to compare save

    return float(binomtest(lost, lost + gained).pvalue)


def resampled_means(scores: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Bootstrap means [resamples, columns] of scores [items, columns]; whole rows are drawn with replacement."""
    n = len(scores)
    step = max(1, CHUNK // n)
    chunks = [
        scores[rng.integers(0, n, size=(min(step, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, step)
    ]
    return np.concatenate(chunks)


def compare(
    items: pd.DataFrame, asked: Mapping[str, int], full: pd.DataFrame | None, resamples: int, seed: int
) -> dict[str, Comparison]:
    """Compare a variant on every benchmark and on their ``mean``.

    Args:
        items, full: records with columns task, doc, score, n_answer_tokens, nll, kl. ``full`` is None if ``items`` are
            those of full precision.
        asked: number of chosen items, by task.
        resamples, seed: number of resamples and seed of the bootstrap.
    """
    rng = np.random.default_rng(seed)
    benchmarks: dict[str, Comparison] = {}
    own_means, pair_means = [], []
    for task, n_asked in asked.items():
        rows = items[items["task"] == task].sort_values("doc")
        reference = None if full is None else full[full["task"] == task]
        benchmark, own, pair = _compare_benchmark(rows, n_asked, reference, resamples, rng)
        benchmarks[task] = benchmark
        own_means.append(own)
        pair_means.append(pair)
    pairs = None if full is None else np.mean(np.stack(pair_means), axis=0)
    benchmarks["mean"] = _mean(list(benchmarks.values()), np.mean(np.stack(own_means), axis=0), pairs, full, items)
    return benchmarks if full is None else _with_kl_intervals(benchmarks, items, resamples, seed)


def _compare_benchmark(
    rows: pd.DataFrame, asked: int, full: pd.DataFrame | None, resamples: int, rng: np.random.Generator
) -> tuple[Comparison, Floats, Floats]:
    """One benchmark, its resampled means [resamples], and the resampled means of the pairs [resamples, 2]."""
    scores = rows["score"].to_numpy(float)
    own = resampled_means(scores[:, None], resamples, rng)[:, 0]
    low, high = _interval(100 * own)
    base = Comparison(
        100 * scores.mean(), low, high, len(rows), asked, nll=_per_token(rows, "nll"), kl=_per_token(rows, "kl")
    )
    if full is None:
        return base, own, np.empty((0, 2))
    both = rows.merge(full[["doc", "score"]], on="doc", suffixes=("", "_full")).sort_values("doc")
    if both.empty:
        raise ValueError(
            f"{rows['task'].iloc[0]}: no item in common with full precision; evaluate `full` with these params"
        )
    pair = both[["score", "score_full"]].to_numpy(float)
    means = resampled_means(pair, resamples, rng)
    right = pair >= RIGHT
    lost, gained = int((right[:, 1] & ~right[:, 0]).sum()), int((right[:, 0] & ~right[:, 1]).sum())
    compared = replace(base, pairs=len(both), lost=lost, gained=gained, mcnemar_p=mcnemar_p(lost, gained))
    return _with_retention(compared, pair.mean(axis=0), means), own, means


def _mean(
    benchmarks: Sequence[Comparison],
    own: Floats,
    resampled: Floats | None,
    full: pd.DataFrame | None,
    items: pd.DataFrame,
) -> Comparison:
    """Macro average: the mean of scores, of NLL and of KL; retention is that of the mean scores."""
    low, high = _interval(100 * own)
    base = Comparison(
        score=_average([b.score for b in benchmarks]) or 0.0,
        low=low,
        high=high,
        n=sum(b.n for b in benchmarks),
        asked=sum(b.asked for b in benchmarks),
        nll=_average([b.nll for b in benchmarks]),
        kl=_average([b.kl for b in benchmarks]),
    )
    if full is None or resampled is None:
        return base
    lost, gained = sum(b.lost or 0 for b in benchmarks), sum(b.gained or 0 for b in benchmarks)
    both = items.merge(full[["task", "doc", "score"]], on=["task", "doc"], suffixes=("", "_full"))
    means = both.groupby("task")[["score", "score_full"]].mean().mean().to_numpy(float)
    pairs = sum(b.pairs or 0 for b in benchmarks)
    compared = replace(base, pairs=pairs, lost=lost, gained=gained, mcnemar_p=mcnemar_p(lost, gained))
    return _with_retention(compared, means, resampled)


def _with_retention(comparison: Comparison, means: Floats, resampled: Floats) -> Comparison:
    """Add the percentage of full precision: means [2], resampled [resamples, 2], columns variant and full precision."""
    if means[1] == 0:
        return comparison
    usable = resampled[resampled[:, 1] > 0]
    low, high = _interval(100 * usable[:, 0] / usable[:, 1])
    retention = float(100 * means[0] / means[1])
    return replace(comparison, retention=retention, retention_low=low, retention_high=high)


def _with_kl_intervals(
    benchmarks: Mapping[str, Comparison], items: pd.DataFrame, resamples: int, seed: int
) -> dict[str, Comparison]:
    """Add the interval of KL to every benchmark that has KL, and to the mean if all benchmarks have it."""
    rng = np.random.default_rng((seed, 1))  # its own stream: intervals of scores are the same with and without KL
    resampled = {
        task: _resampled_kl(items[items["task"] == task].sort_values("doc"), resamples, rng)
        for task, comparison in benchmarks.items()
        if task != "mean" and comparison.kl is not None
    }
    if benchmarks["mean"].kl is not None:
        resampled["mean"] = np.mean(np.stack(list(resampled.values())), axis=0)
    intervals = {name: _interval(values) for name, values in resampled.items()}
    return {
        name: replace(comparison, kl_low=intervals[name][0], kl_high=intervals[name][1])
        if name in intervals
        else comparison
        for name, comparison in benchmarks.items()
    }


def _resampled_kl(rows: pd.DataFrame, resamples: int, rng: np.random.Generator) -> Floats:
    """Resampled KL per token [resamples]: the ratio of the mean KL of a reply to its mean number of tokens."""
    usable = _measured(rows, "kl")
    tokens = usable["n_answer_tokens"].to_numpy(float)
    sums = np.stack([usable["kl"].to_numpy(float) * tokens, tokens], axis=1)
    means = resampled_means(sums, resamples, rng)
    ratios: Floats = means[:, 0] / means[:, 1]
    return ratios


def _per_token(rows: pd.DataFrame, name: str) -> float | None:
    """Mean NLL or KL over the tokens of all answers, with equal weight per token; None without a measured answer."""
    usable = _measured(rows, name)
    tokens = usable["n_answer_tokens"]
    return float((usable[name] * tokens).sum() / tokens.sum()) if len(usable) else None


def _measured(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """The items whose reference answer was measured."""
    return rows[(rows["n_answer_tokens"] > 0) & rows[name].notna()]


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, INTERVAL)
    return float(low), float(high)


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) and known else None


# --- Table ----------------------------------------------------------------------------------------


def scores_table(metrics: Sequence[Metrics]) -> str:
    """Table of variants for the terminal; full precision is first, the rest keeps its order.

    If fewer items were scored than chosen, both numbers are shown: "71.2 ± 2.1 (598/600)".
    """
    ordered = sorted(metrics, key=lambda each: each.variant != FULL)
    if not ordered:
        return "no variants"
    tasks = list(ordered[0].benchmarks)
    header = ["variant", *tasks, "mean", "retention %", "KL", "NLL"]
    lines = [header, *(_line(each, tasks) for each in ordered)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                  for column, (cell, width) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )  # fmt: skip


def _line(metrics: Metrics, tasks: Sequence[str]) -> list[str]:
    scores = [metrics.benchmarks[task].score_text if task in metrics.benchmarks else "-" for task in tasks]
    mean = metrics.mean
    return [
        metrics.variant,
        *scores,
        mean.score_text,
        mean.retention_text or "-",
        mean.kl_text or "-",
        "-" if mean.nll is None else f"{mean.nll:.4f}",
    ]
