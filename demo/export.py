"""Export a training checkpoint as a model folder: ``python -m demo.export --checkpoint build/demo/decoder.pt``.

Reads the fp32 master weights, adds outlier channels (demo.outliers), casts to bf16 and writes a Hugging Face folder
with the processor. The model card (README.md) in that folder is written by hand.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from demo.families import FAMILIES
from demo.model import load_or_build_tokenizer
from demo.outliers import OutlierParams, add_outliers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportParams:
    checkpoint: Path
    out: Path
    family: str
    outliers: OutlierParams
    megabytes: float


def export(params: ExportParams) -> None:
    """Write model and processor to ``params.out``.

    Raises:
        ValueError: the weights file is larger than ``megabytes``.
    """
    tokenizer = load_or_build_tokenizer(params.checkpoint.parent / "tokenizer")
    family = FAMILIES[params.family]
    model = family.build_model(tokenizer)
    model.load_state_dict(torch.load(params.checkpoint)["weights"])
    add_outliers(model, params.outliers)
    model.bfloat16().save_pretrained(params.out)
    family.save_processor(tokenizer, params.out)
    size = (params.out / "model.safetensors").stat().st_size / 1e6
    if size > params.megabytes:
        raise ValueError(
            f"{params.out}/model.safetensors: {size:.1f} MB, more than {params.megabytes:g}; make the model smaller, "
            "or raise --megabytes if the folder is not for git"
        )
    logger.info("%s: %.1f MB", params.out, size)


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a training checkpoint as the shipped demo model.")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/demo/decoder.pt"))
    parser.add_argument("--out", type=Path, default=Path("data/demo/model"))
    parser.add_argument("--family", choices=list(FAMILIES), default="qwen2_vl")
    parser.add_argument("--megabytes", type=float, default=25, help="largest size of the weights, for git")
    defaults = OutlierParams()
    for name in ("spread", "fraction", "strength", "seed"):
        kind = type(getattr(defaults, name))
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name), help="of the outlier channels")
    given = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    own = {name: given.pop(name) for name in ("checkpoint", "out", "family", "megabytes")}
    export(ExportParams(**own, outliers=OutlierParams(**given)))


if __name__ == "__main__":
    main()
