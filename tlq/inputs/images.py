"""Images as their viewers see them: upright, eight bits a channel, transparency on white.

Data may come from a stranger. So only files of common formats are decoded, up to a number of pixels, and a file that a
row names is read only if it is a regular file in the folder of the data.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

#: What Pillow raises for a file that is damaged or that is no image.
IMAGE_ERRORS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)

#: Formats that are decoded. Pillow knows more, some of which start other programs (EPS starts Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
#: Environment variable with the number of pixels above which an image is refused, and its default.
PIXELS, _MOST_PIXELS = "TLQ_IMAGE_PIXELS", 100_000_000

_SIXTEEN_BITS = 65535.0


def decode_image(data: bytes) -> Image.Image:
    """An RGB image from the bytes of an image file, see ``as_rgb``.

    Raises:
        ValueError: the bytes are not a readable image of one of ``FORMATS``, or it has too many pixels.
    """
    try:
        return as_rgb(open_image(data))
    except IMAGE_ERRORS as error:
        raise ValueError(f"unreadable image: {error}") from error


def open_image(data: bytes) -> Image.Image:
    """An image whose header has been read; its pixels are decoded when they are needed.

    Raises:
        ValueError: the image has more than ``TLQ_IMAGE_PIXELS`` pixels. For other data, see ``IMAGE_ERRORS``.
    """
    most = pixel_limit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the one that counts
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:  # its text has an object's address, which differs each time
            raise UnidentifiedImageError(f"no image of a known format ({', '.join(FORMATS)})") from None
    if image.width * image.height > most:
        raise ValueError(
            f"{image.width} x {image.height} pixels, more than the {most} of {PIXELS}; shrink it, or raise the limit"
        )
    return image


def pixel_limit() -> int:
    """``TLQ_IMAGE_PIXELS``, by default 100 million. Raises ValueError if it is no positive number."""
    stated = os.environ.get(PIXELS, "")
    if stated and not (stated.isdecimal() and int(stated)):
        raise ValueError(f"{PIXELS} is {stated!r}; set it to the number of pixels that an image may have")
    return int(stated or _MOST_PIXELS)


def read_image_file(path: Path, folders: Sequence[Path]) -> bytes:
    """The bytes of a regular file in one of ``folders``, after links have been followed.

    Raises:
        ValueError: the file is not there, is a pipe or a device, is in another folder, or cannot be read.
    """
    try:
        file = path.resolve(strict=True)
        if not any(file.is_relative_to(folder.resolve()) for folder in folders):
            raise ValueError(
                f"unreadable image: {path} is outside of {folders[0]}; set image_root to the folder of all images"
            )
        if not file.is_file():
            raise ValueError(f"unreadable image: {path} is no file")
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"unreadable image: {path}: {error.strerror}") from error
    except RuntimeError as error:
        raise ValueError(f"unreadable image: {path}: links in a circle") from error


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
