"""Images that a person keeps, drops or tags by hand: `overrides.csv` of a run folder.

A person can review the file, edit it, and copy it to another run of the same images: ids are
digests of all that determines an image. Rows of images that a run does not have stay in it.
"""

from __future__ import annotations

import csv
import io
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..escaping import FORMULA, HIDDEN, for_csv
from ..utils.stored import broken, read_text, write_text
from . import paths
from .locks import lock

KEEP, DROP, NONE = "keep", "drop", "none"
BY_HAND = "by hand"
"""The filter's reason for an image that was kept or dropped by hand."""
COLUMNS = ("id", "verdict", "reason", "tag")
MOST = {"id": 200, "reason": 500, "tag": 60}
"""Characters of a text, at most."""
MARKED = re.compile(f"'+[{re.escape(''.join(FORMULA))}]")
"""Beginning of a cell whose apostrophe `for_csv` has put there."""
FIX = "Correct that line, or delete the file to forget what was done by hand."
LOCK = "overrides"
"""What the lock of a change is for; it excludes other changes only."""
_writing = threading.Lock()


@dataclass(frozen=True)
class Override:
    """What a person says about an image.

    - `verdict`: `keep`, `drop` or `none`, whatever the filter says.
    - `tag`: a short word for a group of images.
    - `reason`: a note.

    Raises DataError for another verdict, for a text that is too long, and for control characters.
    """

    verdict: str = NONE
    tag: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in (KEEP, DROP, NONE):
            raise DataError(
                f"got {self.verdict[:40]!r}; allowed: {KEEP}, {DROP}, {NONE}.", argument="verdict"
            )
        for name, text in (("tag", self.tag), ("reason", self.reason)):
            check_text(name, text)

    @property
    def is_empty(self) -> bool:
        return self == Override(reason=self.reason)


def check_text(name: str, text: str) -> None:
    """Raises DataError for a text of an override that is too long or has control characters."""
    if len(text) > MOST[name]:
        raise DataError(f"has {len(text)} characters; allowed: {MOST[name]}.", argument=name)
    if found := HIDDEN.search(text):
        raise DataError(f"has the control character {found.group()!r}; remove it.", argument=name)


def read_overrides(folder: Path) -> dict[str, Override]:
    """`{id: override}` of a run folder, in the order of the file; empty without one.

    The last row of an id counts. Columns may be in any order, and all but `id` may be missing.
    Raises BrokenFileError that names the line.
    """
    path = folder / paths.OVERRIDES
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return {}
    text = read_text(path, FIX).removeprefix("\ufeff")
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    found: dict[str, Override] = {}
    try:
        names = rows.fieldnames or []
        if "id" not in names:
            raise broken(path, f"has no column 'id'; expected {', '.join(COLUMNS)}", FIX)
        for row in rows:
            cells = {name: _from_cell(row.get(name) or "") for name in COLUMNS}
            if None in row or not cells["id"].strip():
                what = "more cells than columns" if None in row else "no id"
                raise broken(path, f"line {rows.line_num} has {what}", FIX)
            name = cells["id"].strip()
            check_text("id", name)
            found.pop(name, None)
            verdict = cells["verdict"].strip().lower() or NONE
            found[name] = Override(verdict, cells["tag"], cells["reason"])
    except DataError as error:
        raise broken(path, f"line {rows.line_num}: {str(error).rstrip('.')}", FIX) from error
    except csv.Error as error:
        raise broken(path, f"line {rows.line_num} is no CSV ({error})", FIX) from error
    return found


def change_overrides(
    folder: Path, changes: Iterable[tuple[str, Override]]
) -> Mapping[str, Override]:
    """Writes overrides of some images and returns all; those without verdict and tag are removed.

    Processes that write at once take turns, so that no change is lost.

    Raises BrokenFileError where the file that exists cannot be read, and WriteError.
    """
    with _writing, lock(folder, LOCK, lambda other: other == LOCK):
        found = read_overrides(folder)
        for name, override in changes:
            if override.is_empty:
                found.pop(name, None)
            else:
                found[name] = override
        write_text(folder / paths.OVERRIDES, _as_csv(found))
    return found


def _as_csv(overrides: Mapping[str, Override]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, each in overrides.items():
        verdict = "" if each.verdict == NONE else each.verdict
        cells = (name, verdict, each.reason, each.tag)
        writer.writerow([_to_cell(cell) for cell in cells])
    return text.getvalue()


def _to_cell(text: str) -> str:
    """As `for_csv`, such that `_from_cell` returns the same text."""
    return f"'{text}" if MARKED.match(text) else for_csv(text)


def _from_cell(text: str) -> str:
    return text[1:] if MARKED.match(text) else text
