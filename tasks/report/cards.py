"""Write model cards as report/cards/<variant>.md, and copy each into its checkpoint as README.md.

    python -m tasks.report.cards

copies the cards again, after a checkpoint was made again or pulled. DVC ignores a checkpoint's README.md (.dvcignore)
and the checkpoint's digest leaves it out, so a card changes neither.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from tasks.command import run
from tasks.config.sections import PrepareParams
from tasks.files import MODELS, REPORT
from tasks.report.page import environment
from tasks.report.results import Results, Variant, is_demo
from tasks.report.tokens import TokenData
from tlq.export.engines import ENGINES, serving
from tlq.models.architectures import architecture_of
from tlq.models.checkpoint import load_config
from tlq.quantization.formats import Scheme
from tlq.runtime.files import write_text

logger = logging.getLogger("tlq.report")

_MADE_FOR = re.compile(r"^\| calibration\.json \| sha256 `([0-9a-f]{64})` \|$", re.M)

#: Families without experts whose `generate` fails inside compressed-tensors 0.20, which decompresses on the first call.
_NEEDS_LOAD_MODEL = ("llava_next", "llava_onevision")


@dataclass(frozen=True)
class Base:
    """The full-precision model. A field is None if its card does not state the value or no hub id is given.

    Attributes:
        path: path in params.yaml.
        hub_id: id on the Hugging Face hub.
    """

    path: str
    hub_id: str | None
    model_type: str
    language: Any = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    has_experts: bool = False


@dataclass(frozen=True)
class CalibrationData:
    """The calibration data, for the card.

    Attributes:
        origin: file or hub id, with its revision and split if it has them.
        samples: number of samples that importance was scored on.
        sources: numbers of samples by source, the most frequent first.
        tokens, image_tokens: numbers of tokens in these samples.
    """

    origin: str
    samples: int
    sources: dict[str, int]
    tokens: int
    image_tokens: int

    @staticmethod
    def of(params: PrepareParams, data: TokenData) -> CalibrationData:
        hub = params.kind == "hub"
        details = {"configuration": params.name, "split": params.split, "revision": params.revision} if hub else {}
        named = ", ".join(f"{name} {value}" for name, value in details.items() if value)
        return CalibrationData(
            origin=f"`{params.path}`" + (f" ({named})" if named else ""),
            samples=len(data.samples),
            sources=dict(Counter(sample.source for sample in data.samples if sample.source).most_common()),
            tokens=len(data.pool),
            image_tokens=int(data.pool.is_image.sum()),
        )


def read_base(path: str, hub_id: str | None) -> Base:
    """The base model, with license and language from its own card."""
    folder = Path(path)
    config = load_config(folder)
    stated = _stated(folder / "README.md")
    names = ("language", "license", "license_name", "license_link")
    experts = architecture_of(config).experts is not None
    return Base(path, hub_id, config.model_type, has_experts=experts, **{name: stated.get(name) for name in names})


def _stated(card: Path) -> dict[str, Any]:
    """Metadata of a model card; empty without a card or metadata."""
    if not card.exists():
        return {}
    try:
        return dict(ModelCard(card.read_text(), ignore_metadata_errors=True).data.to_dict())
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        logger.warning("%s: its metadata cannot be read (%s); license and language are left out", card, reason)
        return {}


def metadata(variant: Variant, base: Base) -> ModelCardData:
    """Front matter for the Hugging Face hub."""
    scheme = variant.scheme
    tags = ["compressed-tensors", "quantized", scheme.tag, scheme.name, variant.recipe.name]
    if ENGINES["vllm"].of(scheme).runs != "refused":
        tags.append("vllm")
    return ModelCardData(
        base_model=base.hub_id,
        base_model_relation="quantized" if base.hub_id else None,
        language=base.language,
        license=base.license,
        license_name=base.license_name,
        license_link=base.license_link,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys(tags)),
    )


def render_card(
    variant: Variant, results: Results, base: Base, data: CalibrationData, checkpoint: Path, backend: str = "hf"
) -> str:
    """The card as markdown with front matter; ``backend`` is the one that scores were measured with."""
    demo = [name for name in results.benchmarks if is_demo(name)]
    recipe = variant.recipe
    return (
        environment(escape=False)
        .get_template("card.md.j2")
        .render(
            metadata=metadata(variant, base).to_yaml(),
            variant=variant,
            recipe=recipe,
            full=results.full,
            full_bytes=results.full_bytes,
            benchmarks=results.benchmarks,
            demo=demo,
            base=base,
            data=data if recipe.needs_data(variant.scheme) else None,
            groups=variant.groups,
            path=checkpoint.as_posix(),
            backend=backend,
            serving=serving(variant.scheme, base.model_type, checkpoint.as_posix(), base.has_experts),
            vllm=ENGINES["vllm"].of(variant.scheme),
            load_model=_needs_load_model(base, variant.scheme),
            digest=_sha256(checkpoint / "calibration.json"),
        )
    )


def _needs_load_model(base: Base, scheme: Scheme) -> bool:
    """Whether the card's snippet uses the package: for experts, and where transformers decompresses at every call."""
    return base.has_experts or scheme.mixed or (base.model_type in _NEEDS_LOAD_MODEL and not scheme.dequantized)


def place_cards(cards: Path = REPORT / "cards", models: Path = MODELS) -> list[Path]:
    """Copy every card into its checkpoint; returns the paths of the copies.

    Raises:
        FileNotFoundError: there are no cards, or a checkpoint is missing.
        ValueError: a card was made for another checkpoint than the present one.
    """
    files = sorted(cards.glob("*.md"))
    if not files:
        raise FileNotFoundError(f"{cards}: no cards; run `dvc repro report` first")
    return [place_card(card, models / card.stem) for card in files]


def place_card(card: Path, checkpoint: Path) -> Path:
    """Copy one card; returns the path of the copy. Raises: as ``place_cards``."""
    report = checkpoint / "calibration.json"
    if not report.exists():
        raise FileNotFoundError(f"{report}: not found; bring the checkpoint back with `dvc pull {checkpoint}`")
    text = card.read_text()
    made_for = _MADE_FOR.search(text)
    if made_for is None or made_for[1] != _sha256(report):
        raise ValueError(f"{card} was made for another checkpoint than {checkpoint}; run `dvc repro report`")
    target = checkpoint / "README.md"
    write_text(text, target)
    return target


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    for path in place_cards():
        logger.info("%s", path)


if __name__ == "__main__":
    run(main)
