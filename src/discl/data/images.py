"""From a stored image to pixels."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from ..escaping import one_line
from .addresses import CELL, SLICE, read_cell, read_slice
from .cameras import SCHEME, Camera, degrade, parse_address
from .depth import Depth, Wide, measure
from .gate import CLOSED, Gate, Unreadable

T = TypeVar("T")

MAX_SIDE = 20_000
LONGEST_CAUSE = 300
PICTURES = (
    *("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000"),
    *("DIB", "ICO", "QOI", "DDS", "PCX", "PSD", "SGI", "TGA"),
)
"""Formats that are decoded, by Pillow's names, whatever the file's name. Never EPS: it runs
Ghostscript."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""


def picture_formats() -> tuple[str, ...]:
    """The formats among `PICTURES` that the installed Pillow reads."""
    Image.init()
    return tuple(name for name in PICTURES if name in Image.OPEN)


def picture_suffixes() -> frozenset[str]:
    """Suffixes of image files, such as `.jpg`: those of `picture_formats`."""
    known = {*picture_formats(), "MPO"}  # several JPEGs in a file, of which the first is read
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in known
    )


def decode_image(
    stored: Mapping[str, Any] | None,
    gate: Gate = CLOSED,
    depth: Depth | None = None,
    on_wide: Callable[[Wide], None] = lambda wide: None,
) -> Image.Image:
    """RGB image of a stored `{bytes, path}`, as Hugging Face `datasets` stores images.

    EXIF rotation is applied where it is readable. Transparency is composed on white. Of an
    animation the first frame is used.

    - `stored`: `bytes` of an encoded image, or a `path`.
    - `gate`: the files that a path may open. By default none: only `bytes` are decoded. Addresses
      (`slice://`, `parquet://`, `camera://`) are read only if the gate knows their scheme.
    - `depth`: the values of grey images of more than 8 bits that are black and white, one rule for
      a data set (`with_depth`). Without it each image is scaled by its own range.
    - `on_wide`: called with the range of such an image.

    Raises Unreadable for a missing, truncated or foreign file, for a file that the gate refuses,
    and for formats other than `PICTURES`. Also, before decoding, for more than 20,000 pixels a
    side or `PIL.Image.MAX_IMAGE_PIXELS` (89.5 million) in all.

    ```python
    from pathlib import Path

    import discl

    image = discl.decode_image({"bytes": Path("photos/Bag/000.png").read_bytes(), "path": None})
    assert image.mode == "RGB"
    ```
    """
    stored, camera = _without_camera(stored, gate)

    def decode(image: Image.Image) -> Image.Image:
        image.load()
        _refuse_enormous(*image.size)  # the size of an icon is known only now
        return _to_rgb(_upright(image), depth, on_wide)

    picture = _use(stored, gate.without(SCHEME), decode)
    return picture if camera is None else degrade(picture, *camera)


def wide_range(stored: Mapping[str, Any] | None, gate: Gate = CLOSED) -> Wide | None:
    """The range of a stored grey image of more than 8 bits; None for others.

    Other images are not decoded. Raises as `decode_image` does.
    """

    def look(image: Image.Image) -> Wide | None:
        return measure(np.asarray(image), image.mode == "F") if is_wide(image) else None

    return _use(_without_camera(stored, gate)[0], gate.without(SCHEME), look)


def _without_camera(
    stored: Mapping[str, Any] | None, gate: Gate
) -> tuple[Mapping[str, Any] | None, tuple[Camera, int] | None]:
    """The stored clean image, and the (camera, shot) that degrade it, or None."""
    path = stored.get("path") if stored else None
    if stored is None or not gate.knows(path, SCHEME):
        return stored, None
    camera, shot, clean = parse_address(str(path))
    return {"bytes": stored.get("bytes"), "path": clean}, (camera, shot)


def _use(stored: Mapping[str, Any] | None, gate: Gate, use: Callable[[Image.Image], T]) -> T:
    """The result of `use` on the opened image. Any failure becomes Unreadable."""
    data, path = (stored.get("bytes"), stored.get("path")) if stored else (None, None)
    if data is None and path is None:
        raise Unreadable("neither bytes nor a path are stored")
    try:
        if data is None and gate.knows(path, CELL):
            return _use(read_cell(str(path), gate), gate.without(SLICE, CELL), use)
        with _open_bytes(data, path, gate) as source, _open_image(source) as image:
            return use(image)
    except Unreadable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable(f"{error} Make the image smaller") from error
    except MemoryError as error:
        raise Unreadable("it needs more memory than there is; make the image smaller") from error
    except Exception as error:  # Pillow's plugins raise anything, RuntimeError and struct.error too
        cause = one_line(str(error))[:LONGEST_CAUSE] or type(error).__name__
        clear = isinstance(error, OSError | SyntaxError)  # Pillow's own words
        raise Unreadable(cause if clear else f"the file is damaged ({cause})") from error


def _open_bytes(data: bytes | None, path: Any, gate: Gate) -> BinaryIO:
    if data is not None:
        return io.BytesIO(data)
    if gate.knows(path, SLICE):
        return io.BytesIO(read_slice(path, gate))
    return gate.open(str(path))


def _open_image(source: BinaryIO) -> Image.Image:
    """The image, not yet decoded."""
    try:
        image = Image.open(source, formats=picture_formats())
    except UnidentifiedImageError as error:
        empty = not source.seek(0, io.SEEK_END)
        raise Unreadable(
            "the file is empty" if empty else "the file is no image, or of an unknown format"
        ) from error
    _refuse_enormous(*image.size)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise Unreadable(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set, so truncated images cannot be detected"
        )
    return image


def is_wide(image: Image.Image) -> bool:
    """Whether an image is grey and of more than 8 bits, or of fractions."""
    return image.mode.startswith("I") or image.mode == "F"


def _refuse_enormous(width: int, height: int) -> None:
    """Raises Unreadable where Pillow only warns: a few bytes may decode to gigabytes."""
    if max(width, height) > MAX_SIDE:
        raise Unreadable(f"{width}×{height} pixels; at most {MAX_SIDE} a side are decoded")
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and width * height > most:
        raise Unreadable(
            f"{width}×{height} pixels; at most {most:,} in all are decoded, so make the image "
            "smaller"
        )


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says; unchanged where that cannot be read.

    Nothing else of the EXIF is read.
    """
    try:
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(
    image: Image.Image, depth: Depth | None, on_wide: Callable[[Wide], None]
) -> Image.Image:
    if is_wide(image):
        values, fractions = np.asarray(image), image.mode == "F"
        wide = measure(values, fractions)
        on_wide(wide)
        rule = depth if depth is not None else _own_depth(wide)
        image = Image.fromarray(rule.scale(values, fractions))
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _own_depth(wide: Wide) -> Depth:
    """The rule for one image by itself: 8 or 16 bits or fractions of 1, else its own range."""
    tops = (1.0,) * wide.fractions + (255.0, 65535.0)
    top = next((top for top in tops if wide.low >= 0 and wide.high <= top), None)
    limits = (wide.low, wide.high) if top is None else (0.0, top)
    return Depth(limits, limits)


def to_square(image: Image.Image, size: int) -> np.ndarray:
    """uint8 `[size, size, 3]`: the shorter side resized to `size`, then the centre cropped.

    - `image`: RGB, of any size.
    - `size`: side of the result, in pixels.

    ```python
    from PIL import Image

    import discl

    assert discl.to_square(Image.new("RGB", (64, 48)), 32).shape == (32, 32, 3)
    ```
    """
    return to_size(image, size, size)


def to_whole(image: Image.Image, size: int) -> np.ndarray:
    """uint8 `[size, size, 3]`: the whole image resized to a square; its aspect is lost."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.array(image, np.uint8)


def to_size(image: Image.Image, width: int, height: int) -> np.ndarray:
    """uint8 `[height, width, 3]`: resized until it covers that size, then the centre cropped.

    The filter is Lanczos, antialiased.

    - `image`: RGB, of any size.
    - `width`, `height`: of the result, in pixels.

    ```python
    from PIL import Image

    import discl

    assert discl.to_size(Image.new("RGB", (64, 48)), width=32, height=16).shape == (16, 32, 3)
    ```
    """
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    return np.array(image, np.uint8)


def keep_aspect(width: int, height: int, size: int, multiple: int) -> tuple[int, int]:
    """(width, height) of about size² pixels at the aspect of an image, at most 4 : 1 or 1 : 4.

    So that shapes are few, sides are multiples of `multiple` and of about size / 16 (64 at 1,024,
    as SDXL was trained).

    - `width`, `height`: of the image.
    - `size`: root of the number of pixels of the result.
    - `multiple`: what the sides have to be divisible by.
    """
    aspect = min(max(width / height, 1 / 4), 4.0)
    unit = multiple * max(size // (16 * multiple), 1)
    wide, high = (
        max(round(side / unit), 1) * unit for side in (size * aspect**0.5, size / aspect**0.5)
    )
    return wide, high
