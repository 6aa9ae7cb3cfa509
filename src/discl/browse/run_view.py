"""`RunView`: what a run folder holds at the moment, for the page of `discl browse`.

It reads the files of the folder, not a `Run`, because the first picture shows before torch and
`datasets` could be imported. They are imported with the first real image.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..curriculum.strategies import Planned, RandomLevels, make_strategy
from ..data.long_tail import class_groups
from ..errors import BrokenFileError, DisclError, RecipeError, RunError
from ..levels import REAL
from ..run_folder import paths
from ..run_folder.locks import owners_of
from ..run_folder.overrides import Override, change_overrides, read_overrides
from ..spectrum.embeddings import Neighbours
from ..spectrum.lookup import Lookup
from ..spectrum.store import score_shards
from ..utils.bounded_cache import BoundedCache
from ..utils.counts import count_be, count_of
from ..utils.hashing import digest
from ..utils.stored import read_recipe_tree, read_table
from .pictures import Encoded, encode_picture, encode_stored
from .rows import (
    HAND,
    KEPT,
    KEPT_BY_HAND,
    MOST_METHODS,
    UNJUDGED,
    VERDICTS,
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
THUMBNAILS = 48 * 2**20
"""Bytes of pictures that stay in memory."""
OF_ROWS = (paths.RECIPE, paths.DATA, paths.HARD, paths.PLAN, paths.FILTER)
PAGES = {
    "levels": f"{paths.LEVELS}/{paths.LEVELS_DATA}",
    "audit": paths.AUDIT,
    "comparison": paths.COMPARISON_DATA,
}
"""Files of the pages. A run without a comparison shows its results there."""


class RunView:
    """A run folder that is looked at, while other processes may work in it.

    - `folder`: the run folder.
    - `amend`: does what `discl filter --amend` does with these values of the recipe.

    Raises RunError for a folder without a recipe, and BrokenFileError for a broken one.
    """

    def __init__(self, folder: Path, amend: Callable[[Mapping[str, Any]], None]) -> None:
        if not (folder / paths.RECIPE).is_file():
            raise RunError(
                f"{folder} is no run folder: it has no {paths.RECIPE}. Name the folder of a run, "
                "such as runs/NAME."
            )
        self.folder, self.amend = folder, amend
        self._recipe_stamp: list[int] | None = None
        self._tree: dict[str, Any] = {}
        self._lock, self._amending = threading.RLock(), threading.Lock()
        self._listed: tuple[float, list[PurePath]] = (-1e9, [])
        self._rows: tuple[str, Rows] | None = None
        self._store_problem = ""
        self._pictures: BoundedCache[Encoded] = BoundedCache(
            THUMBNAILS, lambda encoded: len(encoded.data)
        )
        self._real: RealImages | DisclError | None = None
        self.neighbours = Neighbours(folder / paths.PILOT / paths.CACHED_EMBEDDINGS)
        self._packed: tuple[str, bytes] | None = None
        self.tree  # noqa: B018 (a broken recipe is an error now)

    # ------------------------------------------------------------ recipe and store

    @property
    def tree(self) -> dict[str, Any]:
        """The recipe as a plain tree with its defaults."""
        stamp = _stat(self.folder / paths.RECIPE)
        with self._lock:
            if stamp != self._recipe_stamp:
                self._tree = _read_tree(self.folder / paths.RECIPE)
                self._recipe_stamp = stamp
                self.__dict__.pop("lookup", None)
            return self._tree

    @property
    def recipe_path(self) -> Path:
        return self.folder / paths.RECIPE

    def location(self, name: str) -> Path | str:
        """Folder or address of shards."""
        store = self.tree["runtime"].get("store")
        return self.folder / name if store is None else f"{store.rstrip('/')}/{name}"

    @cached_property
    def lookup(self) -> Lookup:
        """Where the images of the store are."""
        self._listed = (-1e9, [])
        return Lookup(self.location(paths.SPECTRUM))

    def _files(self) -> list[PurePath]:
        """The shards of the store; those of a bucket are listed four times a minute."""
        then, files = self._listed
        pause = LOCAL_PAUSE if isinstance(self.location(paths.SPECTRUM), Path) else REMOTE_PAUSE
        if time.monotonic() - then > pause:
            try:
                lookup = self.lookup
                files, self._store_problem = list(lookup.shards.files()), ""
            except DisclError as error:
                self._store_problem = str(error)
            self._listed = (time.monotonic(), files)
        return files

    # ------------------------------------------------------------ what changes

    def stamps(self) -> dict[str, str]:
        """Stamps of everything, of the rows and of the overrides; they change with their files."""
        with self._lock:
            self.tree  # noqa: B018 (a new recipe may name another store)
            files = [str(file) for file in self._files()]
            rows = digest(files, [_stat(self.folder / name) for name in OF_ROWS])
            overrides = digest(_stat(self.folder / paths.OVERRIDES))
            more = [_stat(self.folder / name) for name in (*PAGES.values(), paths.RESULTS)]
        stamp = digest(rows, overrides, more)
        return {"stamp": stamp, "rows_stamp": rows, "overrides_stamp": overrides}

    def rows(self) -> Rows:
        """The images at the moment."""
        with self._lock:
            stamp = self.stamps()["rows_stamp"]
            if self._rows is not None and self._rows[0] == stamp:
                return self._rows[1]
            stored, scores = pa.table({}), score_shards("none").schema.empty_table()
            try:
                self.lookup.refresh(self._files())
                scores = score_shards(self.location(paths.SCORES)).read()
            except DisclError as error:
                self._store_problem = str(error)
            stored = self.lookup.table
            rows = read_rows(self.folder, stored, scores)
            self._rows = (stamp, rows)
            return rows

    def overrides(self) -> Mapping[str, Override]:
        """What was done by hand. Raises BrokenFileError."""
        return read_overrides(self.folder)

    def change(self, changes: Sequence[tuple[str, Override]]) -> dict[str, str]:
        """Writes overrides; returns the new stamps."""
        change_overrides(self.folder, changes)
        return self.stamps()

    # ------------------------------------------------------------ answers

    def about(self) -> dict[str, Any]:
        """What `/api/run` answers."""
        rows, tree = self.rows(), self.tree
        classes = self.class_names(rows)
        counts = self._class_counts(len(classes))
        verdict = rows.columns["verdict"]
        groups = tree["groups"]
        hand, _, _ = hand_columns(rows, self._known_overrides()[0])
        return {
            "name": str(tree.get("name", "")),
            "folder": self.folder.resolve().name,
            **self.stamps(),
            "classes": classes,
            "class_counts": counts.tolist(),
            "hard_counts": _count(rows.source_labels, len(classes)).tolist(),
            "groups": class_groups(counts.tolist(), groups["many"], groups["few"]),
            "levels": sorted(tree["spectrum"]["levels"]),
            "rule": tree["filter"].get("rule", "threshold"),
            "threshold": tree["filter"]["threshold"],
            "level_thresholds": tree["filter"].get("level_thresholds") or {},
            "class_thresholds": tree["filter"].get("class_thresholds") or {},
            "methods": [vars(rule) for rule in self.methods()],
            "verdicts": list(VERDICTS),
            "hand": list(HAND),
            "counts": {
                "planned": len(rows.planned),
                "stored": len(rows),
                "judged": int((verdict != UNJUDGED).sum()),
                "kept": int(np.isin(verdict, (KEPT, KEPT_BY_HAND)).sum()),
                "by_hand": int((hand > 0).sum()),
            },
            "pages": {name: self.has_page(name) for name in PAGES},
            "neighbours": (self.folder / paths.PILOT / paths.CACHED_EMBEDDINGS).is_dir(),
            "generating": self.is_generating(),
            "notes": self._notes(rows),
        }

    def columns(self) -> bytes:
        """What `/api/columns` answers."""
        with self._lock:
            stamps, rows = self.stamps(), self.rows()
            key = digest(stamps)
            if self._packed is not None and self._packed[0] == key:
                return self._packed[1]
            hand, tag, tags = hand_columns(rows, self._known_overrides()[0])
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

    def row(self, name: str) -> dict[str, Any] | None:
        """What `/api/row/{id}` answers; None for an image that is not in the rows."""
        rows = self.rows()
        row = rows.row_of.get(name)
        if row is None:
            return None
        classes = self.class_names(rows)
        numbers = {key: column[row].item() for key, column in rows.columns.items()}
        override = self._known_overrides()[0].get(name, Override())
        stored, problem = self._stored(name)
        image = (stored.pop("image", None) or {}) if stored else {}
        source = numbers["source"]
        label = int(rows.source_labels[source])
        return {
            "id": name,
            "class": name_of(classes, numbers["class"]),
            **{key: numbers[key] for key in ("level", "seed", "try")},
            "prompt": rows.prompts[numbers["prompt"]],
            "negative_prompt": stored.get("negative_prompt") or "",
            "score": numbers["score"],
            "verdict": VERDICTS[numbers["verdict"]],
            "reason": rows.reasons[row],
            "hand": override.verdict,
            "tag": override.tag,
            "note": override.reason,
            "methods": [rule.name for rule in self.methods() if self._draws(rule, rows, row)],
            "round": self._rounds().get(name),
            "width": stored.get("width"),
            "height": stored.get("height"),
            "bytes": len(image.get("bytes") or b""),
            "image_digest": stored.get("image_digest"),
            "made": {key: stored[key] for key in sorted(stored) if key not in NOT_SHOWN},
            "problem": problem or self._picture_problem(name),
            "source": {
                "id": rows.source_ids[source],
                "digest": rows.source_digests[source],
                "class": name_of(classes, label) if label >= 0 else None,
                "found": bool(rows.source_digests[source]),
            },
            "siblings": [
                {"id": rows.ids[other]}
                | {key: rows.columns[key][other].item() for key in ("level", "seed", "try")}
                for other in rows.siblings(row)
                if other != row
            ],
        }

    def _draws(self, rule: MethodRule, rows: Rows, row: int) -> bool:
        chosen = (rows.columns[key][row : row + 1] for key in ("level", "score", "verdict"))
        return bool(rule.draws(*chosen)[0])

    def _rounds(self) -> Mapping[str, int]:
        """Round of each image of a loop; empty without one."""
        if not self.tree.get("loop"):
            return {}
        try:
            plan = read_table(self.folder / paths.PLAN, ["id", "round"])
        except BrokenFileError:
            return {}
        return dict(zip(plan["id"].to_pylist(), plan["round"].to_pylist(), strict=True))

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
        with self._lock:
            if self._real is None:
                from ..stages.browse import RealImages

                try:
                    self._real = RealImages(self.folder)
                except DisclError as error:
                    self._real = error
            if isinstance(self._real, DisclError):
                raise self._real
            return self._real

    def _stored(self, name: str) -> tuple[dict[str, Any], str | None]:
        try:
            return self.lookup.find(name) or {}, None
        except DisclError as error:
            return {}, str(error)

    def _picture_problem(self, name: str) -> str | None:
        try:
            self.picture(name, thumb=True)
        except DisclError as error:
            return str(error)
        return None

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
            highest = max([-1, *rows.columns["class"].tolist(), *rows.source_labels.tolist()])
            return [f"class {label}" for label in range(highest + 1)]

    def methods(self) -> list[MethodRule]:
        """Which images each method may draw, in the order of the recipe."""
        return [_rule_of(name, method, self.tree) for name, method in self.tree["methods"].items()]

    def has_page(self, name: str) -> bool:
        return (self.folder / PAGES[name]).is_file() or (
            name == "comparison" and (self.folder / paths.RESULTS).is_file()
        )

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
        busy = [owner for owner in owners_of(self.folder) if owner.what != "overrides"]
        if not self._amending.acquire(blocking=False):
            raise RunError("the filter runs already; wait for its end.")
        try:
            if busy:
                raise RunError(f"{busy[0]} works in this folder; wait for its end.")
            self.amend(changes)
        finally:
            self._amending.release()
            self._real = None

    def listed_images(self) -> dict[str, dict[str, Any]]:
        """id, class and split of each real image, by the digest of its pixels."""
        try:
            columns = ["split", "id", "digest", "label"]
            listed = read_table(self.folder / paths.DATA, columns).to_pydict()
        except BrokenFileError:
            return {}
        classes = self.class_names(self.rows())
        return {
            content: {"id": name, "class": name_of(classes, label), "split": split}
            for split, name, content, label in zip(*listed.values(), strict=True)
        }

    def _class_counts(self, classes: int) -> np.ndarray:
        try:
            listed = read_table(self.folder / paths.DATA, ["split", "label"])
        except BrokenFileError:
            return np.zeros(classes, np.int64)
        train = np.asarray(listed["split"].to_pylist()) == "train"
        return _count(listed["label"].to_numpy()[train], classes)

    def _known_overrides(self) -> tuple[Mapping[str, Override], str | None]:
        """(the overrides, why they cannot be read)."""
        try:
            return self.overrides(), None
        except BrokenFileError as error:
            return {}, str(error)

    def _notes(self, rows: Rows) -> list[str]:
        """What the page says above the images."""
        overrides, problem = self._known_overrides()
        notes = [*rows.problems, *self.lookup.problems.values()]
        notes += [text for text in (self._store_problem, problem) if text]
        if isinstance(self._real, DisclError):
            notes.append(f"real images cannot be shown: {self._real}")
        if not rows.planned:
            notes.append(f"there is no plan yet; run {self.command('generate')}")
        elif not len(rows):
            notes.append(f"no image is made yet; run {self.command('generate')}")
        if rows.others and rows.planned:
            notes.append(
                f"{count_of(rows.others, 'image')} of the store: of another plan, not shown"
            )
        unknown = sum(name not in rows.planned for name in overrides)
        if unknown:
            notes.append(
                f"{count_be(unknown, 'override')} for an image that this run does not have; they "
                f"stay in {paths.OVERRIDES}"
            )
        return notes


NOT_SHOWN = {"id", "image", "label", "prompt", "negative_prompt", "image_digest", "width", "height"}
"""Columns of the store that `row` gives elsewhere."""


def _rule_of(name: str, method: Mapping[str, Any], tree: Mapping[str, Any]) -> MethodRule:
    levels = sorted(tree["spectrum"]["levels"])
    epochs = (method.get("train") or {}).get("curriculum_epochs")
    epochs = tree["train"]["curriculum_epochs"] if epochs is None else epochs
    try:
        strategy = make_strategy(
            str(method["strategy"]),
            levels=levels,
            curriculum_epochs=epochs,
            level=method.get("level"),
        )
    except RecipeError:  # code of the user's own, which is not imported here
        strategy = None
    drawn = set(levels)
    if isinstance(strategy, Planned) and not isinstance(strategy, RandomLevels):
        drawn = {level for epoch in range(epochs) for level in strategy.levels(epoch, ())}
    drawn -= {REAL}
    if method.get("images") == "retrieved":
        drawn = set()
    scale = float(method.get("synthetic_scale", 3.0))
    return MethodRule(name, bool(drawn), sorted(drawn), method.get("threshold"), scale)


def _read_tree(path: Path) -> dict[str, Any]:
    """The recipe of a run folder; a file of an early version gets today's defaults."""
    tree = read_recipe_tree(path)
    if _is_whole(tree):
        return tree
    from ..recipe import load_recipe

    return load_recipe(path).plain()


def _is_whole(tree: Mapping[str, Any]) -> bool:
    """Whether a recipe states what this module reads of it."""
    try:
        return (
            all(type(level) is int for level in tree["spectrum"]["levels"])
            and isinstance(tree["filter"]["threshold"], int | float)
            and type(tree["train"]["curriculum_epochs"]) is int
            and all(isinstance(method["strategy"], str) for method in tree["methods"].values())
            and all(type(tree["groups"][name]) is int for name in ("many", "few"))
            and isinstance(tree["runtime"].get("store"), str | None)
        )
    except (KeyError, TypeError, AttributeError):
        return False


def _stat(path: Path) -> list[int]:
    """Time and size of a file; empty where it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_mtime_ns, found.st_size]


def _count(labels: np.ndarray, classes: int) -> np.ndarray:
    labels = np.asarray(labels, np.int64)
    return np.bincount(labels[(labels >= 0) & (labels < classes)], minlength=classes)


def name_of(classes: Sequence[str], label: int) -> str:
    """The name of a class, whatever label a file states."""
    return classes[label] if 0 <= label < len(classes) else f"class {label}"
