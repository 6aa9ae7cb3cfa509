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
"""First bytes of formats with at most 8 bits."""


@dataclass(frozen=True)
class ImageTable:
    """Images with ids and labels, memory-mapped in Arrow; images are decoded on access.

    - `rows`: columns `id` (string, unique), `image` ({bytes, path}), `label` (0 … C − 1),
      optionally `domain` and `group`.
    - `class_names`: by label.
    - `root`: folder below which image files are read; without it only bytes are decoded.
    - `elsewhere`: further folders of the data set, such as the hub's cache.
    - `schemes`: schemes of the addresses (`slice://` …) that the table's reader wrote. Empty for
      tables with paths from the data, so that an address in them opens nothing.
    - `depth`: the values of grey images of more than 8 bits that are black and white;
      `with_depth` determines it.

    ```python
    import discl

    table = discl.read_tables("photos")["train"]
    assert table.image(0).mode == "RGB" and table.class_counts.sum() == len(table)
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
        """The files that images of this table may open."""
        own = roots_of(self.root) if self.root is not None else ()
        return Gate((*own, *self.elsewhere), self.schemes)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the rows, unique."""
        return self.rows.select_columns("id")[:]["id"]

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 `[rows]`."""
        column = self.rows.select_columns("label").with_format("arrow")[:]["label"]
        return column.to_numpy().astype(np.int64)

    @property
    def class_counts(self) -> np.ndarray:
        """Number of images per class, int64 `[classes]`."""
        return np.bincount(self.labels, minlength=len(self.class_names))

    def select(self, rows: Iterable[int]) -> ImageTable:
        """The table of these rows, in this order."""
        return replace(self, rows=self.rows.select(list(rows)))

    def image(self, row: int) -> Image.Image:
        """Decoded RGB image of a row. Raises DataError that names the image."""
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
    """A checked table of plain columns; arguments as in `ImageTable`.

    Raises DataError as `check_table` does.
    """
    rows = Dataset.from_dict(dict(columns)).cast_column("image", ImageFeature(decode=False))
    return check_table(ImageTable(rows, tuple(class_names), root, schemes=frozenset(schemes)))


def rows_of(columns: pa.Table) -> Dataset:
    """Columns in memory as rows whose `image` is {bytes, path}.

    The fingerprint is random: to compute one, `datasets` would pickle the whole table, which needs
    most of the memory of opening it.
    """
    return Dataset(columns, fingerprint=generate_random_fingerprint()).cast_column(
        "image", ImageFeature(decode=False)
    )


def check_table(table: ImageTable) -> ImageTable:
    """The table itself, checked.

    Raises DataError for an empty table, a duplicate class name, a label out of range, a missing or
    duplicate id, and an image that only names a file outside the table's root.
    """
    if not len(table):
        raise DataError("the table of images is empty.")
    _check_class_names(table.class_names)
    _check_labels(table)
    _check_ids(table.rows.select_columns("id").with_format("arrow")[:]["id"])
    if cause := first_foreign(table.rows.data.column("image"), table.gate):
        raise DataError(
            f"an image is only named by the data, and may not be read: {cause}. Write the images "
            "into the data, or list them in a manifest (a CSV or Parquet file) beside them."
        )
    return table


def _check_class_names(names: Sequence[str]) -> None:
    first_label: dict[str, int] = {}
    for label, name in enumerate(names):
        first = first_label.setdefault(name, label)
        if first != label:
            raise DataError(
                f"classes {first} and {label} are both called '{name}'; class names have to "
                "differ, because texts and figures use them. Rename one of them in the data, or "
                "give them one label."
            )


def _check_labels(table: ImageTable) -> None:
    labels, last = table.labels, len(table.class_names) - 1
    wrong = np.flatnonzero((labels < 0) | (labels > last))
    if len(wrong):
        example = table.rows[int(wrong[0])]["id"]
        raise DataError(
            f"label {labels[wrong[0]]} of image '{example}' is out of range: there are {last + 1} "
            f"class names, so labels run from 0 to {last} ({len(wrong)} such rows)."
        )


def _check_ids(ids: pa.ChunkedArray) -> None:
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(ids), ""), True)
    if pc.any(blank).as_py():
        row = pc.index(blank, True).as_py()
        raise DataError(
            f"row {row + 1} of the images has no id ({pc.sum(blank).as_py()} such rows); fill it "
            "in, or remove the column id: the id is then the path or the row's number."
        )
    if pc.count_distinct(ids).as_py() != len(ids):
        counted = pc.value_counts(ids)
        twice = counted.field("values").filter(pc.greater(counted.field("counts"), 1))[0].as_py()
        raise DataError(
            f"id '{twice}' occurs twice; ids have to be unique, because noise and resuming are "
            "keyed by them."
        )


def without_empty_classes(tables: Mapping[str, ImageTable]) -> tuple[dict[str, ImageTable], str]:
    """(tables without the classes that `train` has no image of, a message about them).

    Labels are renumbered in order. Images of such classes in other splits are dropped too. The
    message is "" if every class has a training image.

    Raises DataError for a split of which nothing is left.
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
                f"no image of the split {split} shows a class of the training images, so dropping "
                f"empty classes leaves nothing of it; leave the split out: {{{split}: null}}.",
                argument="splits",
            )
        if len(rows) < len(table):
            lost[split] = len(table) - len(rows)
        part = table.select(rows.tolist())
        plain = part.rows.remove_columns("label").add_column("label", number[part.labels])
        class_names = tuple(name for name, keep in zip(names, kept, strict=True) if keep)
        result[split] = replace(part, rows=plain, class_names=class_names)
    dropped = [name for name, keep in zip(names, kept, strict=True) if not keep]
    shown = ", ".join(dropped[:SHOWN]) + ", …" * (len(dropped) > SHOWN)
    message = f"{len(dropped):,} of {len(names):,} classes have no training image and are left out"
    message = f"{message} ({shown})"
    if lost:
        parts = (f"{count_of(count, 'image')} of {split}" for split, count in lost.items())
        message = f"{message}; with them {', '.join(parts)}"
    return result, f"{message}."


@dataclass(frozen=True)
class Inspection:
    """The result of one pass over a table.

    - `digests`: digest of each row's content.
    - `sizes`: (width, height) of each row.
    - `unreadable`: (row, problem) of the images that cannot be read.
    - `wide`: range of grey images of more than 8 bits, by row.
    """

    digests: list[str]
    sizes: list[tuple[int, int]]
    unreadable: list[tuple[int, str]]
    wide: dict[int, Wide] = field(default_factory=dict)

    def select(self, rows: Sequence[int]) -> Inspection:
        """The results of these rows, in this order."""
        new = {row: number for number, row in enumerate(rows)}
        return Inspection(
            [self.digests[row] for row in rows],
            [self.sizes[row] for row in rows],
            [(new[row], problem) for row, problem in self.unreadable if row in new],
            {new[row]: wide for row, wide in self.wide.items() if row in new},
        )


def digest_image(image: Image.Image) -> str:
    """Digest of the size and the RGB pixels: copies in another file format have the same one."""
    return digest_bytes(f"{image.width}x{image.height}".encode(), image.tobytes())


def inspect_images(
    table: ImageTable,
    on_progress: Callable[[int], None] = lambda count: None,
    on_image: Callable[[str, Image.Image], None] = lambda content, image: None,
) -> Inspection:
    """Decodes every image once, in threads, and returns digests, sizes and problems.

    A file outside the table's root is reported as unreadable, like a broken one.

    - `table`: of `read_tables`.
    - `on_progress`: called with 1 after each image.
    - `on_image`: called by the threads with the digest and the decoded image.

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
        content = digest_image(image)
        on_image(content, image)
        return content, image.size, None

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
    """Tables with one depth for all grey images of more than 8 bits, and the updated digests.

    Only such images are decoded again. Without any the arguments are returned unchanged.

    - `tables`: by split.
    - `seen`: the result of `inspect_images` for each.
    - `bits`: bits of whole numbers, if known.
    """
    ranges = [wide for each in seen.values() for wide in each.wide.values()]
    if not ranges:
        return dict(tables), dict(seen)
    depth = common_depth(ranges, bits)
    tables = {split: replace(table, depth=depth) for split, table in tables.items()}
    return tables, {split: _update_digests(tables[split], each) for split, each in seen.items()}


def _update_digests(table: ImageTable, seen: Inspection) -> Inspection:
    rows = sorted(seen.wide)
    digests = list(seen.digests)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        contents = map_rows(pool, lambda number: digest_image(table.image(rows[number])), len(rows))
        for row, content in zip(rows, contents, strict=True):
            digests[row] = content
    return replace(seen, digests=digests)


def with_depth(tables: Mapping[str, ImageTable], bits: int | None = None) -> dict[str, ImageTable]:
    """Tables whose grey images of more than 8 bits are decoded by one rule.

    The rule follows from all such images, or from `bits`. Only they are decoded: files whose
    suffix or first bytes say JPEG, WebP or GIF are not opened. Unreadable images are ignored.
    Tables that have a depth keep it.
    """
    if all(table.depth is not None for table in tables.values()):
        return dict(tables)
    ranges: list[Wide] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for table in tables.values():
            look = partial(_range_of_row, table)
            ranges += [wide for wide in map_rows(pool, look, len(table)) if wide is not None]
    depth = common_depth(ranges, bits) if ranges else None
    return {
        split: table if table.depth is not None else replace(table, depth=depth)
        for split, table in tables.items()
    }


def _range_of_row(table: ImageTable, row: int) -> Wide | None:
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
