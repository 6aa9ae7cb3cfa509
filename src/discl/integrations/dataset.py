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
from ..stages.sample_pool import hard_rows, kept_images, make_pool

NEEDED = (paths.RECIPE, paths.DATA, paths.HARD, paths.FILTER)
"""Files of a run folder that has come as far as the filter."""


class Sample(NamedTuple):
    """An image (a picture, or what `size` and `transform` make of it), its label and its level as a whole per cent."""

    image: Any
    label: int
    level: int


class SpectrumDataset(Dataset):
    """Real training images, then synthetic ones, each a `Sample`; read at random from memory-mapped Arrow, decoded when asked for.

    With `size` a picture becomes float pixels `[3, size, size]` in [0, 1] (shorter side resized, centre cropped); `transform` is then
    applied to the picture or the pixels. `evaluation_transform`, which draws nothing at random, takes its place where something is
    measured (`for_evaluation`). `pool` says of every row what the curriculum asks.
    """

    def __init__(
        self, real: ImageTable, synthetic: Rows, hard: np.ndarray, size: int | None = None, transform: Callable[[Any], Any] | None = None,
        evaluation_transform: Callable[[Any], Any] | None = None,
    ) -> None:  # fmt: skip
        self.pool = make_pool(real, hard, synthetic)
        self.real, self.synthetic = real, synthetic
        self.size, self.transform, self.evaluation_transform = size, transform, evaluation_transform

    @classmethod
    def of_run(
        cls, folder: Path | str, size: int | None = None, transform: Callable[[Any], Any] | None = None, split: str = "train",
        evaluation_transform: Callable[[Any], Any] | None = None,
    ) -> SpectrumDataset:  # fmt: skip
        """The samples of a run folder: its training images and the kept ones of its spectrum, or another split's real images alone.

        Raises RunError where the folder is no run, or has not come as far as the filter.
        """
        folder = Path(folder)
        lacking = [name for name in NEEDED if not (folder / name).is_file()]
        if lacking:
            raise RunError(
                f"{folder} lacks {', '.join(lacking)}; make them with `discl filter RECIPE --out {folder}`."
            )
        run = Run(load_recipe(folder / paths.RECIPE), folder)
        if split == "train":
            return cls(
                run.train, kept_images(run), hard_rows(run), size, transform, evaluation_transform
            )
        if split not in run.tables:
            raise DataError(unknown("split", split, run.tables))
        return cls(
            run.tables[split],
            _no_images(),
            np.zeros(len(run.tables[split]), bool),
            size,
            transform,
            evaluation_transform,
        )

    @classmethod
    def of_shards(
        cls, shards: Path | str, real: ImageTable | Path | str, keep: Iterable[str] | None = None, hard: Sequence[bool] | None = None,
        size: int | None = None, transform: Callable[[Any], Any] | None = None,
        evaluation_transform: Callable[[Any], Any] | None = None,
    ) -> SpectrumDataset:  # fmt: skip
        """The samples of a folder of Parquet shards (a store, or anything with `image`, `label`, `level`) and of real training images.

        `real` is a table or what `read_tables` takes (a folder with one sub-folder per class,
        Parquet, …). `keep` names the ids to take, default all. `hard` says of each real image
        whether it has a spectrum; by default those are the images whose ids the shards' `source_id`
        names. A strategy that measures progress needs `source_id` too. Classes are matched by name.
        Raises StoreError or DataError where something is lacking.
        """
        table = real if isinstance(real, ImageTable) else read_tables(str(real))["train"]
        table = with_depth({"train": table})["train"]
        files = sorted(str(file) for file in Path(shards).glob("*.parquet"))
        if not files:
            raise StoreError(f"{shards} holds no Parquet shard of a spectrum.")
        stored = Rows.from_parquet(files).cast_column("image", ImageFeature(decode=False))
        lacking = [name for name in ("image", "label", "level") if name not in stored.column_names]
        if lacking:
            raise StoreError(
                f"the shards in {shards} lack {', '.join(lacking)}; they have {', '.join(stored.column_names)}."
            )
        taken = _rows_to_take(stored, keep)
        if hard is None:
            sources = set(stored["source_id"][:]) if "source_id" in stored.column_names else set()
            hard = [name in sources for name in table.ids]
            if not any(hard):
                raise DataError(
                    f"none of the {len(table)} real images has an id that a `source_id` in {shards} names, so which of them are hard is "
                    "not known; give hard=[True, False, …], one for each real image."
                )
        if len(hard) != len(table):
            raise DataError(
                f"hard has {len(hard)} values for {len(table)} real images; give one for each."
            )
        labels = _labels_by_name(stored, table.class_names)
        columns = [
            name for name in ("id", "image", "level", "source_id") if name in stored.column_names
        ]
        synthetic = stored.select_columns(columns).add_column("label", labels)
        return cls(
            table,
            synthetic.select(taken),
            np.asarray(hard, bool),
            size,
            transform,
            evaluation_transform,
        )

    def for_evaluation(self) -> SpectrumDataset:
        """The same rows through `evaluation_transform`, in the place of `transform`: what progress is measured on, and yours to measure on.

        Raises TrainingError where there is a `transform` alone: one that draws at random would make noise larger than what is measured.
        """
        if self.transform is not None and self.evaluation_transform is None:
            raise TrainingError(
                "this data set has a transform, which may draw at random, and no evaluation_transform to measure with; give "
                "evaluation_transform= beside transform=: the same without what is random, or torch.nn.Identity() where that is nothing."
            )
        view = copy(self)
        view.transform = self.evaluation_transform
        return view

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.pool.class_names)

    def __len__(self) -> int:
        return len(self.pool.labels)

    def __getitem__(self, row: int) -> Sample:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row = int(row) % len(self)
        image: Any = self._picture(row)
        if self.size is not None:
            image = torch.from_numpy(to_square(image, self.size)).float() / 255
        if self.transform is not None:
            image = self.transform(image)
        return Sample(image, int(self.pool.labels[row]), int(self.pool.levels[row]))

    def _picture(self, row: int) -> Image.Image:
        if row < len(self.real):
            return self.real.image(row)
        stored = self.synthetic[row - len(self.real)]
        try:
            return decode_image(stored["image"])  # bytes alone: a shard may be anybody's
        except Unreadable as error:
            raise DataError(f"image '{stored.get('id', row)}' cannot be read: {error}.") from error


def _rows_to_take(stored: Rows, keep: Iterable[str] | None) -> np.ndarray:
    """Rows of the shards, ascending: those that `keep` names, and each image once, though two workers may have made it."""
    if "id" not in stored.column_names:
        if keep is not None:
            raise StoreError(
                f"keep names ids, but the shards have no column id; they have {', '.join(stored.column_names)}."
            )
        return np.arange(len(stored))
    ids = np.asarray(stored["id"][:])
    first = np.sort(np.unique(ids, return_index=True)[1]) if len(ids) else np.arange(0)
    return first if keep is None else first[np.isin(ids[first], list(keep))]


def _labels_by_name(stored: Rows, class_names: Sequence[str]) -> list[int]:
    """Labels as the real images number them. Raises DataError for a class that those lack."""
    feature = stored.features["label"]
    names = getattr(feature, "names", None)
    labels = stored["label"][:]
    if names is None:
        if labels and not 0 <= min(labels) <= max(labels) < len(class_names):
            raise DataError(
                f"labels of the shards run from {min(labels)} to {max(labels)}; there are {len(class_names)} classes."
            )
        return list(labels)
    place = {name: label for label, name in enumerate(class_names)}
    lacking = sorted({names[label] for label in labels} - set(place))
    if lacking:
        raise DataError(
            f"the real images lack {len(lacking)} classes of the spectrum: {', '.join(lacking[:12])}."
        )
    return [place[names[label]] for label in labels]


def _no_images() -> Rows:
    return Rows.from_dict({"image": [], "label": [], "level": []})
