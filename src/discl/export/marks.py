"""Marks encoded images as synthetic: XMP in PNG, JPEG and WebP, without encoding them again.

Written by hand because Pillow writes XMP only while it encodes the pixels, and XMP libraries need
the C library Exempi. Each format needs one block of metadata in a known slot.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from xml.sax.saxutils import quoteattr

from ..errors import StoreError
from .signatures import suffix_of

SYNTHETIC = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""The code of IPTC for media that a trained model generated."""
PNG_KEYWORD = b"XML:com.adobe.xmp\x00"
JPEG_HEADER = b"http://ns.adobe.com/xap/1.0/\x00"
SOI, APP0, APP1, SOS = 0xD8, 0xE0, 0xE1, 0xDA
XMP_FLAG, ALPHA_FLAG = 0x04, 0x10
"""Bits of a WebP's `VP8X` chunk."""
PACKET = """\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/"
    Iptc4xmpExt:DigitalSourceType={source}
    xmp:CreatorTool={software}
    dc:identifier={identifier}/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="r"?>"""


def mark_synthetic(data: bytes, identifier: str) -> bytes:
    """The image with XMP that says it is synthetic; the image data keeps its bytes.

    The XMP has `Iptc4xmpExt:DigitalSourceType` (IPTC's code trainedAlgorithmicMedia),
    `xmp:CreatorTool` (this package and its version) and `dc:identifier`. XMP that the image has
    already is replaced.

    - `data`: a PNG, JPEG or WebP file.
    - `identifier`: id of the image.

    Raises StoreError for another format, and for a file that is cut off.

    ```python
    import numpy as np

    import discl

    content = discl.encode_image(np.zeros((32, 32, 3), np.uint8), "png")
    assert b"trainedAlgorithmicMedia" in discl.mark_synthetic(content, "bag-1")
    ```
    """
    packet = PACKET.format(
        source=quoteattr(SYNTHETIC),
        software=quoteattr(f"discl {version('discl')}"),
        identifier=quoteattr(identifier),
    ).encode()
    insert = {"png": _into_png, "jpg": _into_jpeg, "webp": _into_webp}[suffix_of(data)]
    try:
        return insert(data, packet)
    except (ValueError, IndexError, struct.error) as error:
        raise StoreError(
            f"the image '{identifier}' of the store is cut off or damaged, so it cannot be marked "
            "as synthetic. Delete its shard, and run `discl generate` again."
        ) from error


# ---------------------------------------------------------------- PNG


def _into_png(data: bytes, packet: bytes) -> bytes:
    """The packet is an uncompressed `iTXt` chunk after `IHDR`."""
    head, *others = _png_chunks(data)
    others = [
        chunk for chunk in others if chunk[4:8] != b"iTXt" or not chunk[8:].startswith(PNG_KEYWORD)
    ]
    body = b"iTXt" + PNG_KEYWORD + bytes(4) + packet  # no compression, language or translation
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:8] + head + chunk + b"".join(others)


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """Every chunk whole, with length and checksum. Raises ValueError."""
    start, kind = 8, b""
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", data, start)
        kind, end = data[start + 4 : start + 8], start + length + 12
        if end > len(data):
            raise ValueError("cut off")
        yield data[start:end]
        start = end


# ---------------------------------------------------------------- JPEG


def _into_jpeg(data: bytes, packet: bytes) -> bytes:
    """The packet is an `APP1` segment after those of JFIF and Exif, which have to come first."""
    first: list[bytes] = []
    others: list[bytes] = []
    start = 2
    while data[start + 1] != SOS:
        marker, (length,) = data[start + 1], struct.unpack_from(">H", data, start + 2)
        segment = data[start : start + 2 + length]
        if data[start] != 0xFF or len(segment) < 2 + length:
            raise ValueError("cut off")
        start += 2 + length
        leads = marker == APP0 or (marker == APP1 and segment[4:].startswith(b"Exif\x00"))
        if marker != APP1 or not segment[4:].startswith(JPEG_HEADER):
            (first if leads and not others else others).append(segment)
    body = JPEG_HEADER + packet
    own = struct.pack(">BBH", 0xFF, APP1, len(body) + 2) + body
    return b"".join([data[:2], *first, own, *others, data[start:]])


# ---------------------------------------------------------------- WebP


def _into_webp(data: bytes, packet: bytes) -> bytes:
    """The packet is the last chunk; a `VP8X` chunk, which announces it, is the first."""
    chunks = [chunk for chunk in _webp_chunks(data) if chunk[0] != b"XMP "]
    kind, body = chunks[0]
    if kind == b"VP8X":
        chunks[0] = (kind, bytes([body[0] | XMP_FLAG]) + body[1:])
    else:
        width, height, alpha = _webp_size(kind, body)
        sides = b"".join((side - 1).to_bytes(3, "little") for side in (width, height))
        flags = XMP_FLAG | (ALPHA_FLAG if alpha else 0)
        chunks.insert(0, (b"VP8X", bytes([flags, 0, 0, 0]) + sides))
    chunks.append((b"XMP ", packet))
    content = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for kind, body in chunks
    )
    return b"RIFF" + struct.pack("<I", len(content)) + content


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, content) of every chunk. Raises ValueError."""
    if data[8:12] != b"WEBP":
        raise ValueError("another RIFF file")
    start, end = 12, 8 + struct.unpack_from("<I", data, 4)[0]
    while start < end:
        (length,) = struct.unpack_from("<I", data, start + 4)
        body = data[start + 8 : start + 8 + length]
        if len(body) < length:
            raise ValueError("cut off")
        yield data[start : start + 4], body
        start += 8 + length + length % 2


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int, bool]:
    """(width, height, alpha) of a frame: lossy (RFC 6386, 9.1) or lossless (RFC 9649, 3.4)."""
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF, False
    if kind == b"VP8L" and body[:1] == b"\x2f":
        (bits,) = struct.unpack_from("<I", body, 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, bool(bits >> 28 & 1)
    raise ValueError("no frame")
