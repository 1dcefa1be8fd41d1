"""Which GPU is large enough for which model: the device memory that plans expect, from shapes alone.

    python -m bench.cards

The checkpoints have the shapes of published models and take no space on the disk; no weight is read, nothing runs.
Writes a section of docs/scale.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.models import SHAPES, Shape, large_samples, write_empty_model
from bench.sections import table, write_section
from tlq.api import plan
from tlq.importance.token_set import TokenBudget
from tlq.models.streaming import StreamedModel
from tlq.plan.needs import exported_bytes
from tlq.quantization.formats import get_scheme
from tlq.samples import Sample

logger = logging.getLogger("bench.cards")

#: Memory of common cards, GB. The driver and torch's libraries take about one of them.
CARDS = (24, 48, 80, 141)
_LIBRARIES = 1.0
_GB = 1e9
#: Models by name, with the samples of a micro-batch. Token sets have four times the decoder's width, as in the presets.
MODELS = {"qwen2-vl-2b": 4, "qwen2-vl-7b": 4, "qwen2.5-vl-32b": 1, "qwen2-vl-72b": 1}
_TOKENS_PER_WIDTH = 4
RECIPES = ("rtn", "awq", "tlq", "tlq-c")
SCHEME = "w3a16"
#: Recipes for which the smallest card is named.
_SMALLEST = ("tlq-c", "awq")
#: Too little for importance to keep the whole model on the device, so that its plan is the least that it needs.
_SMALL_DEVICE = "0.001"


@dataclass(frozen=True)
class Needs:
    """Device memory of a model's jobs, in bytes.

    Attributes:
        whole: all weights in bfloat16, which evaluation with the backend `hf` holds.
        importance: scoring layer by layer.
        calibration: by recipe.
        exported: size of the result.
    """

    model: str
    whole: int
    importance: int
    calibration: dict[str, int]
    exported: int

    def row(self) -> dict[str, str]:
        """A row of the table."""
        return {
            "model": self.model,
            "importance": _gb(self.importance),
            **{recipe: _gb(size) for recipe, size in self.calibration.items()},
            **{f"card for {recipe}": _card(max(self.importance, self.calibration[recipe])) for recipe in _SMALLEST},
            "weights, `hf`": _gb(self.whole),
            f"result, {SCHEME.upper()}": _gb(self.exported),
        }


def needs_of(name: str, samples: Sequence[Sample], batch_size: int, folder: Path) -> Needs:
    """Plan every recipe for one model."""
    shape = SHAPES[name]
    assert isinstance(shape, Shape)
    model = write_empty_model(folder / name, shape)
    sizes = StreamedModel(model, torch.bfloat16)
    calibration, importance = {}, 0
    budget = TokenBudget(_TOKENS_PER_WIDTH * shape.hidden)
    for recipe in RECIPES:
        *scoring, last = plan(
            model, samples, recipe, SCHEME, batch_size=batch_size, dtype="bfloat16", device="cpu", budget=budget
        )
        calibration[recipe] = last.device
        importance = max(importance, *(each.device for each in scoring), 0)
        logger.info("%s %s: %s", name, recipe, _gb(last.device))
    whole = sum(place.nbytes for place in set(sizes.weight_map.values()))
    return Needs(name, whole, importance, calibration, exported_bytes(sizes, get_scheme(SCHEME)))


def _gb(size: int) -> str:
    return f"{size / _GB:.1f}"


def _card(size: int) -> str:
    """The smallest card that a job fits."""
    fitting = [card for card in CARDS if size / _GB + _LIBRARIES <= card]
    return f"{fitting[0]} GB" if fitting else "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128, help="calibration samples, of about 700 tokens each")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder of scale.md")
    arguments = parser.parse_args()
    logging.basicConfig(level="INFO", format="%(message)s", stream=sys.stderr)
    os.environ["TLQ_DEVICE_MEMORY"] = _SMALL_DEVICE
    samples = list(large_samples(arguments.samples))
    with tempfile.TemporaryDirectory() as folder:
        rows = [needs_of(name, samples, size, Path(folder)).row() for name, size in MODELS.items()]
    sizes = " or ".join(str(size) for size in sorted(set(MODELS.values())))
    lines = [
        f"Device memory in GB that the plans expect for {arguments.samples} samples with a picture of 640 x 480, in "
        f"micro-batches of {sizes}, token sets of {_TOKENS_PER_WIDTH} times the decoder's width, {SCHEME.upper()}, "
        "bfloat16. Computed from the shapes of the published models: nothing ran, and no GPU was there. The card for a "
        f"recipe is the smallest of {', '.join(map(str, CARDS))} GB that it and importance fit, with one GB for the "
        "driver and torch's libraries. `rtn` takes no samples, and `awq` counts all tokens, not only a set of them. "
        "Evaluation with the backend `hf` holds the weights; `streamed` fits where `tlq` does. "
        "`python -m bench.cards` wrote this section.",
        "",
        *table(rows),
    ]
    write_section(arguments.docs / "scale.md", "Which card for which model", lines, "Scale")


if __name__ == "__main__":
    main()
