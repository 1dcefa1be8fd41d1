"""TLQ: token-level importance-aware layer-wise quantization of vision-language models (arXiv 2602.07899).

import tlq
tlq.quantize("Qwen2-VL-2B-Instruct", "Qwen2-VL-2B-Instruct-w3a16", calibration=samples, recipe="tlq", scheme="w3a16")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlq.api import quantize as quantize

__all__ = ["quantize"]


def __getattr__(name: str) -> Any:
    """``tlq.quantize`` on first use: the modules below do not pay for what it imports."""
    if name == "quantize":
        from tlq.api import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has quantize")
