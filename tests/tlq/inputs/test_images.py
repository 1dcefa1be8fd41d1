"""Images as their viewers see them, the same for calibration and evaluation."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.data import EncodedImage
from tlq.inputs.images import decode_image


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    """RGB levels, [height, width, 3], which evaluation must see alike."""
    mine = np.asarray(decode_image(data))
    np.testing.assert_array_equal(mine, np.asarray(EncodedImage(data, "x").decode()))
    return mine


@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_exif_orientation_is_applied(orientation: int, corner: tuple[int, int]) -> None:
    """The white top left quarter ends where the camera's rotation puts it."""
    levels = np.zeros((32, 64), np.uint8)
    levels[:16, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = pixels(file(Image.fromarray(levels), "JPEG", exif=exif))
    assert seen.shape == ((32, 64, 3) if orientation in (1, 3) else (64, 32, 3))
    assert seen[corner].min() > 240
    assert seen[-1 - corner[0], -1 - corner[1]].max() < 15


def test_unreadable_exif_data_turn_nothing() -> None:
    data = file(Image.new("RGB", (40, 20), "red"), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff" + b"\x00" * 8)
    assert pixels(data).shape == (20, 40, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparency_is_composed_on_white(kind: str) -> None:
    levels = np.zeros((20, 40, 4), np.uint8)
    levels[5:15, 5:35, 3] = 255
    levels[15:, :, 3] = 51
    seen = pixels(file(Image.fromarray(levels), kind, lossless=True))
    assert (seen[0, 0].tolist(), seen[10, 20].tolist(), seen[18, 20].tolist()) == ([255] * 3, [0] * 3, [204] * 3)


def test_a_transparent_colour_of_a_palette_is_white() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    assert (pixels(file(image, transparency=1)) == 255).all()
    assert (pixels(file(image)) == 9).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled(kind: str) -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16)
    seen = pixels(file(Image.fromarray(np.tile(levels, (4, 1))), kind))
    assert np.abs(seen[0, :, 0].astype(int) - np.arange(256)).max() <= 1
    assert pixels(file(Image.fromarray(np.full((4, 4), 257 * 3, np.uint16)), kind)).max() == 3


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0, 1, (0, 255)), (0, 0.5, (0, 128)), (0, 200, (0, 200)), (-3, 7, (0, 255))]
)
def test_floating_point_levels_are_scaled(low: float, high: float, expected: tuple[int, int]) -> None:
    levels = np.tile(np.linspace(low, high, 64, dtype=np.float32), (4, 1))
    seen = pixels(file(Image.fromarray(levels), "TIFF"))
    assert (seen.min(), seen.max()) == expected
    assert len(np.unique(seen)) == 64


def test_levels_that_are_not_finite_are_refused() -> None:
    data = file(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF")
    with pytest.raises(ValueError, match="unreadable image: levels of grey that are not finite"):
        decode_image(data)


def test_an_opaque_image_keeps_every_level() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels(file(Image.fromarray(levels))), levels)


@pytest.mark.parametrize("data", [b"not an image", b"", file(Image.new("RGB", (64, 64)))[:60]])
def test_an_unreadable_image_is_named(data: bytes) -> None:
    with pytest.raises(ValueError, match="unreadable image"):
        decode_image(data)
