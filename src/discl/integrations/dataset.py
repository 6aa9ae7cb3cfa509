"""`SpectrumDataset`: real and kept synthetic images as a PyTorch data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset as Rows
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import Dataset

from ..data import ImageTable, Unreadable, decode_image, read_tables, to_square, with_depth
from ..errors import DataError, RunError, StoreError, TrainingError, unknown
from ..recipe import load_recipe
from ..run_folder import paths
from ..run_folder.run import Run
from ..stages.sample_pool import hard_rows, kept_images, make_pool, no_images
from ..utils.counts import count_have, list_some

NEEDED = (paths.RECIPE, paths.DATA, paths.HARD, paths.FILTER)
"""Files of a run folder after `discl filter`."""
MOST_NAMED = 12
"""Classes that an error names at most."""
Transform = Callable[[Any], Any]


class Sample(NamedTuple):
    """One row of a `SpectrumDataset`.

    - `image`: a PIL image, or the result of `size` and `transform`.
    - `label`: from 0.
    - `level`: whole per cent; 100 for a real image.
    """

    image: Any
    label: int
    level: int


class SpectrumDataset(Dataset):
    """Real training images, then synthetic ones, each a `Sample` of (image, label, level).

    Rows are memory-mapped and decoded on access. `pool` holds what a curriculum needs of each row.
    See also `of_run` and `of_shards`.

    - `real`: the real training images.
    - `synthetic`: rows with `image`, `label` and `level`.
    - `hard`: which real images have a spectrum, bool `[real]`.
    - `size`: side in pixels. Images become float `[3, size, size]` in [0, 1]: shorter side resized,
      centre cropped. Default: PIL images as stored.
    - `transform`: applied to each image last.
    - `evaluation_transform`: the deterministic part of `transform`, used by `for_evaluation`.

    ```python
    import discl

    dataset = discl.SpectrumDataset.of_run("runs/fashion-lt", size=32)
    image, label, level = dataset[0]
    assert image.shape == (3, 32, 32) and level == 100
    ```
    """

    def __init__(
        self,
        real: ImageTable,
        synthetic: Rows,
        hard: np.ndarray,
        size: int | None = None,
        *,
        transform: Transform | None = None,
        evaluation_transform: Transform | None = None,
    ) -> None:
        self.pool = make_pool(real, hard, synthetic)
        self.real, self.synthetic = real, synthetic
        self.size, self.transform, self.evaluation_transform = size, transform, evaluation_transform

    @classmethod
    def of_run(
        cls,
        folder: Path | str,
        size: int | None = None,
        transform: Transform | None = None,
        split: str = "train",
        *,
        evaluation_transform: Transform | None = None,
    ) -> SpectrumDataset:
        """The training images of a run folder and the kept images of its spectrum.

        - `folder`: a run folder after `discl filter`.
        - `split`: `train`, or another split, whose real images come alone.
        - `size`, `transform`, `evaluation_transform`: as for `SpectrumDataset`.

        Raises RunError where the folder is not a run or was not filtered, DataError for an unknown
        split.
        """
        folder = Path(folder)
        absent = [name for name in NEEDED if not (folder / name).is_file()]
        if absent:
            raise RunError(
                f"{folder} has no {', '.join(absent)}; run `discl filter RECIPE --out {folder}`."
            )
        run = Run(load_recipe(folder / paths.RECIPE), folder)
        if split not in {"train", *run.tables}:
            raise DataError(unknown("split", split, run.tables), argument="split")
        if split == "train":
            real, synthetic, hard = run.train, kept_images(run), hard_rows(run)
        else:
            real, synthetic = run.tables[split], no_images()
            hard = np.zeros(len(real), bool)
        return cls(
            real,
            synthetic,
            hard,
            size,
            transform=transform,
            evaluation_transform=evaluation_transform,
        )

    @classmethod
    def of_shards(
        cls,
        shards: Path | str,
        real: ImageTable | Path | str,
        keep: Iterable[str] | None = None,
        hard: Sequence[bool] | None = None,
        *,
        size: int | None = None,
        transform: Transform | None = None,
        evaluation_transform: Transform | None = None,
    ) -> SpectrumDataset:
        """The images of Parquet shards and real training images. Classes are matched by name.

        - `shards`: a folder of Parquet files with the columns `image`, `label` and `level`. A
          strategy that measures progress needs `source_id` too.
        - `real`: a table, or what `read_tables` takes: a folder with one sub-folder per class, ….
        - `keep`: ids of the synthetic images to use; default all.
        - `hard`: which real images have a spectrum, `[real]`. Default: those named in `source_id`.
        - `size`, `transform`, `evaluation_transform`: as for `SpectrumDataset`.

        Raises StoreError or DataError where a file, column or class is missing.
        """
        table = real if isinstance(real, ImageTable) else read_tables(str(real))["train"]
        table = with_depth({"train": table})["train"]
        stored = _read_shards(shards)
        rows = _rows_to_keep(stored, keep)
        marked = _find_hard(stored, table, shards) if hard is None else list(hard)
        if len(marked) != len(table):
            raise DataError(
                f"got {len(marked)} values for {len(table)} real images; pass one per image.",
                argument="hard",
            )
        labels = _labels_by_name(stored, table.class_names)
        columns = [
            name for name in ("id", "image", "level", "source_id") if name in stored.column_names
        ]
        synthetic = stored.select_columns(columns).add_column("label", labels)
        return cls(
            table,
            synthetic.select(rows),
            np.asarray(marked, bool),
            size,
            transform=transform,
            evaluation_transform=evaluation_transform,
        )

    def for_evaluation(self) -> SpectrumDataset:
        """The same rows with `evaluation_transform` in place of `transform`.

        Progress is measured on it. Raises TrainingError where there is only a `transform`: random
        draws would add more noise than the change that is measured.
        """
        if self.transform is not None and self.evaluation_transform is None:
            raise TrainingError(
                "missing. This data set has a transform, which may draw at random. Pass "
                "evaluation_transform=, the deterministic part of transform, or "
                "torch.nn.Identity() if there is none.",
                argument="evaluation_transform",
            )
        view = copy(self)
        view.transform = self.evaluation_transform
        return view

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the labels."""
        return tuple(self.pool.class_names)

    def __len__(self) -> int:
        return len(self.pool.labels)

    def __getitem__(self, row: int) -> Sample:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row = int(row) % len(self)
        image: Any = self._picture(row)
        if self.size is not None:
            square = torch.from_numpy(to_square(image, self.size))
            image = square.permute(2, 0, 1).contiguous().float() / 255
        if self.transform is not None:
            image = self.transform(image)
        return Sample(image, int(self.pool.labels[row]), int(self.pool.levels[row]))

    def _picture(self, row: int) -> Image.Image:
        if row < len(self.real):
            return self.real.image(row)
        stored = self.synthetic[row - len(self.real)]
        try:
            return decode_image(stored["image"])  # bytes alone, because shards may be untrusted
        except Unreadable as error:
            raise DataError(f"image '{stored.get('id', row)}' cannot be read: {error}.") from error


def _read_shards(folder: Path | str) -> Rows:
    files = sorted(str(file) for file in Path(folder).glob("*.parquet"))
    if not files:
        raise StoreError(f"{folder} holds no Parquet shard of a spectrum.", argument="shards")
    stored = Rows.from_parquet(files).cast_column("image", ImageFeature(decode=False))
    absent = [name for name in ("image", "label", "level") if name not in stored.column_names]
    if absent:
        raise StoreError(
            f"{folder} has no columns {', '.join(absent)}; it has "
            f"{', '.join(stored.column_names)}.",
            argument="shards",
        )
    return stored


def _find_hard(stored: Rows, real: ImageTable, folder: Path | str) -> list[bool]:
    """Which real images are sources of the shards."""
    sources = set(stored["source_id"][:]) if "source_id" in stored.column_names else set()
    hard = [name in sources for name in real.ids]
    if not any(hard):
        raise DataError(
            f"missing. No id of the {len(real)} real images is a source_id in {folder}. Pass "
            "hard=[True, False, …], one value per real image.",
            argument="hard",
        )
    return hard


def _rows_to_keep(stored: Rows, keep: Iterable[str] | None) -> np.ndarray:
    """Rows of the ids in `keep`, ascending; each id once, even if two workers made it."""
    if "id" not in stored.column_names:
        if keep is not None:
            raise StoreError(
                "got ids, but the shards have no column id; they have "
                f"{', '.join(stored.column_names)}.",
                argument="keep",
            )
        return np.arange(len(stored))
    ids = np.asarray(stored["id"][:])
    first = np.sort(np.unique(ids, return_index=True)[1]) if len(ids) else np.arange(0)
    return first if keep is None else first[np.isin(ids[first], list(keep))]


def _labels_by_name(stored: Rows, class_names: Sequence[str]) -> list[int]:
    """Labels as the real images number them. Raises DataError for a class that they do not have."""
    feature = stored.features["label"]
    names = getattr(feature, "names", None)
    labels = stored["label"][:]
    if names is None:
        if labels and not 0 <= min(labels) <= max(labels) < len(class_names):
            raise DataError(
                f"labels of the shards run from {min(labels)} to {max(labels)}; the real images "
                f"have {len(class_names)} classes.",
                argument="shards",
            )
        return list(labels)
    label_of = {name: label for label, name in enumerate(class_names)}
    absent = sorted({names[label] for label in labels} - set(label_of))
    if absent:
        raise DataError(
            f"{count_have(len(absent), 'class', 'classes')} synthetic images and no real ones: "
            f"{list_some(absent, MOST_NAMED)}.",
            argument="real",
        )
    return [label_of[names[label]] for label in labels]
