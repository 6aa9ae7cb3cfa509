"""Images inside larger files: CIFAR's binary version, and WebDataset shards."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import DataError
from ..shards import SLICE, slice_address
from ..table import OPTIONAL, ImageTable
from .building import IMAGE_SUFFIXES, SPLIT_NAMES, Source, build_table, expected, refuse_escape

SIDE = 32
PICKLED = ("cifar-10-batches-py", "cifar-100-python")
PICKLES = ("data_batch_1", "meta", "batches.meta")
HEADER = b"P6 32 32 255\n"
BLOCK = 512
PLAIN_FILE = b"0\0"


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
    listed = listing.read_text(encoding="utf-8").split("\n")
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
        raw = np.fromfile(file, np.uint8)
        if len(raw) % record:
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


def read_webdataset(source: Source) -> dict[str, ImageTable]:
    """Tar shards in which files that share a name belong together: an image, and `.cls` (a label) or `.json` ({label, domain, group}).

    Shards are indexed, not unpacked: an image is read from its place in the tar. A shard's split is its name up to the first
    "-" (`train-000000.tar`); other shards are `train`. `.txt` or `.json` may hold a class by name.
    """
    by_split: dict[str, list[Path]] = {}
    known = {name for names in SPLIT_NAMES.values() for name in names} | set(source.splits.values())
    shards = [source.path] if source.path.is_file() else sorted(source.path.rglob("*.tar"))
    if not shards:
        raise DataError(expected(source, "webdataset"))
    refuse_escape(shards, source.folder)
    for shard in shards:
        split = next(
            (part for part in (shard.stem.split("-")[0], shard.parent.name) if part in known),
            "train",
        )
        by_split.setdefault(split, []).append(shard)
    found = {
        split: [sample for shard in files for sample in _index_shard(shard, source)]
        for split, files in by_split.items()
    }
    values = {sample.label for samples in found.values() for sample in samples}
    numbers, texts = ({value for value in values if isinstance(value, kind)} for kind in (int, str))
    if not texts:
        names = [str(label) for label in range(max(map(int, numbers)) + 1)]
    elif not numbers:
        names = sorted(map(str, texts))
    else:
        raise DataError(
            f"data.root '{source.root}': labels are texts in some samples and numbers in others."
        )
    place = {name: label for label, name in enumerate(names)}
    stated = [
        name
        for name in OPTIONAL
        if any(
            getattr(sample, name) is not None for samples in found.values() for sample in samples
        )
    ]
    return {
        split: build_table(
            [sample.path for sample in samples],
            np.asarray([sample.label if isinstance(sample.label, int) else place[sample.label] for sample in samples]),
            names, [sample.id for sample in samples], source.folder, None, (SLICE,),
            **{name: [getattr(each, name) for each in samples] for name in stated},
        )
        for split, samples in found.items()
    }  # fmt: skip


class Sample(NamedTuple):
    """Id, address of the picture, label, and where the JSON states them domain and group."""

    id: str
    path: str
    label: int | str
    domain: str | None
    group: str | None


def _index_shard(shard: Path, source: Source) -> list[Sample]:
    """The samples of a shard. Raises DataError for one without an image or a label, and for a shard without samples."""
    samples: dict[str, dict[str, object]] = {}
    try:
        with shard.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
            for name, place, size in _plain_members(content) or _members(shard):
                folder, _, base = name.rpartition("/")
                key, _, suffix = base.partition(".")
                sample = samples.setdefault(f"{folder}/{key}" if folder else key, {})
                if "." + suffix.lower() in IMAGE_SUFFIXES:
                    sample["path"] = slice_address(place, size, shard)
                elif suffix in {"cls", "txt", "json"}:
                    sample[suffix] = content[place : place + size].decode().strip()
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{shard} cannot be read as a tar file: {error}") from error
    if not samples:
        raise DataError(f"{shard} holds no samples.")
    return [_sample(members, name, shard, source) for name, members in samples.items()]


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """Name, place and size of each file in a tar of any kind."""
    with tarfile.open(shard, "r:") as tar:
        yield from (
            (member.name, member.offset_data, member.size) for member in tar if member.isfile()
        )


def _plain_members(content: mmap) -> list[tuple[str, int, int]] | None:
    """The same of a tar with nothing but plain files of short names, fifteen times as fast as `tarfile`; None for every other one."""
    found: list[tuple[str, int, int]] = []
    place = 0
    while place + BLOCK <= len(content):
        header = content[place : place + BLOCK]
        if not header[0]:
            return found  # the empty block at the end
        size = header[124:135]
        if (
            header[257:262] != b"ustar"
            or header[156] not in PLAIN_FILE
            or header[345]
            or not size.isdigit()
        ):
            return None
        taken = int(size, 8)
        found.append((header[:100].partition(b"\0")[0].decode(), place + BLOCK, taken))
        place += BLOCK + -(-taken // BLOCK) * BLOCK
    return None


def _sample(members: dict[str, object], name: str, shard: Path, source: Source) -> Sample:
    if "path" not in members:
        raise DataError(
            f"{shard}: sample '{name}' has no image; a file {name}.jpg, or of another kind of image, is expected."
        )
    stated: dict[str, object] = {}
    if "json" in members:
        try:
            stated = dict(json.loads(str(members["json"])))
        except (ValueError, TypeError) as error:
            raise DataError(f"{shard}: {name}.json holds no JSON object: {error}") from error
    label = stated.get(source.columns.get("label", "label"))
    if "cls" in members:
        text = str(members["cls"])
        label = int(text) if text.isdecimal() else text
    elif not isinstance(label, int | str):
        label = members.get("txt")
    if not isinstance(label, int | str):
        raise DataError(
            f"{shard}: sample '{name}' has no label; a file {name}.cls, or {name}.json with a key label, is expected."
        )
    domain, group = (stated.get(source.columns.get(each, each)) for each in OPTIONAL)
    return Sample(
        f"{shard.stem}/{name}",
        str(members["path"]),
        label,
        *(None if value is None else str(value) for value in (domain, group)),
    )
