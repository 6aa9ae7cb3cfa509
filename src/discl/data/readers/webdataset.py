"""WebDataset tars."""

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
from ..listing import IMAGE_SUFFIXES
from ..table import OPTIONAL, ImageTable
from .building import SPLIT_NAMES, Source, build_table, expected, files_below, refuse_escape
from .labels import is_whole, name_numbers
from .opening import parse_json, plain_file

BLOCK = 512
PLAIN_FILE = b"0\0"
LABELS = ("cls", "json", "txt")
SHOWN = 5


def read_webdataset(source: Source) -> dict[str, ImageTable]:
    """Tar shards in which files that share a name belong together: an image, and `.cls` (a label) or `.json` ({label, domain, group}).

    Shards are indexed, not unpacked: an image is read from its place in the tar. A shard's split is its name up to the first
    "-" (`train-000000.tar`); other shards are `train`. `.txt` or `.json` may hold a class by name. As webdataset has it, a sample's name
    goes to the first dot of a file's name, and the rest says what the file is; `data.columns.image` names the rest of the picture where a
    sample has several. Hidden files, and others that are no picture or label of one, are counted and left out.
    """
    by_split: dict[str, list[Path]] = {}
    known = {name for names in SPLIT_NAMES.values() for name in names} | set(source.splits.values())
    shards = [source.path] if source.path.is_file() else files_below(source.path, "*.tar")
    if not shards:
        raise DataError(expected(source, "webdataset"))
    refuse_escape(shards, source.folder)
    for shard in shards:
        split = next(
            (part for part in (shard.stem.split("-")[0], shard.parent.name) if part in known),
            "train",
        )
        if not source.leaves_out(split):
            by_split.setdefault(split, []).append(shard)
    found = {
        split: [sample for shard in files for sample in _index_shard(shard, source)]
        for split, files in by_split.items()
    }
    names = _class_names([sample for samples in found.values() for sample in samples], source.root)
    label_of = {name: label for label, name in enumerate(names)}
    stated = [
        name
        for name in OPTIONAL
        if any(
            getattr(sample, name) is not None for samples in found.values() for sample in samples
        )
    ]
    return {
        split: build_table(
            [sample.path for sample in samples], np.asarray([label_of[sample.label] for sample in samples], np.int64),
            names, [sample.id for sample in samples], source.folder, None, (SLICE,),
            **{name: [getattr(each, name) for each in samples] for name in stated},
        )
        for split, samples in found.items()
    }  # fmt: skip


class Sample(NamedTuple):
    """Id, address of the picture, label as written, whether that is a whole number; domain and group where the JSON states them."""

    id: str
    path: str
    label: str
    whole: bool
    domain: str | None
    group: str | None


@dataclass
class Members:
    """What a tar holds of a sample: addresses of its pictures and texts of its labels by suffix, and the names of its other files."""

    pictures: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def _class_names(samples: Sequence[Sample], root: str) -> tuple[str, ...]:
    whole = {sample.label for sample in samples if sample.whole}
    texts = {sample.label for sample in samples if not sample.whole}
    if whole and texts:
        raise DataError(
            f"data.root '{root}': labels are texts in some samples and numbers in others "
            f"('{min(texts)}' and {min(whole)})."
        )
    return name_numbers(whole, f"data.root '{root}'") if whole else tuple(sorted(texts))


def _index_shard(shard: Path, source: Source) -> list[Sample]:
    """The samples of a shard. Raises DataError for one without an image or a label, and for a shard without samples."""
    samples: dict[str, Members] = {}
    picture = source.columns.get("image")
    try:
        with (
            plain_file(shard).open("rb") as stream,
            mmap(stream.fileno(), 0, access=ACCESS_READ) as content,
        ):
            for name, place, size in _plain_members(content) or _members(shard):
                if not 0 <= place <= place + size <= len(content):
                    raise DataError(f"{shard} is cut off: '{name}' goes beyond its end.")
                folder, _, base = name.rpartition("/")
                if _is_hidden(name):
                    source.unread.add("hidden", name)
                    continue
                key, _, suffix = base.partition(".")
                members = samples.setdefault(f"{folder}/{key}" if folder else key, Members())
                kept: dict[str, str]
                if suffix == picture or (not picture and "." + suffix.lower() in IMAGE_SUFFIXES):
                    kept, value = members.pictures, slice_address(place, size, shard)
                elif suffix.lower() in LABELS:
                    suffix = suffix.lower()
                    kept, value = members.texts, _decode(content[place : place + size], name, shard)
                else:
                    members.others.append(name)
                    continue
                if suffix in kept:
                    raise DataError(f"{shard}: '{name}' stands twice; remove one of the two.")
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
    found = []
    for key, members in samples.items():
        stated = _stated(members, key, shard)
        if not members.pictures and "cls" not in members.texts and _label_key(source) not in stated:
            for name in (*members.others, *(f"{key}.{suffix}" for suffix in members.texts)):
                source.unread.add("that belong to no sample", name)
        else:
            found.append(_sample(members, stated, key, shard, source))
            for name in members.others:
                source.unread.add(f".{name.rpartition('.')[2].lower()}", name)
    if not found:
        raise DataError(f"{shard} holds no samples.")
    return found


def _is_hidden(name: str) -> bool:
    """Whether a file is one of the system's and not of the data: `._a.jpg`, `.DS_Store`, `__MACOSX/…`."""
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
    """Name, place and size of each file in a tar of any kind."""
    before = -1
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            if member.offset <= before or member.size < 0:  # it would be read again without end
                raise ValueError(f"'{member.name}' has a size that leads backwards")
            before = member.offset
            if member.isfile():
                yield member.name, member.offset_data, member.size


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
        try:
            name = header[:100].partition(b"\0")[0].decode()
        except UnicodeDecodeError:
            return None
        found.append((name, place + BLOCK, taken))
        place += BLOCK + -(-taken // BLOCK) * BLOCK
    return None


def _label_key(source: Source) -> str:
    return source.columns.get("label", "label")


def _stated(members: Members, name: str, shard: Path) -> Mapping[str, Any]:
    """What the JSON of a sample says."""
    if "json" not in members.texts:
        return {}
    stated = parse_json(members.texts["json"], f"{shard}: {name}.json")
    if not isinstance(stated, dict):
        raise DataError(f"{shard}: {name}.json holds no JSON object: {str(stated)[:80]}.")
    return stated


def _sample(
    members: Members, stated: Mapping[str, Any], name: str, shard: Path, source: Source
) -> Sample:
    if not members.pictures:
        others = (
            f" Its other files: {', '.join(members.others[:SHOWN])}; a name goes to its first dot."
            if members.others
            else ""
        )
        raise DataError(
            f"{shard}: sample '{name}' has no image; a file {name}.{source.columns.get('image', 'jpg')}, or of another kind of image, "
            f"is expected.{others}"
        )
    if len(members.pictures) > 1:
        kinds = sorted(members.pictures)
        raise DataError(
            f"{shard}: sample '{name}' has {len(kinds)} pictures ({', '.join(kinds)}); say which one it is, for example "
            f"data.columns: {{image: {kinds[0]}}}."
        )
    label, whole = _label(members.texts, stated.get(_label_key(source)), name, shard)
    domain, group = (stated.get(source.columns.get(each, each)) for each in OPTIONAL)
    return Sample(
        f"{shard.stem}/{name}",
        next(iter(members.pictures.values())),
        label,
        whole,
        *(None if value is None else str(value) for value in (domain, group)),
    )


def _label(texts: Mapping[str, str], stated: object, name: str, shard: Path) -> tuple[str, bool]:
    """The label of a sample as it is written, and whether it is a whole number."""
    if "cls" in texts:
        label, whole = texts["cls"], is_whole(texts["cls"])
    elif isinstance(stated, int) and not isinstance(stated, bool):
        label, whole = str(stated), True
    elif isinstance(stated, str):
        label, whole = stated, False
    elif stated is not None and "txt" not in texts:
        raise DataError(
            f"{shard}: sample '{name}' has the label {str(stated)[:80]!r} in {name}.json; a whole number or a text is expected."
        )
    else:
        label, whole = texts.get("txt", ""), False
    if not label.strip():
        raise DataError(
            f"{shard}: sample '{name}' has no label; a file {name}.cls, or {name}.json with a key label, is expected."
        )
    return label, whole
