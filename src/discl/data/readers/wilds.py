"""iWildCam as WILDS stores it.

Read by hand because the package wilds reads every image through its own loaders, and downloads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ...assets import common_names
from ...errors import DataError
from ...utils.logging import get_logger
from ..table import ImageTable
from .building import Source, build_table, expected, full_paths
from .lists import read_csv, tidy

logger = get_logger(__name__)

SPLITS = {
    "train": "train",
    "id_val": "validation",
    "id_test": "test",
    "val": "validation-ood",
    "test": "test-ood",
}
"""Our splits, by the names of WILDS."""
DOMAINS = ("location_remapped", "location")
GROUPS = ("sequence_remapped", "seq_id", "sequence")
NO_CLASS = 99_999
"""`y` of categories and images without a class; other copies write a number below 0."""


def read_wilds(source: Source) -> dict[str, ImageTable]:
    """iWildCam v2.0 as WILDS stores it (arXiv 2012.07421).

    - Files: `metadata.csv` (split, y, filename, location, sequence), images in `train/`.
    - Splits: `id_val` is `validation`, `id_test` is `test`, `val` is `validation-ood`, `test` is
      `test-ood`. All have to be present.
    - The domain is the camera (location), the group the sequence.
    - Class names come from `categories.csv`. Where `assets/names/iwildcam.yaml` has a common name
      for a scientific one, it is used.
    - Images without a class (y = 99999, or below 0) are counted and left out.
    """
    metadata = source.file("metadata", "metadata.csv")
    if not metadata.is_file():
        raise expected(source, "wilds")
    listed = _with_class(_read_list(metadata, ("split", "y", "filename")), metadata)
    absent = [name for name in SPLITS if not pc.any(pc.equal(listed["split"], name)).as_py()]
    if absent:
        present = ", ".join(map(str, pc.unique(listed["split"]).to_pylist()))
        raise DataError(
            f"{metadata} has no row of the split {' and none of '.join(absent)}; its splits are "
            f"{present}. iWildCam v2.0 has all five; read a list with other splits as a manifest.",
            argument="kind",
        )
    sources = {"domain": _first(DOMAINS, listed), "group": _first(GROUPS, listed)}
    named = _class_names(source.path / "categories.csv", set(pc.unique(listed["y"]).to_pylist()))
    numbers, names = pa.array(list(named), pa.int64()), list(named.values())
    tables = {}
    for name, split in SPLITS.items():
        rows = listed.filter(pc.equal(listed["split"], name))
        files = rows["filename"].cast(pa.string()).combine_chunks()
        paths = full_paths(source.path / "train", files, str(metadata))
        optional = {
            column: rows[theirs].cast(pa.string()).combine_chunks()
            for column, theirs in sources.items()
            if theirs
        }
        labels = pc.index_in(rows["y"].cast(pa.int64()), value_set=numbers).to_numpy()
        tables[split] = build_table(paths, labels, names, ids=files, root=source.path, **optional)
    return tables


def _with_class(listed: pa.Table, file: Path) -> pa.Table:
    """The rows with a class; others are counted."""
    bare = pc.fill_null(
        pc.or_(pc.less(listed["y"], 0), pc.greater_equal(listed["y"], NO_CLASS)), True
    )
    count = pc.sum(bare).as_py()
    if not count:
        return listed
    logger.warning(
        f"{file}: {count:,} images have no class (y = {NO_CLASS}, below 0 or empty); they are left "
        "out"
    )
    return listed.filter(pc.invert(bare))


def _first(names: Sequence[str], listed: pa.Table) -> str | None:
    return next((name for name in names if name in listed.column_names), None)


def _read_list(file: Path, columns: Sequence[str]) -> pa.Table:
    """A list of WILDS; its first column, written by pandas, has no name.

    Raises DataError for a missing column.
    """
    listed = tidy(read_csv(file), file, (*columns, *DOMAINS, *GROUPS))
    absent = [name for name in columns if name not in listed.column_names]
    if absent:
        present = ", ".join(filter(None, listed.column_names))
        raise DataError(
            f"{file} has no column {' and no '.join(absent)} (it has {present}); v2.0 is expected."
        )
    if "y" in columns and not pa.types.is_integer(listed["y"].type):
        raise DataError(
            f"{file}: the column y holds {listed['y'].type}; whole numbers are expected."
        )
    return listed


def _class_names(file: Path, present: Collection[int]) -> dict[int, str]:
    """`{label: name}`, sorted, of the labels that have a name or images.

    Names are common ones, followed by the label where two classes would have the same name.
    """
    if not file.is_file():
        return {label: str(label) for label in sorted(present)}
    listed = _read_list(file, ("y", "name"))
    stated = dict(
        sorted(
            (label, str(name))
            for label, name in zip(listed["y"].to_pylist(), listed["name"].to_pylist(), strict=True)
            if label is not None and 0 <= label < NO_CLASS
        )
    )
    common = {name: list(spoken) for name, spoken in common_names("iwildcam").items()}
    names = {
        label: common[name].pop(0) if common.get(name) else name for label, name in stated.items()
    }
    twice = {name for name, count in Counter(names.values()).items() if count > 1}
    names = {label: f"{name} ({label})" if name in twice else name for label, name in names.items()}
    return {label: names.get(label, str(label)) for label in sorted({*names, *present})}
