"""Marks of synthetic images: read back by Pillow and by the structure of each format."""

from __future__ import annotations

import io
import struct
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import discl
from discl.errors import StoreError
from discl.spectrum.encoding import ENCODINGS, encode_image

PIXELS = np.random.default_rng(0).integers(0, 256, (31, 45, 3)).astype(np.uint8)
IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
TOOL = "{http://ns.adobe.com/xap/1.0/}CreatorTool"
IDENTIFIER = "{http://purl.org/dc/elements/1.1/}identifier"
CODE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif() -> Image.Exif:
    data = Image.Exif()
    data[0x010E] = "a bag"
    return data


def png_chunks(data: bytes) -> list[bytes]:
    found, start = [], 8
    while start < len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        found.append(data[start : start + 12 + length])
        start += 12 + length
    return found


def webp_chunks(data: bytes) -> dict[bytes, bytes]:
    assert struct.unpack("<I", data[4:8])[0] == len(data) - 8
    found, start = {}, 12
    while start < len(data):
        (length,) = struct.unpack("<I", data[start + 4 : start + 8])
        found[data[start : start + 4]] = data[start + 8 : start + 8 + length]
        start += 8 + length + length % 2
    return found


PLAIN, CLEAR = Image.fromarray(PIXELS), Image.fromarray(PIXELS).convert("RGBA")
CLEAR.putalpha(100)
FILES = {
    **{name: encode_image(PIXELS, name) for name in ENCODINGS},
    "jpeg with exif": saved(PLAIN, "JPEG", exif=exif()),
    "png with xmp": saved(PLAIN, "PNG", xmp=b"<old/>", exif=exif()),
    "jpeg with xmp": saved(PLAIN, "JPEG", xmp=b"<old/>"),
    "webp with xmp": saved(CLEAR, "WEBP", xmp=b"<old/>", exif=exif()),
    "lossless webp with alpha": saved(CLEAR, "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", FILES)
def test_pillow_reads_the_mark_and_the_same_pixels(name: str) -> None:
    marked = discl.mark_synthetic(FILES[name], 'bag & "hat" <1>')
    before, after = (Image.open(io.BytesIO(data)) for data in (FILES[name], marked))
    assert (after.mode, after.tobytes()) == (before.mode, before.tobytes())
    assert after.getexif().get(0x010E) == before.getexif().get(0x010E)
    attributes = next(
        each.attrib
        for each in ElementTree.fromstring(after.info["xmp"]).iter()
        if IPTC in each.attrib
    )
    assert attributes[IPTC] == CODE
    assert attributes[TOOL] == f"discl {discl.__version__}"
    assert attributes[IDENTIFIER] == 'bag & "hat" <1>'
    assert b"<old/>" not in marked and marked.count(b"trainedAlgorithmicMedia") == 1
    assert discl.mark_synthetic(marked, 'bag & "hat" <1>') == marked


def test_the_image_data_keeps_its_bytes() -> None:
    marked = {name: discl.mark_synthetic(data, "a") for name, data in FILES.items()}
    head, text, *others = png_chunks(marked["png"])
    assert [head, *others] == png_chunks(FILES["png"]) and text[4:8] == b"iTXt"
    length = 2 + struct.unpack(">H", marked["jpeg"][22:24])[0]
    assert marked["jpeg"][20:22] == b"\xff\xe1"  # after the segment of JFIF
    assert marked["jpeg"][:20] + marked["jpeg"][20 + length :] == FILES["jpeg"]
    for name, frame in (("webp", b"VP8 "), ("webp-lossless", b"VP8L")):
        chunks = webp_chunks(marked[name])
        assert list(chunks) == [b"VP8X", frame, b"XMP "]
        assert chunks[frame] == webp_chunks(FILES[name])[frame]
        assert chunks[b"VP8X"] == b"\x04\x00\x00\x00" + b"\x2c\x00\x00" + b"\x1e\x00\x00"
    chunks = webp_chunks(marked["webp with xmp"])
    assert chunks[b"VP8X"][0] & 0x1C == 0x1C and chunks[b"EXIF"] and chunks[b"ALPH"]
    assert webp_chunks(marked["lossless webp with alpha"])[b"VP8X"][0] == 0x14


@pytest.mark.parametrize("name", ["webp", "webp-lossless", "jpeg", "png"])
@pytest.mark.parametrize("length", [4, 11, 20, 30, 200])
def test_a_file_that_is_cut_off_is_an_error_that_names_it(name: str, length: int) -> None:
    with pytest.raises(StoreError, match="'bag 1'"):
        discl.mark_synthetic(FILES[name][:length], "bag 1")


def test_another_format_is_an_error() -> None:
    with pytest.raises(StoreError, match="GIF8"):
        discl.mark_synthetic(saved(PLAIN, "GIF"), "a")
    with pytest.raises(StoreError, match="'a'"):
        discl.mark_synthetic(b"RIFF\x04\x00\x00\x00WAVE", "a")
