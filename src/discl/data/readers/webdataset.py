"""WebDataset tars.

Read by hand because the package webdataset only streams: an image could not be read by its row.
Indexing a tar of plain files here is fifteen times as fast as `tarfile`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import DataError
from ..addresses import SLICE, slice_address
from ..gate import refuse_outside
from ..listing import IMAGE_SUFFIXES
from ..table import OPTIONAL, ImageTable
from .building import Source, build_table, expected, files_below, known_splits
from .labels import is_whole, name_numbers
from .opening import parse_json, plain_file

BLOCK = 512
PLAIN_FILE = b"0\0"
LABELS = ("cls", "json", "txt")
SHOWN = 5
SHOWN_CHARACTERS = 80


def read_webdataset(source: Source) -> dict[str, ImageTable]:
    """Tar shards in which files with one name form a sample.

    A sample is an image and `.cls` (a label), `.json` ({label, domain, group}) or `.txt` (a class
    by name). As in webdataset, its name ends at the first dot of a file's name. `columns["image"]`
    names the suffix of the image where a sample has several.

    Shards are indexed, not unpacked: an image is read from its position in the tar. A shard's split
    is its name up to the first "-" (`train-000000.tar`), or its folder; other shards are `train`.
    Hidden files and files of no sample are counted and left out.
    """
    by_split = {
        split: [sample for shard in shards for sample in _index_shard(shard, source)]
        for split, shards in _shards_by_split(source).items()
    }
    names = _class_names([each for samples in by_split.values() for each in samples], source.root)
    label_of = {name: label for label, name in enumerate(names)}
    stated = [
        name
        for name in OPTIONAL
        if any(getattr(each, name) is not None for samples in by_split.values() for each in samples)
    ]
    return {
        split: build_table(
            [sample.path for sample in samples],
            np.asarray([label_of[sample.label] for sample in samples], np.int64),
            names,
            ids=[sample.id for sample in samples],
            root=source.folder,
            schemes=(SLICE,),
            **{name: [getattr(each, name) for each in samples] for name in stated},
        )
        for split, samples in by_split.items()
    }


def _shards_by_split(source: Source) -> dict[str, list[Path]]:
    known = {*known_splits(), *source.splits.values()}
    shards = [source.path] if source.path.is_file() else files_below(source.path, "*.tar")
    if not shards:
        raise expected(source, "webdataset")
    refuse_outside(shards, source.folder)
    by_split: dict[str, list[Path]] = {}
    for shard in shards:
        candidates = (shard.stem.split("-")[0], shard.parent.name)
        split = next((name for name in candidates if name in known), "train")
        if not source.leaves_out(split):
            by_split.setdefault(split, []).append(shard)
    return by_split


class Sample(NamedTuple):
    """A sample of a shard.

    - `id`: unique.
    - `path`: address of the image.
    - `label`: as written.
    - `whole`: whether the label is a whole number.
    - `domain`, `group`: if the JSON states them.
    """

    id: str
    path: str
    label: str
    whole: bool
    domain: str | None
    group: str | None


@dataclass
class Members:
    """The files of a sample in a tar.

    - `shard`, `name`: the tar, and the name of the sample.
    - `pictures`: addresses of images, by suffix.
    - `texts`: texts of labels, by suffix.
    - `others`: names of other files.
    """

    shard: Path
    name: str
    pictures: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        """Shard and sample, for messages."""
        return f"{self.shard}: sample '{self.name}'"


def _class_names(samples: Sequence[Sample], root: str) -> tuple[str, ...]:
    numbers = {sample.label for sample in samples if sample.whole}
    texts = {sample.label for sample in samples if not sample.whole}
    if numbers and texts:
        raise DataError(
            f"'{root}': labels are texts in some samples and numbers in others "
            f"('{min(texts)}' and {min(numbers)}).",
            argument="root",
        )
    return name_numbers(numbers, f"'{root}'") if numbers else tuple(sorted(texts))


def _index_shard(shard: Path, source: Source) -> list[Sample]:
    """The samples of a shard.

    Raises DataError for a sample without an image or a label, and for a shard without samples.
    """
    samples: list[Sample] = []
    for name, members in _group_members(shard, source).items():
        stated = _read_json(members)
        has_label = "cls" in members.texts or _label_key(source) in stated
        if not members.pictures and not has_label:
            for file in (*members.others, *(f"{name}.{suffix}" for suffix in members.texts)):
                source.unread.add("that belong to no sample", file)
        else:
            samples.append(_sample(members, stated, source))
            for file in members.others:
                source.unread.add(f".{file.rpartition('.')[2].lower()}", file)
    if not samples:
        raise DataError(f"{shard} holds no samples.")
    return samples


def _group_members(shard: Path, source: Source) -> dict[str, Members]:
    """The files of a shard, by the name of their sample."""
    samples: dict[str, Members] = {}
    picture = source.columns.get("image")
    try:
        with (
            plain_file(shard).open("rb") as stream,
            mmap(stream.fileno(), 0, access=ACCESS_READ) as content,
        ):
            for name, offset, size in _plain_members(content) or _members(shard):
                if not 0 <= offset <= offset + size <= len(content):
                    raise DataError(f"{shard} is cut off: '{name}' goes beyond its end.")
                if _is_hidden(name):
                    source.unread.add("hidden", name)
                    continue
                folder, _, base = name.rpartition("/")
                key, _, suffix = base.partition(".")
                key = f"{folder}/{key}" if folder else key
                members = samples.setdefault(key, Members(shard, key))
                kept: dict[str, str]
                if suffix == picture or (not picture and "." + suffix.lower() in IMAGE_SUFFIXES):
                    kept, value = members.pictures, slice_address(offset, size, shard)
                elif suffix.lower() in LABELS:
                    suffix = suffix.lower()
                    kept = members.texts
                    value = _decode(content[offset : offset + size], name, shard)
                else:
                    members.others.append(name)
                    continue
                if suffix in kept:
                    raise DataError(f"{shard}: '{name}' occurs twice; remove one of the two.")
                kept[suffix] = value
    except DataError:
        raise
    except (
        tarfile.TarError,
        OSError,
        ValueError,
        OverflowError,
        EOFError,
        RecursionError,
    ) as error:
        raise DataError(f"{shard} cannot be read as a tar file: {error}") from error
    return samples


def _is_hidden(name: str) -> bool:
    """Whether a file belongs to an operating system: `._a.jpg`, `.DS_Store`, `__MACOSX/…`."""
    *folders, base = name.split("/")
    return base.startswith(".") or any(
        part == "__MACOSX" or (part.startswith(".") and part.strip(".")) for part in folders
    )


def _decode(data: bytes, name: str, shard: Path) -> str:
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{shard}: {name} is not UTF-8 (byte {error.start}).") from error


def _members(shard: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of each file in a tar of any kind."""
    before = -1
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.offset <= before or member.size < 0:  # an endless loop
                raise ValueError(f"'{member.name}' has a size that leads backwards")
            before = member.offset
            if member.isfile():
                yield member.name, member.offset_data, member.size


def _plain_members(content: mmap) -> list[tuple[str, int, int]] | None:
    """The same, of a tar with nothing but plain files of short names; None for others."""
    members: list[tuple[str, int, int]] = []
    offset = 0
    while offset + BLOCK <= len(content):
        header = content[offset : offset + BLOCK]
        if not header[0]:
            return members  # the empty block at the end
        digits = header[124:135]
        if (
            header[257:262] != b"ustar"
            or header[156] not in PLAIN_FILE
            or header[345]
            or not digits.isdigit()
        ):
            return None
        size = int(digits, 8)
        try:
            name = header[:100].partition(b"\0")[0].decode()
        except UnicodeDecodeError:
            return None
        members.append((name, offset + BLOCK, size))
        offset += BLOCK + -(-size // BLOCK) * BLOCK
    return None


def _label_key(source: Source) -> str:
    return source.columns.get("label", "label")


def _read_json(members: Members) -> Mapping[str, Any]:
    """The values in the JSON of a sample."""
    if "json" not in members.texts:
        return {}
    where = f"{members.shard}: {members.name}.json"
    stated = parse_json(members.texts["json"], where)
    if not isinstance(stated, dict):
        raise DataError(f"{where} holds no JSON object: {str(stated)[:SHOWN_CHARACTERS]}.")
    return stated


def _sample(members: Members, stated: Mapping[str, Any], source: Source) -> Sample:
    name, kinds = members.name, sorted(members.pictures)
    if not kinds:
        shown = ", ".join(members.others[:SHOWN])
        others = f" Its other files: {shown}; a name ends at its first dot." if shown else ""
        raise DataError(
            f"{members.where} has no image; a file {name}.{source.columns.get('image', 'jpg')}, or "
            f"of another kind of image, is expected.{others}"
        )
    if len(kinds) > 1:
        raise DataError(
            f"{members.where} has {len(kinds)} images ({', '.join(kinds)}); name the right one, "
            f"for example {{image: {kinds[0]}}}.",
            argument="columns",
        )
    label, whole = _label(members, stated.get(_label_key(source)))
    domain, group = (stated.get(source.columns.get(each, each)) for each in OPTIONAL)
    return Sample(
        f"{members.shard.stem}/{name}",
        members.pictures[kinds[0]],
        label,
        whole,
        None if domain is None else str(domain),
        None if group is None else str(group),
    )


def _label(members: Members, stated: object) -> tuple[str, bool]:
    """(the label of a sample as it is written, whether it is a whole number)."""
    texts, name = members.texts, members.name
    if "cls" in texts:
        label, whole = texts["cls"], is_whole(texts["cls"])
    elif isinstance(stated, int) and not isinstance(stated, bool):
        label, whole = str(stated), True
    elif isinstance(stated, str):
        label, whole = stated, False
    elif stated is not None and "txt" not in texts:
        raise DataError(
            f"{members.where} has the label {str(stated)[:SHOWN_CHARACTERS]!r} in {name}.json; a "
            "whole number or a text is expected."
        )
    else:
        label, whole = texts.get("txt", ""), False
    if not label.strip():
        raise DataError(
            f"{members.where} has no label; a file {name}.cls, or {name}.json with a key label, is "
            "expected."
        )
    return label, whole
