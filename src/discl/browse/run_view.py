"""`RunView`: what a run folder holds at the moment, for the page of `discl browse`.

It reads the files of the folder, not a `Run`, because the first picture shows before torch and
`datasets` could be imported. They are imported with the first real image.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BrokenFileError, DisclError, RunError
from ..run_folder import paths
from ..run_folder.locks import owners_of
from ..run_folder.overrides import LOCK, Override, change_overrides, read_overrides
from ..spectrum.embeddings import Neighbours
from ..spectrum.lookup import Lookup
from ..spectrum.store import score_shards
from ..utils.bounded_cache import BoundedCache
from ..utils.hashing import digest
from .pictures import Encoded, encode_picture, encode_stored
from .recipe import read_tree, rule_of
from .rows import (
    MOST_METHODS,
    MethodRule,
    Rows,
    as_letters,
    hand_columns,
    pack_columns,
    read_rows,
)

if TYPE_CHECKING:
    from ..stages.browse import RealImages

REMOTE_PAUSE = 15.0
"""Seconds between two listings of a store in a bucket."""
LOCAL_PAUSE = 0.5
RETRY_PAUSE = 10.0
"""Seconds until data that could not be opened is tried again."""
MOST_CLASSES = 100_000
THUMBNAILS = 48 * 2**20
"""Bytes of pictures that stay in memory."""
OF_ROWS = (paths.RECIPE, paths.DATA, paths.HARD, paths.PLAN, paths.FILTER)
PAGE_FILES = {
    "levels": (f"{paths.LEVELS}/{paths.LEVELS_DATA}",),
    "audit": (paths.AUDIT,),
    "comparison": (paths.COMPARISON_DATA, paths.RESULTS),
}
"""Files that a page shows, the first that exists. A run without a comparison has its results."""


class RunView:
    """A run folder that is looked at, while other processes may work in it.

    - `folder`: the run folder.
    - `amend`: does what `discl filter --amend` does with these values of the recipe.

    Attributes:

    - `store_problem`: why the store cannot be listed; empty where it can.
    - `neighbours`: the nearest images in CLIP space.

    Raises RunError for a folder without a recipe, and BrokenFileError for a broken one.
    """

    def __init__(self, folder: Path, amend: Callable[[Mapping[str, Any]], None]) -> None:
        if not (folder / paths.RECIPE).is_file():
            usual = Path("runs") / folder.stem
            hint = usual if (usual / paths.RECIPE).is_file() else "runs/NAME"
            raise RunError(
                f"{folder} is no run folder: it has no {paths.RECIPE}. Name the folder of a run, "
                f"such as {hint}."
            )
        self.folder, self.recipe_path, self.amend = folder, folder / paths.RECIPE, amend
        self._recipe_stamp: list[int] | None = None
        self._tree: dict[str, Any] = {}
        self._lock, self._opening = threading.RLock(), threading.Lock()
        self._amending = threading.Lock()
        self._listed: tuple[float, list[PurePath], list[PurePath]] = (-1e9, [], [])
        self._rows: tuple[str, Rows] | None = None
        self.store_problem = ""
        self._pictures: BoundedCache[Encoded] = BoundedCache(
            THUMBNAILS, lambda encoded: len(encoded.data)
        )
        self._lookup: Lookup | None = None
        self._real: RealImages | None = None
        self._real_problem: tuple[float, DisclError] | None = None
        self.neighbours = Neighbours(folder / paths.PILOT / paths.CACHED_EMBEDDINGS)
        self._packed: tuple[str, bytes] | None = None
        self._refresh()

    # ------------------------------------------------------------ recipe and store

    @property
    def tree(self) -> dict[str, Any]:
        """The recipe as a plain tree with its defaults."""
        self._refresh()
        return self._tree

    def _refresh(self) -> None:
        """Reads the recipe if its file is new; it may name another store."""
        stamp = _stat(self.recipe_path)
        with self._lock:
            if stamp != self._recipe_stamp:
                self._tree = read_tree(self.recipe_path)
                self._recipe_stamp = stamp
                self._lookup = self._real = self._real_problem = None

    def location(self, name: str) -> Path | str:
        """Folder or address of shards."""
        store = self.tree["runtime"].get("store")
        return self.folder / name if store is None else f"{store.rstrip('/')}/{name}"

    @property
    def lookup(self) -> Lookup:
        """Where the images of the store are."""
        found = self._lookup
        if found is None:
            self._listed = (-1e9, [], [])
            found = self._lookup = Lookup(self.location(paths.SPECTRUM))
        return found

    def _files(self) -> tuple[list[PurePath], list[PurePath]]:
        """The shards of images and of scores; those of a bucket are listed four times a minute."""
        then, files, scores = self._listed
        pause = LOCAL_PAUSE if isinstance(self.location(paths.SPECTRUM), Path) else REMOTE_PAUSE
        if time.monotonic() - then > pause:
            try:
                lookup = self.lookup
                files, self.store_problem = list(lookup.shards.files()), ""
                scores = list(score_shards(self.location(paths.SCORES)).files())
            except DisclError as error:
                self.store_problem = str(error)
            self._listed = (time.monotonic(), files, scores)
        return files, scores

    # ------------------------------------------------------------ what changes

    def stamps(self) -> dict[str, str]:
        """Stamps of everything, of the rows and of the overrides; they change with their files."""
        with self._lock:
            self._refresh()
            files = [str(file) for part in self._files() for file in part]
            rows = digest(files, [_stat(self.folder / name) for name in OF_ROWS])
            overrides = digest(_stat(self.folder / paths.OVERRIDES))
            more = [_stat(self.folder / name) for names in PAGE_FILES.values() for name in names]
        stamp = digest(rows, overrides, more)
        return {"stamp": stamp, "rows_stamp": rows, "overrides_stamp": overrides}

    def rows(self) -> Rows:
        """The images at the moment."""
        with self._lock:
            stamp = self.stamps()["rows_stamp"]
            if self._rows is not None and self._rows[0] == stamp:
                return self._rows[1]
            scores = score_shards("none").schema.empty_table()
            try:
                self.lookup.refresh(self._files()[0])
                scores = score_shards(self.location(paths.SCORES)).read()
            except DisclError as error:
                self.store_problem = str(error)
            rows = read_rows(self.folder, self.lookup.table, scores)
            self._rows = (stamp, rows)
            return rows

    def overrides(self) -> Mapping[str, Override]:
        """What was done by hand. Raises BrokenFileError."""
        return read_overrides(self.folder)

    def change(self, changes: Sequence[tuple[str, Override]]) -> dict[str, str]:
        """Writes overrides; returns the new stamps."""
        change_overrides(self.folder, changes)
        return self.stamps()

    def columns(self) -> bytes:
        """What `/api/columns` answers."""
        with self._lock:
            stamps, rows = self.stamps(), self.rows()
            key = digest(stamps)
            if self._packed is not None and self._packed[0] == key:
                return self._packed[1]
            hand, tag, tags = hand_columns(rows, self.known_overrides()[0])
            numbers = rows.columns
            used = np.zeros(len(rows), np.uint32)
            methods = self.methods()[:MOST_METHODS]
            for place, rule in enumerate(methods):
                drawn = rule.draws(numbers["level"], numbers["score"], numbers["verdict"])
                used |= drawn.astype(np.uint32) << np.uint32(place)
            head = {
                **stamps,
                "rows": len(rows),
                "prompts": rows.prompts,
                "tags": tags,
                "methods": [rule.name for rule in methods],
                "sources": len(rows.source_ids),
            }
            columns = {
                "id": as_letters(rows.ids),
                **numbers,
                "hand": hand,
                "tag": tag,
                "used": used,
                "source_digest": as_letters(rows.source_digests),
            }
            self._packed = (key, pack_columns(head, columns))
            return self._packed[1]

    # ------------------------------------------------------------ pictures

    def picture(self, name: str, thumb: bool) -> Encoded | None:
        """A synthetic picture; None if the store does not have it.

        Raises StoreError or Unreadable for one that cannot be shown.
        """
        self.rows()
        if self.lookup.find(name) is None:
            return None

        def make() -> Encoded:
            stored = self.lookup.find(name) or {}
            return encode_stored(stored.get("image"), thumb)

        return self._pictures.get((name, thumb), make)

    def real_picture(self, content: str, thumb: bool) -> Encoded | None:
        """A real picture by the digest of its pixels; None for an unknown one.

        Raises DataError or RunError for one that cannot be shown.
        """
        real = self.real()
        if content not in real:
            return None
        return self._pictures.get(
            (content, thumb, "real"), lambda: encode_picture(real.picture(content), thumb)
        )

    def real(self) -> RealImages:
        """The real images. Raises DisclError where the data cannot be opened."""
        with self._opening:
            failed, problem = self._real_problem or (-1e9, None)
            if problem is not None and time.monotonic() - failed < RETRY_PAUSE:
                raise problem
            if self._real is None:
                from ..stages.browse import RealImages

                try:
                    self._real, self._real_problem = RealImages(self.folder), None
                except DisclError as error:
                    self._real_problem = (time.monotonic(), error)
                    raise
            return self._real

    @property
    def real_problem(self) -> DisclError | None:
        """Why the data could not be opened the last time."""
        return None if self._real_problem is None else self._real_problem[1]

    # ------------------------------------------------------------ the recipe in words

    def class_names(self, rows: Rows) -> list[str]:
        """Names of the classes, by label.

        They are those of the store where its labels are the plan's, which saves opening the data.
        """
        stored = self.lookup.class_names
        if stored and rows.same_labels:
            return stored
        try:
            return list(self.real().class_names)
        except DisclError:
            labels = [*rows.columns["class"].tolist(), *rows.source_labels.tolist()]
            return [f"class {label}" for label in range(min(max([-1, *labels]) + 1, MOST_CLASSES))]

    def methods(self) -> list[MethodRule]:
        """Which images each method may draw, in the order of the recipe."""
        return [rule_of(name, method, self.tree) for name, method in self.tree["methods"].items()]

    def has_page(self, name: str) -> bool:
        return any((self.folder / file).is_file() for file in PAGE_FILES[name])

    def is_generating(self) -> bool:
        """Whether another process makes images now."""
        return any(
            owner.what.split()[0] in {"generate", "loop"} for owner in owners_of(self.folder)
        )

    def command(self, *words: str) -> str:
        """A command on this run, to copy."""
        stage, *more = words
        parts = [stage, str(self.recipe_path), "--out", str(self.folder), *more]
        return "discl " + " ".join(map(shlex.quote, parts))

    def filter_again(self, changes: Mapping[str, Any]) -> None:
        """Filters with other values of the recipe, or with the overrides alone.

        Raises RunError while this or another process changes the run.
        """
        busy = [owner for owner in owners_of(self.folder) if owner.what != LOCK]
        if not self._amending.acquire(blocking=False):
            raise RunError("the filter runs already; wait for its end.")
        try:
            if busy:
                raise RunError(f"{busy[0]} works in this folder; wait for its end.")
            self.amend(changes)
        finally:
            self._amending.release()
            self._real = self._real_problem = None

    def known_overrides(self) -> tuple[Mapping[str, Override], str | None]:
        """(the overrides, why they cannot be read)."""
        try:
            return self.overrides(), None
        except BrokenFileError as error:
            return {}, str(error)


def _stat(path: Path) -> list[int]:
    """Time and size of a file; empty where it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_mtime_ns, found.st_size]


def name_of(classes: Sequence[str], label: int) -> str:
    """The name of a class, whatever label a file states."""
    return classes[label] if 0 <= label < len(classes) else f"class {label}"
