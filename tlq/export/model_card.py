"""Write the model card (README.md) of a checkpoint that ``tlq.quantize`` has made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from tlq.export.engines import serving
from tlq.models.architectures import architecture_of
from tlq.models.checkpoint import load_config
from tlq.models.linear_groups import kind_of
from tlq.quantization.formats import Scheme
from tlq.recipes import Recipe
from tlq.runtime.files import write_text


def write_card(
    folder: Path,
    base: str | Path,
    recipe: Recipe,
    scheme: Scheme,
    groups: Sequence[Mapping[str, Any]],
    samples: int,
    carried_over: int = 0,
) -> None:
    """Write ``README.md``: how to load the checkpoint, how it was made, and the errors of its linear groups.

    Args:
        base: the full-precision checkpoint, a directory or a hub id.
        groups: reports of linear groups, as in ``calibration.json``.
        samples: number of calibration samples.
        carried_over: number of tensors that the model does not name, which the checkpoint has as they were.
    """
    hub_id = None if Path(base).exists() else str(base)
    tags = ["compressed-tensors", "quantized", scheme.tag, scheme.name, recipe.name, "tlq"]
    metadata = ModelCardData(
        base_model=hub_id,
        base_model_relation="quantized" if hub_id else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys(tags)),
    )
    environment = Environment(
        loader=PackageLoader("tlq"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    config = load_config(folder)
    architecture = architecture_of(config)
    experts = architecture.experts is not None
    text = environment.get_template("card.md.j2").render(
        metadata=metadata.to_yaml(),
        folder=folder.name,
        base=hub_id or Path(base).resolve().name,
        recipe=recipe,
        scheme=scheme,
        samples=samples,
        errors=_mean_errors(groups),
        experts=experts,
        joined=architecture.joined,
        loader=not architecture.loads_in_transformers or scheme.mixed,
        carried_over=carried_over,
        further=[group for group in groups if group.get("further_tokens")],
        serving=serving(scheme, config.model_type, folder.name, experts),
    )
    write_text(text, folder / "README.md")


def _mean_errors(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(group name, mean error before, mean error after) over layers and experts, for groups with measured errors."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for group in groups:
        if group["error_before"] is not None and group["error_after"] is not None:
            errors.setdefault(kind_of(group["group"]), []).append((group["error_before"], group["error_after"]))
    means = {name: np.mean(values, axis=0).tolist() for name, values in errors.items()}
    return [(name, before, after) for name, (before, after) in means.items()]
