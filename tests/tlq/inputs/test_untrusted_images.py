"""Images of a stranger: only common formats, regular files in the folder of the data, a bounded number of pixels."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.data import EncodedImage
from tlq.data import load_samples, sample_of
from tlq.inputs.images import FORMATS, IMAGE_ERRORS, PIXELS, decode_image, read_image_file

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch ran) (w) file\nshowpage\n"


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, format)
    return buffer.getvalue()


def large_png(width: int, height: int) -> bytes:
    """A PNG whose header states a size, and that holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


DOORS: list[Callable[[bytes], object]] = [decode_image, lambda data: EncodedImage(data, "image")]


@pytest.mark.parametrize("format", FORMATS)
def test_common_formats_are_read(format: str) -> None:
    assert decode_image(encoded(format)).size == (8, 6)


@pytest.mark.parametrize("read", DOORS)
@pytest.mark.parametrize("data", [EPS, encoded("PPM"), encoded("ICNS"), encoded("TGA"), encoded("SGI")])
def test_other_formats_are_refused(read: Callable[[bytes], object], data: bytes) -> None:
    with pytest.raises(IMAGE_ERRORS):
        read(data)


@pytest.mark.parametrize("read", DOORS)
def test_a_picture_of_170_megapixels_is_refused_before_it_is_decoded(read: Callable[[bytes], object]) -> None:
    begun = time.process_time()
    with pytest.raises(ValueError, match="17000 x 10000 pixels, more than the 100000000 of TLQ_IMAGE_PIXELS"):
        read(large_png(17000, 10000))
    assert time.process_time() - begun < 0.5


def test_the_number_of_pixels_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIXELS, "47")
    with pytest.raises(ValueError, match="8 x 6 pixels, more than the 47 of TLQ_IMAGE_PIXELS"):
        decode_image(encoded("PNG"))
    monkeypatch.setenv(PIXELS, "48")
    assert decode_image(encoded("PNG")).size == (8, 6)
    for wrong in ("0", "-1", "many", "1e9"):
        monkeypatch.setenv(PIXELS, wrong)
        with pytest.raises(ValueError, match=f"TLQ_IMAGE_PIXELS is '{wrong}'; set it to the number of pixels"):
            decode_image(encoded("PNG"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of images, and a secret next to the folder."""
    (tmp_path / "secret.png").write_bytes(encoded("PNG"))
    images = tmp_path / "images"
    images.mkdir()
    (images / "own.png").write_bytes(encoded("PNG"))
    (images / "link.png").symlink_to(images / "own.png")
    (images / "out.png").symlink_to(tmp_path / "secret.png")
    (images / "circle.png").symlink_to(images / "circle.png")
    os.mkfifo(images / "pipe.png")
    (images / "folder.png").mkdir()
    return images


@pytest.mark.parametrize("name", ["own.png", "link.png", "../images/own.png"])
def test_a_file_in_the_folder_is_read(folder: Path, name: str) -> None:
    assert read_image_file(folder / name, [folder]) == encoded("PNG")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.png", "is outside of .*; set image_root to the folder of all images"),
        ("out.png", "is outside of"),
        ("{root}/secret.png", "is outside of"),
        ("/dev/zero", "is outside of"),
        ("pipe.png", "is no file"),
        ("folder.png", "is no file"),
        ("circle.png", "unreadable image"),
        ("nowhere.png", "No such file"),
    ],
)
def test_any_other_file_is_refused_and_nothing_hangs(folder: Path, name: str, reason: str) -> None:
    name = name.format(root=folder.parent)
    row = {"image": name, "question": "?", "answer": "red"}
    with pytest.raises(ValueError, match=reason):
        sample_of(row, "0", folder, "test")
    with pytest.raises(ValueError, match=reason):
        sample_of({**row, "image": {"bytes": None, "path": name}}, "0", folder, "test")


def test_a_device_is_refused_even_in_the_folder() -> None:
    with pytest.raises(ValueError, match="is no file"):
        read_image_file(Path("/dev/zero"), [Path("/dev")])


def test_rows_of_a_list_stay_in_its_folder(folder: Path) -> None:
    file = folder / "rows.json"
    file.write_text('[{"image": "own.png", "answer": "red"}, {"image": "../secret.png", "answer": "red"}]')
    assert [sample.id for sample in load_samples(file, limit=1)] == ["0"]
    with pytest.raises(ValueError, match="secret.png is outside of"):
        load_samples(file)
