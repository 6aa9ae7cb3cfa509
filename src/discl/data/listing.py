"""Which files of a folder are images, and what is left out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from ..utils.atomic import UNFINISHED
from .images import picture_suffixes

IMAGE_SUFFIXES = picture_suffixes()
COMMON = (".jpg", ".png", ".webp", ".tif", ".bmp", ".gif")
SHOWN = 6


@dataclass
class LeftOut:
    """Files that a search leaves out, counted, with an example of each kind."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Counts a file of a kind: `hidden`, or the ending of its name."""
        kind = kind if kind.isprintable() else repr(kind)[1:-1]
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.examples.setdefault(kind, example)

    def merge(self, other: LeftOut, folder: str = "") -> None:
        """Adds what another search left out, whose examples are relative to `folder`."""
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.examples.setdefault(kind, f"{folder}{other.examples[kind]}")

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """Such as `3 files that end in .heic (a/1.heic) and 1 hidden (a/._1.jpg)`."""
        kinds = sorted(self.counts, key=lambda kind: (-self.counts[kind], kind))
        told = [
            f"{self.counts[kind]:,} {_kind(kind, self.counts[kind])} ({self.examples[kind]!r})"
            for kind in kinds[:SHOWN]
        ]
        if len(kinds) > SHOWN:
            rest = sum(self.counts[kind] for kind in kinds[SHOWN:])
            told.append(f"{rest:,} of {len(kinds) - SHOWN} other kinds")
        return ", ".join(told[:-1]) + " and " * (len(told) > 1) + told[-1] if told else "nothing"


def _kind(kind: str, count: int) -> str:
    if not kind.startswith("."):
        return kind
    return f"that end{'s' * (count == 1)} in {kind}" if kind != "." else "without an ending"


def known_suffixes() -> str:
    """The endings of images, for messages: the common ones, and how many more there are."""
    return f"{', '.join(COMMON)} or one of {len(IMAGE_SUFFIXES) - len(COMMON)} others"


def is_picture_name(name: str) -> bool:
    """Whether a file's name ends like an image's and is not hidden, as `._a.jpg` is."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 (hot)


def walk_images(folder: Path, left_out: LeftOut) -> Iterator[str]:
    """Paths of the images below a folder, ordered by name, folder by folder; what is not taken goes to `left_out`.

    Links to folders are not followed; whether a link to a file may be followed is decided where it is opened.
    """
    yield from _walk(str(folder), str(folder), left_out)


def _walk(folder: str, top: str, left_out: LeftOut) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        left_out.add("folders that cannot be listed", f"{folder}: {error.strerror}")
        return
    for entry in listed:
        name = entry.path[len(top) :].lstrip(os.sep)
        if fnmatch(entry.name, UNFINISHED):
            continue  # a file of ours that is being written
        if entry.name.startswith("."):
            left_out.add("hidden", name)
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, top, left_out)
        elif is_picture_name(entry.name) and not _is_folder(entry):
            yield entry.path
        else:
            kind = "linked folders" if _is_folder(entry) else Path(entry.name).suffix.lower() or "."
            left_out.add(kind, name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False
