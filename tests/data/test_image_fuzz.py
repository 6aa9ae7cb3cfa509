"""500 odd files instead of images: each becomes RGB or one clear error, and none hangs."""

from __future__ import annotations

import io
import os
import random
import signal
import struct
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

from discl.data import Gate, Unreadable, decode_image, inspect_images, read_tables, to_square
from discl.data.depth import Depth
from discl.data.listing import IMAGE_NAMED_FOLDER, LINKED_FOLDER, LeftOut, walk_images

SEED, CASES, LONGEST = 15, 500, 10


class Caught(BaseException):
    """No Exception, or decoding would take it for one of Pillow's."""


def noise(mode: str, size: tuple[int, int] = (24, 17)) -> Image.Image:
    draw = np.random.default_rng(len(mode))
    if mode == "I;16":
        return Image.fromarray(draw.integers(0, 4096, size[::-1]).astype(np.uint16))
    if mode == "I":
        return Image.fromarray(draw.integers(-9, 70_000, size[::-1]).astype(np.int32))
    if mode == "F":
        return Image.fromarray(draw.random(size[::-1]).astype(np.float32))
    picture = Image.fromarray(draw.integers(0, 256, (*size[::-1], 4)).astype(np.uint8))
    if mode == "LAB":
        return Image.frombytes("LAB", size, picture.convert("RGB").tobytes())
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode)


def saved(mode: str, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    noise(mode).save(stream, kind, **options)
    return stream.getvalue()


def originals() -> dict[str, bytes]:
    """A picture in every kind of file and mode that people have, by name."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    frames = [noise("L"), noise("RGB").convert("L"), noise("CMYK").convert("L")]
    several = {"save_all": True, "append_images": frames}
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        ("RGB", "JPEG", {"exif": exif}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "PNG", {"exif": exif}),
        ("1", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {}),
        ("RGBA", "PNG", {}),
        ("P", "PNG", {"transparency": bytes(range(256))}),
        ("P", "PNG", {"transparency": 3}),
        ("I;16", "PNG", {}),
        ("L", "PNG", several),
        ("P", "GIF", {}),
        ("P", "GIF", {"transparency": 3}),
        ("P", "GIF", several),
        ("RGB", "TIFF", {"exif": exif}),
        ("I;16", "TIFF", {}),
        ("I", "TIFF", {}),
        ("F", "TIFF", {}),
        ("CMYK", "TIFF", {}),
        ("LAB", "TIFF", {}),
        ("L", "TIFF", several),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}),
        ("1", "TIFF", {"compression": "group4"}),
        ("RGB", "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("RGB", "TIFF", {"compression": "jpeg"}),
        ("RGB", "WEBP", {"exif": exif}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGB", "WEBP", several),
        ("RGB", "BMP", {}),
        ("P", "BMP", {}),
        ("RGB", "DIB", {}),
        ("RGB", "PPM", {}),
        ("L", "PPM", {}),
        ("1", "PPM", {}),
        ("F", "PPM", {}),
        ("I;16", "PPM", {}),
        ("RGBA", "TGA", {"compression": "tga_rle"}),
        ("RGBA", "ICO", {}),
        ("P", "PCX", {}),
        ("RGB", "SGI", {}),
        ("RGBA", "DDS", {}),
        ("RGB", "MPO", {"save_all": True, "append_images": [noise("RGB")]}),
        ("RGB", "EPS", {}),
        ("RGB", "PDF", {}),
        ("L", "IM", {}),
        ("1", "XBM", {}),
    ]
    if features.check("jpg_2000"):
        wanted += [("RGB", "JPEG2000", {}), ("LA", "JPEG2000", {}), ("I;16", "JPEG2000", {})]
    if features.check("avif"):
        wanted += [("RGB", "AVIF", {"exif": exif}), ("RGBA", "AVIF", {})]
    found = {
        f"{number}-{mode}-{kind}": saved(mode, kind, **options)
        for number, (mode, kind, options) in enumerate(wanted)
    }
    found |= {"empty": b"", "text": b"no image", "zip": b"PK\3\4" + bytes(60), "zeros": bytes(999)}
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='/etc/passwd'/></svg>"
    return {**found, "svg": svg, "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + name + data + struct.pack(">L", zlib.crc32(name + data))


def huge(data: bytes, draw: random.Random) -> bytes:
    """The file with other dimensions in its header, up to what only a bomb has."""
    width, height = (draw.choice([0, 1, 25, 4000, 20_001, 65_535, 2**31 - 1]) for _ in range(2))
    if data.startswith(b"\x89PNG"):
        return (
            data[:8] + chunk(b"IHDR", struct.pack(">LL", width, height) + data[24:29]) + data[33:]
        )
    if data.startswith(b"GIF8"):
        return data[:6] + struct.pack("<HH", width % 65_536, height % 65_536) + data[10:]
    if data.startswith(b"BM"):
        return data[:18] + struct.pack("<LL", width, height) + data[26:]
    if data[:1] == b"P" and data[1:2].isdigit():
        return data[:3] + f"{width} {height}\n".encode() + data[data.find(b"\n", 3) + 1 :]
    place = data.find(b"\xff\xc0")
    if place > 0:
        return (
            data[: place + 5]
            + struct.pack(">HH", height % 65_536, width % 65_536)
            + data[place + 9 :]
        )
    return flip(data, draw, 40)


def flip(data: bytes, draw: random.Random, first: int) -> bytes:
    broken = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        if broken:
            broken[draw.randrange(min(len(broken), first))] = draw.choice(
                [0, 1, 127, 128, 255, draw.randrange(256)]
            )
    return bytes(broken)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "none": lambda data, draw: data,
    "cut off": lambda data, draw: data[: draw.randrange(len(data) + 1)],
    "flipped": lambda data, draw: flip(data, draw, len(data)),
    "another header": lambda data, draw: flip(data, draw, 64),
    "another size": huge,
    "zeros": lambda data, draw: (
        data[: (at := draw.randrange(len(data) + 1))]
        + bytes(draw.randint(1, 400))
        + data[at + 200 :]
    ),
    "doubled": lambda data, draw: data[: draw.randrange(len(data) + 1)] + data,
}


def cases() -> Iterator[tuple[str, bytes, random.Random]]:
    """(name, file, its own draws)."""
    files, kinds = originals(), list(MUTATIONS)
    for number in range(CASES):
        draw = random.Random(f"{SEED}/{number}")
        name = list(files)[number % len(files)]
        kind = "none" if number < len(files) else draw.choice(kinds)
        yield f"{number}: {name}, {kind}", MUTATIONS[kind](files[name], draw), draw


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Restarts the clock; what takes longer than ten seconds or starts another program fails."""

    def late(*_: Any) -> None:
        raise Caught("it hangs")

    def run(*_: Any, **__: Any) -> None:
        raise Caught("another program is started")

    monkeypatch.setattr(subprocess, "Popen", run)
    monkeypatch.setattr(os, "system", run)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    before = signal.signal(signal.SIGALRM, late)
    yield lambda: signal.alarm(LONGEST)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore")
def test_five_hundred_odd_files(tmp_path: Path, one_at_a_time: Callable[[], None]) -> None:
    gate = Gate((tmp_path,))
    endings = [".png", ".jpg", ".tif", ".gif", ".webp", ".eps", ".txt", ".JFIF", ""]
    decoded, refused, started = 0, 0, time.monotonic()
    for name, data, draw in cases():
        file = tmp_path / f"picture{draw.choice(endings)}"
        file.write_bytes(data)
        stored = draw.choice(
            [{"bytes": data, "path": file.name}, {"bytes": None, "path": file.name}]
        )
        one_at_a_time()
        try:
            picture = decode_image(stored, gate, draw.choice([None, Depth(), Depth((0, 1023))]))
        except Unreadable as error:
            told = str(error)
            assert told and len(told) < 400 and told.isprintable(), f"{name}: {told!r}"
            refused += 1
        except BaseException as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
        else:
            assert picture.mode == "RGB", name
            assert to_square(picture, 8).shape == (8, 8, 3), name
            decoded += 1
        file.unlink()
    assert decoded > 150 and refused > 150
    assert time.monotonic() - started < 60


def odd_things(folder: Path, outside: Path) -> dict[str, str]:
    """Puts what is no file in the place of pictures; what is told of each, by name."""
    folder.mkdir(parents=True)
    outside.mkdir()
    noise("RGB").save(outside / "secret.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    links = {
        "dangling.png": "nowhere",
        "loop.png": "loop.png",
        "zero.png": "/dev/zero",
        "out.png": outside / "secret.png",
        "up.png": "../outside/secret.png",
        "memory.png": "/proc/self/mem",
        "to-pipe.png": "pipe.png",
        "to-folder.png": folder,
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "empty.png").touch()
    return {
        "pipe.png": "a pipe",
        "folder.png": "a folder",
        "dangling.png": "No such file",
        "loop.png": "symbolic link",
        "zero.png": "outside",
        "out.png": "outside",
        "up.png": "outside",
        "memory.png": "outside",
        "to-pipe.png": "a pipe",
        "to-folder.png": "a folder",
        "empty.png": "empty",
    }


def test_pipes_devices_folders_and_links_in_place_of_pictures(
    tmp_path: Path, one_at_a_time: Callable[[], None]
) -> None:
    root = tmp_path / "root"
    told = odd_things(root, tmp_path / "outside")
    listed = "".join(f"{name},cat\n" for name in told)
    (root / "list.csv").write_text(f"path,label\n{listed}")
    one_at_a_time()
    found = inspect_images(read_tables(str(root / "list.csv"))["train"])
    assert len(found.unreadable) == len(told)
    for (_, problem), (name, expected) in zip(found.unreadable, told.items(), strict=True):
        assert name in problem and expected in problem
    left_out = LeftOut()
    names = {Path(path).name for path in walk_images(root, left_out)}
    assert names == set(told) - {"folder.png", "to-folder.png"}
    assert left_out.counts == {LINKED_FOLDER: 1, IMAGE_NAMED_FOLDER: 1, ".csv": 1}
