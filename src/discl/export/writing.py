"""Writes an export whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import RecipeError, StoreError, unknown
from ..utils.atomic import write_out_all, write_out_names
from .formats import FORMATS, Image

MARKER = ".discl-export.json"
"""Says that a folder is an export, and of what; only such a folder is ever replaced."""


def is_there(out: Path, fingerprint: str) -> bool:
    """Whether `out` holds just this export. Raises StoreError where it holds anything that is no export."""
    if not out.exists() and not out.is_symlink():
        return False
    if not out.is_dir():
        raise StoreError(f"{out} is a file; name a folder with --out.")
    if not any(out.iterdir()):
        return False
    try:
        return json.loads((out / MARKER).read_text())["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{out} is not empty and holds no export of discl; name another folder with --out, or empty it."
        ) from error


def export_images(
    out: Path,
    kind: str,
    images: Iterable[Image],
    class_names: Sequence[str],
    card: str,
    fingerprint: str,
) -> Path:
    """Writes images in one of `FORMATS` with `README.md` into the folder `out` and returns it; an older export there is replaced.

    `fingerprint` says what is exported: where it is there already, nothing is done. Raises RecipeError for an unknown format, and
    StoreError for a folder that holds something else or a disk that refuses, and passes on that of `images`; `out` is then as it was.
    """
    if kind not in FORMATS:
        raise RecipeError(unknown("format", kind, FORMATS))
    if is_there(out, fingerprint):
        return out
    place = out.resolve()
    unfinished, old = (place.with_name(f".{place.name}.{state}") for state in ("unfinished", "old"))
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (unfinished, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        unfinished.mkdir()
        FORMATS[kind](unfinished, images, class_names)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        (unfinished / MARKER).write_text(
            json.dumps({"format": kind, "fingerprint": fingerprint}), encoding="utf-8"
        )
        write_out_all(unfinished)
        _take_place(unfinished, place, old)
        write_out_names(place.parent)
    except (OSError, StoreError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if old.exists() and not place.exists():
            old.rename(place)
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"cannot write the export to {out}: {error}. Mend the cause and run the same command again."
        ) from error
    return out


def _take_place(unfinished: Path, place: Path, old: Path) -> None:
    """Puts the finished folder where an older one may be. The folder that one is in stays, with other contents, or one would be nowhere."""
    if place.exists() and place.samefile("."):
        old.mkdir()
        for each in sorted(place.iterdir(), key=lambda file: file.name != MARKER):
            each.rename(old / each.name)
        for each in sorted(unfinished.iterdir(), key=lambda file: file.name == MARKER):
            each.rename(place / each.name)
        unfinished.rmdir()
    else:
        if place.exists():
            place.rename(old)
        unfinished.rename(place)
    if old.exists():
        shutil.rmtree(old)
