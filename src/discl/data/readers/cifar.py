"""CIFAR's binary version.

Read by hand because torchvision reads only the pickled version, and unpickling runs code.
"""

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
    """The binary version of CIFAR-10 or CIFAR-100 (fine labels); the pickled one is refused.

    Images are wrapped as PPM, which is lossless.
    """
    folders = (source.path, *sorted(source.path.glob("cifar-10*-b*")))
    folder = next((each for each in folders if _is_binary(each)), None)
    if folder is None:
        if is_pickled(source.path):
            raise DataError(
                f"'{source.root}' holds the pickled Python version of CIFAR, which is never "
                "unpickled because that runs code; use the binary version (cifar-10-binary.tar.gz, "
                "cifar-100-binary.tar.gz) or a Parquet copy such as uoft-cs/cifar100.",
                argument="root",
            )
        raise expected(source, "cifar")
    hundred = (folder / "train.bin").is_file()
    name_file = folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    if not name_file.is_file():
        raise DataError(
            f"{name_file} with the names of the classes is missing; it is in the same archive as "
            f"{folder.name}'s *.bin files."
        )
    lines = (line.strip() for line in read_text(name_file).split("\n"))
    names = [line.replace("_", " ") for line in lines if line]  # prompts need "aquarium fish"
    batches = ["train"] if hundred else [f"data_batch_{number}" for number in range(1, 6)]
    files = {"train": batches, "test": ["test" if hundred else "test_batch"]}
    return {
        split: _read_binary([folder / f"{name}.bin" for name in parts], hundred, split, names)
        for split, parts in files.items()
    }


def is_pickled(folder: Path) -> bool:
    """Whether a folder holds the pickled version of CIFAR; a class folder named meta does not."""
    return any((folder / name).is_dir() for name in PICKLED) or any(
        (folder / name).is_file() for name in PICKLES
    )


def _is_binary(folder: Path) -> bool:
    return (folder / "train.bin").is_file() or (folder / "data_batch_1.bin").is_file()


def _read_binary(files: list[Path], hundred: bool, split: str, names: list[str]) -> ImageTable:
    label_bytes = 2 if hundred else 1  # CIFAR-100: the coarse label, then the fine one
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
                f"{file} has {len(raw)} bytes, which is no multiple of {record}; it is truncated "
                "or of another version."
            )
        parts.append(raw.reshape(-1, record))
    rows = np.concatenate(parts)
    pixels = rows[:, label_bytes:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    encoded = [HEADER + image.tobytes() for image in pixels]
    ids = [f"{split}-{row:05d}" for row in range(len(rows))]
    labels = rows[:, label_bytes - 1].astype(np.int64)
    return build_table(ids, labels, names, ids=ids, root=files[0].parent, data=encoded)
