"""Which recipe, which scheme: the page docs/which.md, from the defaults' rows of bench/results/ablation.csv.

python -m bench.ablation --only default --schemes w4a16 w4a16s --seeds 0 1 2
python -m bench.which
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from bench.ablation import SUBJECTS
from bench.ablation_page import half_width
from bench.sections import table, write_section
from tlq.export.engines import ENGINES
from tlq.quantization.formats import get_scheme
from tlq.recipes import RECIPES

PAGE = Path("docs/which.md")
_SCHEMES = ("w4a16", "w4a16s")
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
    return 0


def _bits(name: str) -> float:
    """Bits per weight with the share of a 16-bit scale and of a zero-point; none for whole channels."""
    scheme = get_scheme(name)
    if scheme.group_size is None:
        return float(scheme.weight_bits)
    share = 16 + (0 if scheme.symmetric else scheme.weight_bits)
    return float(np.round(scheme.weight_bits + share / scheme.group_size, 2))


if __name__ == "__main__":
    sys.exit(main())
