"""Which recipe, which scheme: the page docs/which.md, from the defaults' rows of bench/results/ablation.csv.

python -m bench.ablation --only default --schemes w4a16 w4a16s --seeds 0 1 2
python -m bench.which
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from bench.ablation import SUBJECTS
from bench.ablation_page import half_width, results_of
from bench.sections import table, write_section
from tlq.export.engines import ENGINES
from tlq.quantization.formats import get_scheme
from tlq.recipes import RECIPES

PAGE = Path("docs/which.md")
PICTURE = PAGE.with_suffix(".png")
_SCHEMES = ("w4a16", "w4a16s")
#: Schemes of one number of bits, and mixes, with the choice of the study that is shown.
_UNIFORM = {"w2a16": "ranges", "w3a16s": "default", "w3a16": "default", "w4a16s": "default", "w4a16": "default"}
#: The interval of two seeds is too wide to show anything.
_LEAST_SEEDS = 3
#: Rows of one group each whose zero-points fill whole bytes.
_ROWS = 8
_MIXES = dict.fromkeys(("mix2.5", "mix3", "mix3.125", "mix3.5"), "shipped")
_SERVED = ("w4a16", "w4a16s", "q4_0", "w4a8", "w8a8", "w3a16", "w2a16")


def main() -> int:
    runs = pd.read_csv(SUBJECTS["qwen2_vl"].results)
    runs = runs[(runs["factor"] == "default") & runs["scheme"].isin(_SCHEMES)]
    rows = []
    for recipe in RECIPES:
        row = {"recipe": f"`{recipe}`"}
        for scheme in _SCHEMES:
            kl = runs[(runs["recipe"] == recipe) & (runs["scheme"] == scheme)]["kl"].to_numpy()
            row[scheme] = f"{kl.mean():.4f} ± {half_width(kl.std(ddof=1), len(kl)):.4f}" if len(kl) else ""
        rows.append(row)
    seeds, items = runs.groupby(["recipe", "scheme"])["seed"].nunique().min(), int(runs["items"].iloc[0])
    full = pd.read_csv(SUBJECTS["qwen2_vl"].results).query("recipe == 'full'").iloc[0]
    explanation = (
        f"KL divergence from full precision in nats per answer token, mean and 95 % interval (Student's t) over "
        f"{seeds} calibration seeds, on {items} held-out items of the demo model. Full precision "
        f"scores {full.score:.1f} %. "
        "`rtn` uses no data, so its seeds are equal."
    )
    write_section(PAGE, "Error", [explanation, "", *table(rows)], "Which recipe, which scheme")
    served = [
        {
            "scheme": f"`{name}`",
            "bits per weight": f"{_bits(name):.2f}",
            **{engine.title: engine.of(get_scheme(name)).runs for engine in ENGINES.values()},
        }
        for name in _SERVED
    ]
    write_section(PAGE, "Size, and who runs it", table(served), "Which recipe, which scheme")
    write_section(PAGE, "A size in place of a number of bits", sizes(), "Which recipe, which scheme")
    return 0


def sizes() -> list[str]:
    """KL by size, of `tlq-c` with one number of bits and with a budget; draws the picture too."""
    rows, curves = [], {}
    for name, subject in SUBJECTS.items():
        if (found := results_of(subject)) is None:
            continue
        found = found[found["recipe"] == "tlq-c"].astype({"kl": float})
        uniform, mixes = (_curve(found, names) for names in (_UNIFORM, _MIXES))
        curves[name] = {"one number of bits": uniform, "a budget": mixes}
        rows += [{"model": name, **row} for row in [*uniform, *mixes]]
    shown = [
        {
            "model": f"`{row['model']}`",
            "scheme": f"`{row['scheme']}`",
            "bits per weight": f"{row['bits']:.2f}",
            "KL": f"{row['kl']:.5f} ({row['low']:.5f} to {row['high']:.5f})",
            "seeds": str(row["seeds"]),
        }
        for row in sorted(rows, key=lambda row: (row["model"], row["bits"]))
    ]
    _draw(curves).savefig(PICTURE, dpi=100, metadata={"Software": None})
    return [*_SIZES, "", *table(shown), "", f"![KL by size]({PICTURE.name})"]


def _curve(found: pd.DataFrame, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Geometric means of KL over seeds with their intervals, by size; ``names`` are schemes and the choice to show."""
    rows = []
    for scheme, factor in names.items():
        chosen = found[(found["scheme"] == scheme) & (found["factor"] == factor)]
        logs = np.log(chosen[~chosen["level"].isin(("search, ones", "search, pivots"))]["kl"].to_numpy())
        if len(logs) >= _LEAST_SEEDS:
            mean, half = logs.mean(), half_width(logs.std(ddof=1), len(logs))
            kl, low, high = np.exp([mean, mean - half, mean + half])
            rows.append(
                {"scheme": scheme, "bits": _bits(scheme), "kl": kl, "low": low, "high": high, "seeds": len(logs)}
            )
    return sorted(rows, key=lambda row: row["bits"])


def _draw(curves: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> Figure:
    figure = Figure(figsize=(4.6 * len(curves), 3.6), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for label, rows in lines.items():
            bits, kl, low, high = ([row[key] for row in rows] for key in ("bits", "kl", "low", "high"))
            errors = [np.subtract(kl, low), np.subtract(high, kl)]
            axes.errorbar(bits, kl, errors, marker="o", capsize=2, label=label)
        axes.set_yscale("log")
        axes.set_title(name)
        axes.set_xlabel("bits per weight, scales included")
        axes.set_ylabel("KL to full precision, nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


_SIZES = (
    "A mix gives each linear group 2, 3, 4, 8 or 16 bits so that the whole has the size that its name says:",
    "`mix3.5` has 3.5 bits a weight with its scales. The choice minimises the sum of what rounding each group",
    "costs the answer's loss, sum_t g_t^2 |error of token t|^2 with the token importance g_t, and is exact.",
    "Geometric means over calibration seeds with 95 % intervals, recipe `tlq-c`, held-out items of the demo",
    "models. `--engine NAME` limits the mix to what the engine runs; MLX and `tlq.load_model` take every mix, and",
    "so should vLLM on NVIDIA cards, by its source.",
    "",
    "On the model of the class Qwen2-VL a mix of 3 bits has less than half the error of 3.125 bits everywhere. On",
    "that of LLaVA-OneVision a mix is no better than one number of bits of its size, and `w3a16` is better than",
    "both, because its weights are asymmetric, which those of a mix cannot be. So measure both on your model",
    "before you choose.",
)


def _bits(name: str) -> float:
    """Bits per weight with the share of a 16-bit scale and of a zero-point; none for whole channels."""
    scheme = get_scheme(name)
    if scheme.budget is not None:
        return scheme.budget.amount
    if scheme.group_size is None:
        return float(scheme.weight_bits)
    size = scheme.bytes_of(_ROWS, scheme.group_size, torch.bfloat16)
    return float(np.round(8 * size / (_ROWS * scheme.group_size), 2))


if __name__ == "__main__":
    sys.exit(main())
