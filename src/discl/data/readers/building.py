"""What all readers share: where a data set is, and tables built column by column, so that a million rows open in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from datasets import Image as ImageFeature

from ...errors import DataError
from ..table import ImageTable, check_table

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "id_val"),
    "test": ("test", "testing", "id_test"),
    "validation-ood": ("validation-ood", "val-ood", "ood_val"),
    "test-ood": ("test-ood", "ood_test"),
}


@dataclass(frozen=True)
class Source:
    """A data set as the recipe names it: `root` as given, the `path` that it leads to, and its own names for columns, splits and files."""

    root: str
    path: Path
    columns: Mapping[Any, str] = field(default_factory=dict)
    splits: Mapping[Any, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def file(self, split: str, usual: str) -> Path:
        """The file of a split: the one in `data.files`, else the usual one."""
        return self.path / self.files.get(split, usual)


def expected(source: Source, kind: str, tree: Sequence[str]) -> str:
    """Message for a root that is not laid out as `kind` says: what is expected, and what is there."""
    there = sorted(item.name + "/" * item.is_dir() for item in source.path.iterdir())[:12] if source.path.is_dir() else []
    lines = "\n".join(f"  {item}" for item in tree)
    found = ", ".join(there) or "nothing"
    return f"data.root '{source.root}' is not laid out as {kind}. Expected in {source.path.resolve()}:\n{lines}\nFound: {found}."


def full_paths(root: Path, paths: Sequence[str] | pa.Array, where: str) -> pa.Array:
    """Paths below `root`. Raises DataError for one that is absolute or climbs out of it."""
    listed = strings(paths)
    suspects = pc.or_kleene(pc.starts_with(listed, "/"), pc.match_substring(listed, ".."))
    for path in listed.filter(pc.fill_null(suspects, True)).to_pylist():
        if path is None or path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise DataError(f"{where} names '{path}', which leads out of {root}; paths have to stay below it.")
    return pc.binary_join_element_wise(f"{root}/", listed, "")


def refuse_escape(paths: Sequence[Path], root: Path) -> None:
    """Raises DataError for a link that leads out of the root."""
    inside = root.resolve()
    for path in paths:
        if not path.resolve().is_relative_to(inside):
            raise DataError(
                f"{path} leads to {path.resolve()}, outside data.root {inside}; copy the images there or name their folder as the root."
            )


def strings(values: Sequence[str] | pa.Array) -> pa.Array:
    """The values as an Arrow array of texts."""
    return values if isinstance(values, pa.Array) else pa.array(values, pa.string())


def arrow_images(paths: Sequence[str] | pa.Array, data: Sequence[bytes] | None = None) -> pa.StructArray:
    """A column of {bytes, path} as `datasets` stores images."""
    stored = pa.nulls(len(paths), pa.binary()) if data is None else pa.array(data, pa.binary())
    return pa.StructArray.from_arrays([stored, strings(paths)], names=["bytes", "path"])


def build_table(
    paths: Sequence[str] | pa.Array, labels: np.ndarray, class_names: Sequence[str], ids: Sequence[str] | pa.Array, root: Path,
    data: Sequence[bytes] | None = None, **optional: Sequence[str] | pa.Array,
) -> ImageTable:  # fmt: skip
    """A checked table of image files (or of encoded pictures, `data`), with `domain` and `group` where they are given."""
    try:
        columns = {"id": strings(ids), "image": arrow_images(paths, data), "label": pa.array(labels, pa.int64())}
        columns |= {name: strings(values) for name, values in optional.items()}
    except UnicodeEncodeError as error:
        raise DataError(f"the file name {error.object!r} in {root} is not valid UTF-8; rename the file.") from error
    rows = Dataset(pa.table(columns)).cast_column("image", ImageFeature(decode=False))
    return check_table(ImageTable(rows, tuple(class_names), root if data is None else None))
