"""CIFAR's binary version."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...errors import DataError
from ..table import ImageTable
from .building import Source, build_table, expected
from .opening import plain_file, read_text

SIDE = 32
PICKLED = ("cifar-10-batches-py", "cifar-100-python")
PICKLES = ("data_batch_1", "meta", "batches.meta")
HEADER = b"P6 32 32 255\n"


def read_cifar(source: Source) -> dict[str, ImageTable]:
    """The binary version of CIFAR-10 or CIFAR-100 (fine labels); the pickled Python version is refused.

    Pictures are wrapped as PPM, which loses nothing.
    """
    folder = next(
        (
            each
            for each in (source.path, *sorted(source.path.glob("cifar-10*-b*")))
            if _is_binary(each)
        ),
        None,
    )
    if folder is None:
        if is_pickled(source.path):
            raise DataError(
                f"data.root '{source.root}' holds the pickled Python version of CIFAR, which is never unpickled because that runs code; "
                "take the binary version (cifar-10-binary.tar.gz, cifar-100-binary.tar.gz) or a Parquet copy such as uoft-cs/cifar100."
            )
        raise DataError(expected(source, "cifar"))
    hundred = (folder / "train.bin").is_file()
    listing = folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    if not listing.is_file():
        raise DataError(
            f"{listing} is missing, the names of the classes; it comes in the same archive as {folder.name}'s *.bin files."
        )
    listed = read_text(listing).split("\n")
    names = [
        line.strip().replace("_", " ") for line in listed if line.strip()
    ]  # aquarium_fish: texts are written from these names
    train = (
        [folder / "train.bin"]
        if hundred
        else [folder / f"data_batch_{number}.bin" for number in range(1, 6)]
    )
    tests = [folder / ("test.bin" if hundred else "test_batch.bin")]
    return {
        split: _read_binary(files, 2 if hundred else 1, split, names)
        for split, files in (("train", train), ("test", tests))
    }


def is_pickled(folder: Path) -> bool:
    """Whether the pickled version of CIFAR lies there; a folder of a class that is called meta is none."""
    return any((folder / name).is_dir() for name in PICKLED) or any(
        (folder / name).is_file() for name in PICKLES
    )


def _is_binary(folder: Path) -> bool:
    return (folder / "train.bin").is_file() or (folder / "data_batch_1.bin").is_file()


def _read_binary(files: list[Path], label_bytes: int, split: str, names: list[str]) -> ImageTable:
    record = label_bytes + 3 * SIDE * SIDE
    parts = []
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is missing from the binary version of CIFAR.")
        try:
            raw = np.fromfile(plain_file(file), np.uint8)
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        if len(raw) % record or not len(raw):
            raise DataError(
                f"{file} has {len(raw)} bytes, which is no multiple of {record}; it is truncated or of another version."
            )
        parts.append(raw.reshape(-1, record))
    rows = np.concatenate(parts)
    pixels = (
        rows[:, label_bytes:]
        .reshape(-1, 3, SIDE, SIDE)
        .transpose(0, 2, 3, 1)
        .reshape(len(rows), -1)
    )
    encoded = [HEADER + picture.tobytes() for picture in pixels]
    ids = [f"{split}-{row:05d}" for row in range(len(rows))]
    return build_table(
        ids, rows[:, label_bytes - 1].astype(np.int64), names, ids, files[0].parent, encoded
    )
