"""Micro-batches of samples for a model: its own processor encodes them."""

from __future__ import annotations

from collections.abc import Sequence

from tlq.models.processor import load_processor
from tlq.models.streaming import StreamedModel
from tlq.samples import Batch, Sample, encode_batches, image_token_id


def calibration_batches(
    model: StreamedModel, samples: Sequence[Sample], batch_size: int, max_tokens: int
) -> list[Batch]:
    """Encoded micro-batches of the samples. Raises: as ``encode_batches``."""
    processor = load_processor(model.folder)
    return encode_batches(samples, processor, image_token_id(model.config), batch_size, max_tokens)
