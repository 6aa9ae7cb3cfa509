"""Every kind of stored image that people have, to RGB; and every kind that cannot be read."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps, features

from discl.data import (
    Gate,
    Unreadable,
    decode_image,
    images,
    keep_aspect,
    read_tables,
    to_size,
    to_square,
)
from discl.data.images import picture_suffixes


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, Any]:
    """The picture as `datasets` stores it."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return {"bytes": stream.getvalue(), "path": None}


ORIENTATION = (0x0112, 3, 1, b"\0\6\0\0")
"""Turn by 90° clockwise to see it upright, as a (tag, type, count, value) of EXIF."""


def raw_exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of these entries as they stand, sense or not."""
    listed = b"".join(struct.pack(">HHL4s", *entry) for entry in entries)
    return b"Exif\0\0MM\0*" + struct.pack(">LH", 8, len(entries)) + listed + bytes(4)


def pixels(image: Image.Image) -> list[list[tuple[int, ...]]]:
    """Rows of pixels."""
    return [[tuple(pixel) for pixel in row] for row in np.asarray(image).tolist()]


def test_rgb_comes_back_from_bytes_and_from_a_path(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    image.save(tmp_path / "ä b.png")
    for stored in (
        encoded(image),
        {"bytes": None, "path": str(tmp_path / "ä b.png")},
        {**encoded(image), "path": "elsewhere.png"},
    ):
        decoded = decode_image(stored, Gate((tmp_path,)))
        assert (decoded.mode, pixels(decoded)) == ("RGB", pixels(image))


def test_greyscale_and_bilevel() -> None:
    grey = Image.fromarray(np.array([[0, 100, 255]], np.uint8))
    assert pixels(decode_image(encoded(grey))) == [[(0, 0, 0), (100, 100, 100), (255, 255, 255)]]
    assert pixels(decode_image(encoded(grey.convert("1", dither=Image.Dither.NONE)))) == [
        [(0,) * 3, (0,) * 3, (255,) * 3]
    ]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(kind: str) -> None:
    deep = Image.fromarray(np.array([[0, 257, 25700, 65535]], np.uint16))
    assert pixels(decode_image(encoded(deep, kind))) == [
        [(0,) * 3, (1,) * 3, (100,) * 3, (255,) * 3]
    ]


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (np.uint16, [0, 100, 255], [0, 100, 255]),  # eight bits in sixteen
        (np.int32, [0, 100, 255], [0, 100, 255]),
        (np.int32, [0, 25700, 65535], [0, 100, 255]),
        (np.int32, [-1000, 0, 1000], [0, 128, 255]),
        (np.int32, [0, 100_000, 200_000], [0, 128, 255]),
        (np.float32, [0, 0.2, 1], [0, 51, 255]),
        (np.float32, [0, 100, 255], [0, 100, 255]),
        (np.float32, [0, 25700, 65535], [0, 100, 255]),
        (np.float32, [-1, 0, 1], [0, 128, 255]),
        (np.float32, [np.nan, 0.5, 1], [0, 128, 255]),
        (np.float32, [0.0, 0.0, 0.0], [0, 0, 0]),
    ],
)
def test_wide_greys_and_fractions_are_scaled_by_their_range(
    kind: type, values: list[float], expected: list[int]
) -> None:
    decoded = decode_image(encoded(Image.fromarray(np.array([values], kind)), "TIFF"))
    assert pixels(decoded) == [[(value,) * 3 for value in expected]]


def test_cmyk_becomes_rgb() -> None:
    decoded = decode_image(
        encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    )
    assert decoded.mode == "RGB"
    assert np.abs(np.asarray(decoded).astype(int) - [255, 0, 0]).max() <= 4


def test_transparency_lies_on_white() -> None:
    rgba = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8))
    assert pixels(decode_image(encoded(rgba))) == [[(255, 0, 0), (255, 255, 255), (204, 204, 204)]]
    grey = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    assert pixels(decode_image(encoded(grey))) == [[(10, 10, 10), (255, 255, 255)]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_palette_with_transparency_lies_on_white(kind: str) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 10, 0, 0, 250])
    palette.putdata([0, 1])
    assert pixels(decode_image(encoded(palette, kind))) == [[(200, 10, 10), (0, 0, 250)]]
    assert pixels(decode_image(encoded(palette, kind, transparency=1))) == [
        [(200, 10, 10), (255, 255, 255)]
    ]


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue")]
    decoded = decode_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert set(pixels(decoded)[0]) == {(255, 0, 0)}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_the_exif_rotation_is_applied(kind: str) -> None:
    array = np.zeros((16, 32, 3), np.uint8)
    array[:, :16] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    decoded = decode_image(encoded(Image.fromarray(array), kind, exif=exif))
    assert decoded.size == (16, 32)
    assert np.asarray(decoded)[:14].min() > 240
    assert np.asarray(decoded)[18:].max() < 15


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize(
    "odd", [(0x011A, 2, 4, b"abc\0"), (0x0100, 2, 4, b"abc\0"), (0x0100, 9, 1, b"\xff" * 4)]
)
def test_the_rotation_is_applied_whatever_else_the_exif_says(
    kind: str, odd: tuple[int, int, int, bytes]
) -> None:
    image = Image.new("RGB", (16, 8))
    assert decode_image(encoded(image, kind, exif=raw_exif(*sorted((ORIENTATION, odd))))).size == (
        8,
        16,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0junk",
        raw_exif(ORIENTATION)[:20],
        raw_exif((0x0112, 2, 2, b"6\0\0\0")),
        raw_exif((0x0112, 5, 9, b"\xff" * 4)),
    ],
    ids=["junk", "cut", "text", "beyond the end"],
)
def test_a_rotation_that_cannot_be_read_is_none(kind: str, exif: bytes) -> None:
    assert decode_image(encoded(Image.new("RGB", (16, 8)), kind, exif=exif)).size == (16, 8)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16"])
def test_every_rotation_is_pillows(mode: str, orientation: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8))
    image = (
        Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7) * 1800)
        if mode == "I;16"
        else image.convert(mode)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = decode_image(
        encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(image, exif=exif)["bytes"]))))
    )
    assert pixels(decode_image(encoded(image, exif=exif))) == pixels(turned)


def test_a_truncated_jpeg_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    stored = encoded(noise, "JPEG")
    cut = {"bytes": stored["bytes"][: len(stored["bytes"]) // 2], "path": None}
    with pytest.raises(Unreadable, match="truncated"):
        decode_image(cut)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(
        Unreadable,
        match="LOAD_TRUNCATED_IMAGES is set, so truncated images cannot be detected",
    ):
        decode_image(cut)


def test_what_is_no_image_is_unreadable_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    cases: list[tuple[dict[str, Any] | None, str]] = [
        ({"bytes": b"", "path": None}, "^the file is empty$"),
        ({"bytes": None, "path": str(tmp_path / "empty.png")}, "^the file is empty$"),
        ({"bytes": b"no image", "path": None}, "^the file is no image, or of an unknown format$"),
        (
            {"bytes": None, "path": str(tmp_path / "text.png")},
            "^the file is no image, or of an unknown format$",
        ),
        ({"bytes": None, "path": str(tmp_path / "none.png")}, "No such file"),
        ({"bytes": None, "path": str(tmp_path)}, "^it is a folder, not a regular file$"),
        ({"bytes": None, "path": None}, "^neither bytes nor a path are stored$"),
        (None, "^neither bytes nor a path are stored$"),
    ]
    for stored, message in cases:
        with pytest.raises(Unreadable, match=message):
            decode_image(stored, Gate((tmp_path,)))


def test_enormous_images_are_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = encoded(Image.new("L", (40, 30)))
    monkeypatch.setattr(images, "MAX_SIDE", 39)
    with pytest.raises(Unreadable, match=r"^40×30 pixels; at most 39 a side are decoded$"):
        decode_image(stored)
    monkeypatch.setattr(images, "MAX_SIDE", 40)
    assert decode_image(stored).size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow refuses more than twice as many
    with pytest.raises(Unreadable, match="exceeds limit"):
        decode_image(stored)


def black_png(side: int) -> bytes:
    """A square of one bit per pixel, made without the memory that it takes as a picture."""
    header, rows = (
        struct.pack(">LLBBBBB", side, side, 1, 0, 0, 0, 0),
        zlib.compress(bytes((1 + (side + 7) // 8) * side)),
    )
    chunks = [name + data for name, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">L", len(each) - 4) + each + struct.pack(">L", zlib.crc32(each))
        for each in chunks
    )


@pytest.mark.filterwarnings("ignore:.*decompression bomb")
def test_a_small_file_of_an_enormous_picture_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow only warns, and would use about 90 MB for each mode of the conversion."""
    assert decode_image({"bytes": black_png(9), "path": None}).size == (9, 9)
    data = black_png(9_500)
    assert len(data) < 20_000
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("it is decoded"))
    with pytest.raises(
        Unreadable,
        match=r"^9500×9500 pixels; at most 89,478,485 in all",
    ):
        decode_image({"bytes": data, "path": None})


def test_the_most_pixels_are_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = encoded(Image.new("L", (40, 30)))
    for most in (1200, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        assert decode_image(stored).size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    with (
        pytest.warns(Image.DecompressionBombWarning),
        pytest.raises(Unreadable, match="40×30 pixels; at most 1,199 in all"),
    ):
        decode_image(stored)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(Unreadable, match=r"exceeds limit.*Make the image smaller"):
        decode_image(stored)


def odd_exif(stored: bytes, draw: random.Random) -> list[tuple[int, int]]:
    """A byte of the list of EXIF's tags, if any, and its new value: often a small type."""
    start = max(stored.find(mark) for mark in (b"MM\0*", b"II*\0"))
    return [(start + 8 + draw.randrange(40), draw.randrange(13))] if start >= 0 else []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "DDS", "AVIF"]
)
def test_no_broken_file_raises_anything_else(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow knows no AVIF")
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x011A] = "maker", 6, 72.0
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8))
    stored = encoded(image, kind, exif=exif)["bytes"]
    draw, refused = random.Random(0), 0
    for case in range(300):
        broken = bytearray(stored[: draw.randrange(len(stored))] if case % 4 == 1 else stored)
        for place, value in (
            odd_exif(stored, draw)
            if case % 4 == 2
            else [(draw.randrange(100), draw.randrange(256)) for _ in range(3)]
        ):
            if place < len(broken):
                broken[place] = value
        try:
            assert decode_image({"bytes": bytes(broken), "path": None}).mode == "RGB"
        except Unreadable as error:
            assert str(error)
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(("width", "height"), [(30, 10), (10, 30)])
def test_to_square_takes_the_centre_of_wide_and_tall_images(width: int, height: int) -> None:
    array = np.zeros((height, width, 3), np.uint8)
    long = max(width, height)
    centre = slice(long // 2 - 5, long // 2 + 5)
    array[(slice(None), centre) if width > height else centre] = 200
    square = to_square(Image.fromarray(array), 10)
    assert (square.shape, square.dtype, square.flags.c_contiguous) == ((10, 10, 3), np.uint8, True)
    assert square.min() == square.max() == 200


def test_to_square_keeps_what_has_the_size_and_smooths_what_is_shrunk() -> None:
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    assert np.array_equal(to_square(Image.fromarray(array), 8), array)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert (
        np.abs(to_square(Image.fromarray(stripes), 8).astype(int) - 127).max() <= 8
    )  # antialiased
    assert to_square(Image.new("RGB", (1, 500)), 16).shape == (16, 16, 3)


def test_aspect_is_kept_within_a_budget_of_pixels() -> None:
    """At 1,024 the shapes are SDXL's: multiples of 64 with about 1,024² pixels."""
    assert keep_aspect(640, 480, 1024, 8) == (1152, 896)
    assert keep_aspect(480, 640, 1024, 8) == (896, 1152)
    assert keep_aspect(500, 500, 1024, 8) == (1024, 1024)
    assert keep_aspect(10_000, 1, 1024, 8) == (2048, 512)
    assert keep_aspect(1, 10_000, 32, 4) == (16, 64)
    assert keep_aspect(3, 2, 8, 16) == (16, 16)  # never nothing
    for width in range(1, 200, 7):
        wide, high = keep_aspect(width, 60, 512, 16)
        assert wide % 32 == high % 32 == 0 and 0.75 <= wide * high / 512**2 <= 1.3


def test_to_size_takes_the_centre() -> None:
    array = np.zeros((10, 40, 3), np.uint8)
    array[:, 10:30] = 200
    picture = to_size(Image.fromarray(array), 20, 10)
    assert picture.shape == (10, 20, 3) and picture.min() == 200


@pytest.mark.parametrize(
    "name", ["a.jfif", "a.JPE", "a.avif", "a.mpo", "a.jp2", "a.tga", "a.qoi", "a.ico"]
)
def test_endings_that_pillow_reads_are_images(name: str, tmp_path: Path) -> None:
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("this Pillow knows no AVIF")
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        Image.new("RGB", (16, 16), (9, 8, 7)).save(tmp_path / label / name)
    table = read_tables(str(tmp_path))["train"]
    assert len(table) == 2 and table.image(0).size == (16, 16)


def test_what_is_no_picture_or_runs_other_programs_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffixes = picture_suffixes()
    assert {
        ".jpg",
        ".jpeg",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
    } < suffixes
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".grib", ".wmf", ".fits"} & suffixes
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("it is run"))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.eps")
    for stored in (
        {"bytes": (tmp_path / "a.eps").read_bytes(), "path": "a.png"},
        {"bytes": None, "path": str((tmp_path / "a.eps").rename(tmp_path / "a.png"))},
    ):
        with pytest.raises(Unreadable, match="no image, or of an unknown format"):
            decode_image(stored, Gate((tmp_path,)))
