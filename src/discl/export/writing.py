"""Writes an export completely or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from ..errors import RecipeError, StoreError, unknown
from ..utils.atomic import write_out_all, write_out_names
from .formats import FORMATS, Image
from .marks import mark_synthetic

MARKER = ".discl-export.json"
"""Marks a folder as an export, with its fingerprint. Only such a folder is ever replaced."""


def holds_export(out: Path, fingerprint: str) -> bool:
    """Whether `out` holds exactly this export.

    Raises StoreError where it holds something other than an export.
    """
    if not out.exists() and not out.is_symlink():
        return False
    if not out.is_dir():
        raise StoreError(f"{out} is a file; name a folder (--out).", argument="out")
    if not any(out.iterdir()):
        return False
    try:
        return json.loads((out / MARKER).read_text())["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{out} is not empty and holds no export of discl; name another folder (--out), or "
            "empty it.",
            argument="out",
        ) from error


def export_images(
    out: Path,
    kind: str,
    images: Iterable[Image],
    *,
    class_names: Sequence[str],
    card: str,
    fingerprint: str,
    marks: bool = True,
    sign: Callable[[bytes, str], bytes] | None = None,
) -> Path:
    """Writes images and a card into the folder `out`, and returns it.

    - `out`: an older export there is replaced.
    - `kind`: a name in `FORMATS`.
    - `images`: mappings as described in `formats`.
    - `class_names`: by label.
    - `card`: text of `README.md`.
    - `fingerprint`: of the content. Nothing is done where `out` has it already.
    - `marks`: whether each image says that it is synthetic; see `mark_synthetic`.
    - `sign`: signs an image, given its id; see `signing.ContentSigner`.

    Raises RecipeError for an unknown format, StoreError for a folder with other content or a
    failing disk, and the errors of `images`. `out` is then unchanged.
    """
    if kind not in FORMATS:
        raise RecipeError(unknown("format", kind, FORMATS), argument="kind")
    if holds_export(out, fingerprint):
        return out
    target = out.resolve()
    unfinished, old = (
        target.with_name(f".{target.name}.{state}") for state in ("unfinished", "old")
    )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in (unfinished, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        unfinished.mkdir()
        FORMATS[kind](unfinished, _finished(images, marks, sign), class_names)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        (unfinished / MARKER).write_text(
            json.dumps({"format": kind, "fingerprint": fingerprint}), encoding="utf-8"
        )
        write_out_all(unfinished)
        _replace(target, unfinished, old)
        write_out_names(target.parent)
    except (OSError, StoreError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"cannot write the export to {out}: {error}. Fix the cause and run the same command "
            "again."
        ) from error
    return out


def _finished(
    images: Iterable[Image], marks: bool, sign: Callable[[bytes, str], bytes] | None
) -> Iterator[Image]:
    """The images as they leave: marked, then signed, because a signature covers the mark."""
    for image in images:
        data, name = image["bytes"], image["id"]
        if marks:
            data = mark_synthetic(data, name)
        if sign is not None:
            data = sign(data, name)
        yield {**image, "bytes": data}


def _replace(target: Path, unfinished: Path, old: Path) -> None:
    """Moves the finished folder to its target, where an older one may be.

    If the target is the working directory, the folder itself stays and its content is exchanged.
    """
    if target.exists() and target.samefile("."):
        old.mkdir()
        for each in sorted(target.iterdir(), key=lambda file: file.name != MARKER):
            each.rename(old / each.name)
        for each in sorted(unfinished.iterdir(), key=lambda file: file.name == MARKER):
            each.rename(target / each.name)
        unfinished.rmdir()
    else:
        if target.exists():
            target.rename(old)
        unfinished.rename(target)
    if old.exists():
        shutil.rmtree(old)
