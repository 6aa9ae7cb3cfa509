"""Which files of a folder are images, and which are left out."""

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
LINKED_FOLDER = "linked folder"
HIDDEN_FOLDER = "hidden folder of images"
IMAGE_NAMED_FOLDER = "folder without images, named like an image"


@dataclass
class LeftOut:
    """Files that a search leaves out, counted by kind, with an example of each kind."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Counts a file of a kind: `hidden`, or the suffix of its name."""
        kind = kind if kind.isprintable() else repr(kind)[1:-1]
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.examples.setdefault(kind, example)

    def merge(self, other: LeftOut, folder: str = "") -> None:
        """Adds the files of another search, whose examples are relative to `folder`."""
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            self.examples.setdefault(kind, f"{folder}{other.examples[kind]}")

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """Such as `3 files that end in .heic (a/1.heic) and 1 hidden (a/._1.jpg)`."""
        kinds = sorted(self.counts, key=lambda kind: (-self.counts[kind], kind))
        parts = [
            f"{self.counts[kind]:,} {_describe(kind, self.counts[kind])} ({self.examples[kind]!r})"
            for kind in kinds[:SHOWN]
        ]
        if len(kinds) > SHOWN:
            rest = sum(self.counts[kind] for kind in kinds[SHOWN:])
            parts.append(f"{rest:,} of {len(kinds) - SHOWN} other kinds")
        if not parts:
            return "nothing"
        return ", ".join(parts[:-1]) + " and " * (len(parts) > 1) + parts[-1]


def _describe(kind: str, count: int) -> str:
    if kind in (LINKED_FOLDER, HIDDEN_FOLDER, IMAGE_NAMED_FOLDER) and count > 1:
        return kind.replace("folder", "folders", 1)
    if not kind.startswith("."):
        return kind
    return f"that end{'s' * (count == 1)} in {kind}" if kind != "." else "without an ending"


def known_suffixes() -> str:
    """The suffixes of images, for messages: the common ones, and the number of others."""
    return f"{', '.join(COMMON)} or one of {len(IMAGE_SUFFIXES) - len(COMMON)} others"


def is_picture_name(name: str) -> bool:
    """Whether a file's name ends like an image's and is not hidden, as `._a.jpg` is."""
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 (hot)
    return not name.startswith(".") and suffix in IMAGE_SUFFIXES


def walk_images(folder: Path, left_out: LeftOut) -> Iterator[str]:
    """Paths of the images below a folder, sorted by name, folder by folder.

    Links to folders are not followed. Links to files are checked where the files are opened.

    - `left_out`: gets the files that are not images.
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
            continue  # a temporary file of this package
        if entry.name.startswith("."):
            left_out.add("hidden", name)
        elif entry.is_dir(follow_symlinks=False):
            images = _walk(entry.path, top, left_out)
            yield from count_empty(images, entry.name, name, left_out)
        elif is_picture_name(entry.name) and not _is_folder(entry):
            yield entry.path
        else:
            suffix = Path(entry.name).suffix.lower() or "."
            left_out.add(LINKED_FOLDER if _is_folder(entry) else suffix, name)


def count_empty(images: Iterator[str], name: str, example: str, left_out: LeftOut) -> Iterator[str]:
    """The images of a folder; a folder without any whose `name` is an image's is counted."""
    empty = True
    for image in images:
        empty = False
        yield image
    if empty and is_picture_name(name):
        left_out.add(IMAGE_NAMED_FOLDER, example)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False
