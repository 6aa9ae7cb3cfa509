"""`ImageTable`, and the pass that checks every image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets import Image as ImageFeature
from datasets.fingerprint import generate_random_fingerprint
from PIL import Image

from ..errors import DataError
from ..utils.counts import count_of
from ..utils.hashing import digest_bytes
from ..utils.ordered_map import map_rows
from .depth import Depth, Wide, common_depth
from .gate import Gate, Unreadable, first_foreign, roots_of
from .images import decode_image, wide_range

OPTIONAL = ("domain", "group")
SHOWN = 8
NARROW = (".jpg", ".jpeg", ".webp", ".gif")
NEVER_WIDE = (b"\xff\xd8\xff", b"RIFF", b"GIF8")
"""How files begin whose formats have no more than 8 bits."""


@dataclass(frozen=True)
class ImageTable:
    """A table of images with labels, memory-mapped in Arrow; images are decoded on access.

    - `rows`: `id` (string, unique), `image` ({bytes, path}, undecoded), `label` (0 … classes − 1),
      optionally `domain` and `group`.
    - `class_names`: names of the labels, `[classes]`.
    - `root`: folder of the image files. Without it only bytes are decoded.
    - `elsewhere`: further folders of the data set, such as the hub's cache.
    - `schemes`: prefixes of addresses (`slice://`, …) that the table's reader made itself. Paths in
      other people's tables have none, so an address in them opens nothing.
    - `depth`: black and white of grey images of more than 8 bits, as found by `with_depth`.

    ```python
    import discl

    table = discl.read_tables("photos")["train"]
    image = table.image(0)
    assert image.mode == "RGB" and table.class_counts.sum() == len(table)
    ```
    """

    rows: Dataset
    class_names: tuple[str, ...]
    root: Path | None = None
    elsewhere: tuple[Path, ...] = ()
    schemes: frozenset[str] = frozenset()
    depth: Depth | None = None

    @cached_property
    def gate(self) -> Gate:
        """What the images of this table may open."""
        own = roots_of(self.root) if self.root is not None else ()
        return Gate((*own, *self.elsewhere), self.schemes)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def ids(self) -> list[str]:
        return self.rows.select_columns("id")[:]["id"]

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 `[rows]`."""
        return (
            self.rows.select_columns("label")
            .with_format("arrow")[:]["label"]
            .to_numpy()
            .astype(np.int64)
        )

    @property
    def class_counts(self) -> np.ndarray:
        """int64 `[classes]`."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def select(self, rows: Iterable[int]) -> ImageTable:
        """The table of these rows, in this order."""
        return replace(self, rows=self.rows.select(list(rows)))

    def image(self, row: int) -> Image.Image:
        """Decoded RGB picture of a row. Raises DataError that names the image."""
        stored = self.rows[int(row)]
        try:
            return decode_image(stored["image"], self.gate, self.depth)
        except Unreadable as error:
            raise DataError(f"image {_name(stored)} cannot be read: {error}.") from error


def make_table(
    columns: Mapping[str, Sequence],
    class_names: Sequence[str],
    root: Path | None = None,
    schemes: Sequence[str] = (),
) -> ImageTable:
    """A checked table of plain columns; `root` and `schemes` as in `ImageTable`. Raises DataError as `check_table` does."""
    rows = Dataset.from_dict(dict(columns)).cast_column("image", ImageFeature(decode=False))
    return check_table(ImageTable(rows, tuple(class_names), root, schemes=frozenset(schemes)))


def rows_of(columns: pa.Table) -> Dataset:
    """Columns in memory as rows whose `image` is {bytes, path}.

    Their fingerprint is random: without one, `datasets` pickles the whole table to make it, which is most of the memory that opening takes.
    """
    return Dataset(columns, fingerprint=generate_random_fingerprint()).cast_column(
        "image", ImageFeature(decode=False)
    )


def check_table(table: ImageTable) -> ImageTable:
    """The table itself.

    Raises DataError for a label out of range, an id that is missing, an id or a class name that stands twice, an empty table, or an image
    that only names a file outside the table's root.
    """
    if not len(table):
        raise DataError("the table of images is empty.")
    if len(set(table.class_names)) < len(table.class_names):
        first, second = _first_pair(table.class_names)
        raise DataError(
            f"classes {first} and {second} are both called '{table.class_names[first]}'; class names have to differ, for texts and figures "
            "go by them. Rename one of them in the data, or give them one label."
        )
    labels = table.labels
    wrong = np.flatnonzero((labels < 0) | (labels >= len(table.class_names)))
    if len(wrong):
        example, last = table.rows[int(wrong[0])]["id"], len(table.class_names) - 1
        raise DataError(
            f"label {labels[wrong[0]]} of image '{example}' is out of range: there are {last + 1} class names, "
            f"so labels run from 0 to {last} ({len(wrong)} such rows)."
        )
    ids = table.rows.select_columns("id").with_format("arrow")[:]["id"]
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(ids), ""), True)
    if pc.any(blank).as_py():
        row = pc.index(blank, True).as_py()
        raise DataError(
            f"row {row + 1} of the images has no id ({pc.sum(blank).as_py()} such rows); fill it in, or leave the column id "
            "out: images are then called by their path or number."
        )
    if pc.count_distinct(ids).as_py() != len(ids):
        counted = pc.value_counts(ids)
        twice = counted.field("values").filter(pc.greater(counted.field("counts"), 1))[0].as_py()
        raise DataError(
            f"id '{twice}' stands twice; ids have to be unique, for noise and resume are keyed by them."
        )
    if told := first_foreign(table.rows.data.column("image"), table.gate):
        raise DataError(
            f"an image is only named by the data, and may not be read: {told}. Write the pictures into the data, or list them in a "
            "manifest (data.format: manifest) beside them."
        )
    return table


def without_empty_classes(tables: Mapping[str, ImageTable]) -> tuple[dict[str, ImageTable], str]:
    """The tables without the classes that have no image in `train`, labels renumbered in their order, and what was left out.

    Images of such classes in other splits are left out too. The text is "" where every class has a training image. Raises
    DataError for a split of which nothing is left.
    """
    kept = tables["train"].class_counts > 0
    if kept.all():
        return dict(tables), ""
    names = tables["train"].class_names
    number = np.cumsum(kept) - 1
    result, lost = {}, {}
    for split, table in tables.items():
        rows = np.flatnonzero(kept[table.labels])
        if not len(rows):
            raise DataError(
                f"no image of the split {split} shows a class of the training images, so data.drop_empty_classes leaves "
                "nothing of it; leave the split out, for example data.splits: {"
                + split
                + ": null}."
            )
        if len(rows) < len(table):
            lost[split] = len(table) - len(rows)
        part = table.select(rows.tolist())
        plain = part.rows.remove_columns("label").add_column("label", number[part.labels])
        class_names = tuple(name for name, keep in zip(names, kept, strict=True) if keep)
        result[split] = replace(part, rows=plain, class_names=class_names)
    dropped = [name for name, keep in zip(names, kept, strict=True) if not keep]
    told = f"{len(dropped):,} of {len(names):,} classes have no training image and are left out ({', '.join(dropped[:SHOWN])}"
    told += f"{', …' * (len(dropped) > SHOWN)})"
    if lost:
        told += "; with them " + ", ".join(
            f"{count_of(count, 'image')} of {split}" for split, count in lost.items()
        )
    return result, f"{told}."


def _first_pair(names: Sequence[str]) -> tuple[int, int]:
    """The places of the first name that stands twice."""
    places: dict[str, int] = {}
    return next(
        (places[name], place)
        for place, name in enumerate(names)
        if places.setdefault(name, place) != place
    )


@dataclass(frozen=True)
class Inspection:
    """What one pass over a table found: content digest, width and height of each row, the unreadable rows, and wide greys by row."""

    digests: list[str]
    sizes: list[tuple[int, int]]
    unreadable: list[tuple[int, str]]
    wide: dict[int, Wide] = field(default_factory=dict)

    def select(self, rows: Sequence[int]) -> Inspection:
        """What was found of these rows, in this order."""
        place = {row: number for number, row in enumerate(rows)}
        unreadable = [(place[row], problem) for row, problem in self.unreadable if row in place]
        wide = {place[row]: found for row, found in self.wide.items() if row in place}
        return Inspection(
            [self.digests[row] for row in rows], [self.sizes[row] for row in rows], unreadable, wide
        )


def digest_image(image: Image.Image) -> str:
    """Digest of the size and the RGB pixels, so that another file format does not hide a copy."""
    return digest_bytes(f"{image.width}x{image.height}".encode(), image.tobytes())


def inspect_images(
    table: ImageTable, on_progress: Callable[[int], None] = lambda count: None
) -> Inspection:
    """Decodes every image once, in threads: digests, sizes and unreadable images.

    A file outside of the table's root, reached by a link, counts as unreadable.

    - `table`: the images.
    - `on_progress`: called with 1 after each image.

    ```python
    import discl

    inspection = discl.inspect_images(discl.read_tables("photos")["train"])
    assert not inspection.unreadable
    ```
    """

    wide: dict[int, Wide] = {}

    def look(row: int) -> tuple[str, tuple[int, int], str | None]:
        stored = table.rows[row]

        def on_wide(found: Wide) -> None:
            wide[row] = found

        try:
            image = decode_image(stored["image"], table.gate, table.depth, on_wide)
        except Unreadable as error:
            return "", (0, 0), f"{_name(stored)}: {error}"
        return digest_image(image), image.size, None

    digests, sizes, unreadable = [], [], []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for row, (content, size, problem) in enumerate(map_rows(pool, look, len(table))):
            digests.append(content)
            sizes.append(size)
            if problem:
                unreadable.append((row, problem))
            on_progress(1)
    return Inspection(digests, sizes, unreadable, wide)


def settle_depth(
    tables: Mapping[str, ImageTable], seen: Mapping[str, Inspection], bits: int | None = None
) -> tuple[dict[str, ImageTable], dict[str, Inspection]]:
    """Tables with the depth that follows from all their wide greys together, and the digests that their pictures have by it.

    Only wide greys are decoded again. Without any the tables have no depth and nothing is changed.
    """
    found = [wide for each in seen.values() for wide in each.wide.values()]
    if not found:
        return dict(tables), dict(seen)
    depth = common_depth(found, bits)
    tables = {split: replace(table, depth=depth) for split, table in tables.items()}
    return tables, {split: _look_again(tables[split], each) for split, each in seen.items()}


def _look_again(table: ImageTable, seen: Inspection) -> Inspection:
    rows = sorted(seen.wide)
    digests = list(seen.digests)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        contents = map_rows(pool, lambda number: digest_image(table.image(rows[number])), len(rows))
        for row, content in zip(rows, contents, strict=True):
            digests[row] = content
    return replace(seen, digests=digests)


def with_depth(tables: Mapping[str, ImageTable], bits: int | None = None) -> dict[str, ImageTable]:
    """Tables whose grey pictures of more than 8 bits are decoded by one rule, found from all of them or stated by `bits`.

    Only such pictures are decoded; files whose endings or first bytes say JPEG, WebP or GIF are not opened. Pictures that cannot be
    read are passed over. Tables that have a depth keep it.
    """
    if all(table.depth is not None for table in tables.values()):
        return dict(tables)
    found: list[Wide] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for table in tables.values():
            look = partial(_wide_of, table)
            found += [each for each in map_rows(pool, look, len(table)) if each is not None]
    depth = common_depth(found, bits) if found else None
    return {
        split: table if table.depth is not None else replace(table, depth=depth)
        for split, table in tables.items()
    }


def _wide_of(table: ImageTable, row: int) -> Wide | None:
    stored = table.rows[row]["image"]
    data, path = stored.get("bytes"), stored.get("path")
    if data.startswith(NEVER_WIDE) if data else str(path).lower().endswith(NARROW):
        return None
    try:
        return wide_range(stored, table.gate)
    except Unreadable:
        return None


def _name(stored: dict) -> str:
    path = (stored["image"] or {}).get("path")
    return f"'{stored['id']}'" if not path or path == stored["id"] else f"'{stored['id']}' ({path})"
