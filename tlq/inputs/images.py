"""Images as their viewers see them: upright, eight bits a channel, transparency on white."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

#: What Pillow raises for a file that is damaged or that is no image.
IMAGE_ERRORS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)

_SIXTEEN_BITS = 65535.0


def decode_image(data: bytes) -> Image.Image:
    """An RGB image from the bytes of an image file, see ``as_rgb``.

    Raises:
        ValueError: the bytes are not a readable image.
    """
    try:
        return as_rgb(Image.open(io.BytesIO(data)))
    except IMAGE_ERRORS as error:
        raise ValueError(f"unreadable image: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """The image turned upright by its EXIF orientation, scaled to 8 bits, composed on white where it is transparent.

    Grey levels of 16 bits are scaled by 255 / 65535. Floating point and 32-bit levels have no such range of their own:
    levels in [0, 1] are scaled by 255, levels in [0, 255] stay, others are scaled from their least to their greatest.

    Raises:
        ValueError: levels that are not finite. Whatever Pillow raises for a damaged file, see ``IMAGE_ERRORS``.
    """
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """The image without its EXIF orientation; unreadable EXIF data name none, as for every viewer."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return image


def _eight_bits(image: Image.Image) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    levels = np.asarray(image, np.float64)
    if not np.isfinite(levels).all():
        raise ValueError("levels of grey that are not finite")
    low, high = float(levels.min()), float(levels.max())
    if image.mode.startswith("I;16") or (image.mode == "I" and low >= 0 and 255 < high <= _SIXTEEN_BITS):
        low, high = 0.0, _SIXTEEN_BITS
    elif low >= 0 and high <= (1 if image.mode == "F" else 0):
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    return np.rint((levels - low) * (255 / (high - low))).astype(np.uint8)
