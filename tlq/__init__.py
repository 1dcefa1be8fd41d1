"""TLQ: token-level importance-aware layer-wise quantization of vision-language models (arXiv 2602.07899).

from tlq import load_samples, quantize
samples = load_samples("samples.json", image_root="images", limit=128)
quantize("Qwen2-VL-2B-Instruct", "Qwen2-VL-2B-Instruct-w4a16", samples)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlq.api import CalibrationOptions, QuantizationReport, quantize
    from tlq.data import load_samples
    from tlq.export.loading import load_model
    from tlq.importance.token_set import TokenBudget
    from tlq.importance.weighting import Weighting
    from tlq.quantization.formats import Scheme
    from tlq.recipes import Recipe
    from tlq.samples import Sample

__all__ = [
    "CalibrationOptions",
    "QuantizationReport",
    "Recipe",
    "Sample",
    "Scheme",
    "TokenBudget",
    "Weighting",
    "load_model",
    "load_samples",
    "quantize",
]

_MODULES = {
    "CalibrationOptions": "tlq.api",
    "QuantizationReport": "tlq.api",
    "Recipe": "tlq.recipes",
    "Sample": "tlq.samples",
    "Scheme": "tlq.quantization.formats",
    "TokenBudget": "tlq.importance.token_set",
    "Weighting": "tlq.importance.weighting",
    "load_model": "tlq.export.loading",
    "load_samples": "tlq.data",
    "quantize": "tlq.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import tlq`` does not wait for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
