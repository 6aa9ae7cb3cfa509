"""From a stored image to pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from .cameras import SCHEME, degrade, parse_address
from .gate import CLOSED, Gate, Unreadable
from .shards import CELL, SLICE, read_cell, read_slice

MAX_SIDE = 20_000
PICTURES = (
    "JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "DIB", "ICO", "QOI",
    "DDS", "PCX", "PSD", "SGI", "TGA",
)  # fmt: skip
"""What is decoded, by Pillow's names, whatever a file is called; never EPS, which runs Ghostscript."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What makes a picture upright, by its EXIF orientation."""


def picture_formats() -> tuple[str, ...]:
    """Those of `PICTURES` that the installed Pillow reads."""
    Image.init()
    return tuple(name for name in PICTURES if name in Image.OPEN)


def picture_suffixes() -> frozenset[str]:
    """Endings of the files that are taken for images, such as `.jpg`: those of `picture_formats`."""
    known = {*picture_formats(), "MPO"}  # several JPEGs in a file, of which the first is read
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in known
    )


def decode_image(stored: Mapping[str, Any] | None, gate: Gate = CLOSED) -> Image.Image:
    """RGB picture of `{bytes, path}` as Hugging Face `datasets` stores it; EXIF rotation applied, transparency on white.

    Grey images of 16 or 32 bits and of fractions are scaled to 8 bits; of an animation the first frame is taken. A rotation that
    cannot be read is none.

    - `gate`: what a path may open. By default nothing: only `bytes` are decoded. An address (`slice://`, `parquet://`, and `camera://`,
      which `cameras` degrades) means something only where the gate knows it.

    Raises Unreadable for a missing, truncated or foreign file, for one that the gate refuses, for formats that are none of `PICTURES`,
    and, before it is decoded, for more than 20,000 pixels a side or `PIL.Image.MAX_IMAGE_PIXELS` (89.5 million) in all.
    """
    data, path = (stored.get("bytes"), stored.get("path")) if stored else (None, None)
    if path is not None and gate.knows(path, SCHEME):
        camera, shot, path = parse_address(path)
        clean = decode_image({"bytes": data, "path": path}, gate.without(SCHEME))
        return degrade(clean, camera, shot)
    if data is None and path is None:
        raise Unreadable("neither bytes nor a path are stored")
    try:
        if data is None and gate.knows(path, CELL):
            cell = read_cell(str(path), gate)
            return decode_image(cell, gate.without(SCHEME, SLICE, CELL))
        with _opened(data, path, gate) as source:
            return _decode(source)
    except Unreadable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable(f"{error} Make the picture smaller") from error
    except Exception as error:  # Pillow's plugins raise whatever befalls them, among it RuntimeError and struct.error
        raise Unreadable(str(error) or type(error).__name__) from error


def _opened(data: bytes | None, path: Any, gate: Gate) -> BinaryIO:
    if data is not None:
        return io.BytesIO(data)
    if gate.knows(path, SLICE):
        return io.BytesIO(read_slice(path, gate))
    return gate.open(str(path))


def _decode(source: BinaryIO) -> Image.Image:
    try:
        image = Image.open(source, formats=picture_formats())
    except UnidentifiedImageError as error:
        empty = not source.seek(0, io.SEEK_END)
        raise Unreadable(
            "the file is empty" if empty else "the file is no image, or of an unknown format"
        ) from error
    with image:
        _refuse_enormous(*image.size)
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise Unreadable(
                "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so truncated images could not be told apart"
            )
        image.load()
        return _to_rgb(_upright(image))


def _refuse_enormous(width: int, height: int) -> None:
    """Raises Unreadable where Pillow only warns: such a picture may be a few bytes on the disk and gigabytes in memory."""
    if max(width, height) > MAX_SIDE:
        raise Unreadable(f"{width}×{height} pixels; at most {MAX_SIDE} a side are decoded")
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise Unreadable(
            f"{width}×{height} pixels; at most {most:,} in all are decoded, so make the picture smaller"
        )


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says; as it is where that cannot be read. Nothing else of the EXIF is looked at."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(
            _to_eight_bits(np.asarray(image).astype(np.float64), image.mode == "F")
        )
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_eight_bits(wide: np.ndarray, fractions: bool) -> np.ndarray:
    """uint8 of grey values that may be 8 or 16 bits wide, or fractions of 1; of any other range the darkest becomes 0, the lightest 255."""
    wide = np.nan_to_num(wide, nan=0.0)
    low, high = float(wide.min()), float(wide.max())
    tops = ((1.0, 1 / 255),) * fractions + ((255.0, 1.0), (65535.0, 257.0))
    unit = next((unit for top, unit in tops if high <= top), None) if low >= 0 else None
    scaled = wide / unit if unit else (wide - low) * (255 / max(high - low, 1e-300))
    return np.clip(scaled, 0, 255).round().astype(np.uint8)


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 `[3, size, size]`: the shorter side resized to `size` (Lanczos, antialiased), then the centre cropped."""
    return to_size(image, size, size)


def to_whole(image: Image.Image, size: int) -> np.ndarray:
    """uint8 `[3, size, size]`: the whole picture resized to that square (Lanczos, antialiased); its aspect is lost."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))


def to_size(image: Image.Image, width: int, height: int) -> np.ndarray:
    """uint8 `[3, height, width]`: resized until it covers that (Lanczos, antialiased), then the centre cropped."""
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))


def keep_aspect(width: int, height: int, size: int, multiple: int) -> tuple[int, int]:
    """(width, height) of about size² pixels at the aspect of a picture, at most 4 : 1 or 1 : 4.

    Sides are multiples of `multiple` and of about size / 16 (at 1,024 of 64, as SDXL was trained), so that shapes are few.
    """
    aspect = min(max(width / height, 1 / 4), 4.0)
    unit = multiple * max(size // (16 * multiple), 1)
    wide, high = (
        max(round(side / unit), 1) * unit for side in (size * aspect**0.5, size / aspect**0.5)
    )
    return wide, high
