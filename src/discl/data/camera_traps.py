"""A clean data set as one of camera traps, in disjoint splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pyarrow as pa

from ..errors import DataError
from ..utils.hashing import derive_seed
from .cameras import SCHEME, camera_address
from .table import ImageTable, rows_of


@dataclass(frozen=True)
class Cameras:
    """How a clean data set becomes one of cameras: `seen` ones in all splits but the OOD test, `unseen` ones there.

    `clean` is the share of pictures that stay as they are, `pretraining` that of the training images that are left out, for generator and
    CLIP to be trained on; `validation` images are drawn from the others. `most` limits the images of a split.
    """

    seed: int = 0
    seen: int = 12
    unseen: int = 6
    clean: float = 0.2
    pretraining: float = 0.6
    validation: int = 2000
    most: Mapping[str, int] = field(default_factory=dict)


def is_pretraining(image_id: str, share: float = 0.6) -> bool:
    """Whether a training image belongs to the part that only generator and CLIP see: three in five of CIFAR-10, by id."""
    return derive_seed("cifar10-pretraining", image_id) % 1000 < 1000 * share


def through_cameras(tables: Mapping[str, ImageTable], asked: Cameras) -> dict[str, ImageTable]:
    """`{split: table}` with the splits train, validation and test (seen cameras) and test-ood (unseen ones); `domain` is the camera.

    Where an image goes depends on its id alone. Raises DataError where there is no test split or too few training images.
    """
    if "test" not in tables:
        raise DataError(
            "data.cameras needs a training and a test split; name the latter in data.splits, for example {test: their_name}."
        )
    train, test, seed = tables["train"], tables["test"], asked.seed
    left = [
        row for row, name in enumerate(train.ids) if not is_pretraining(name, asked.pretraining)
    ]
    ids = train.ids
    left.sort(key=lambda row: derive_seed("camera-part", seed, ids[row]))
    if len(left) <= asked.validation:
        raise DataError(
            f"data.cameras.validation = {asked.validation} leaves no training image: {len(left)} of {len(train)} are not for pretraining; "
            "lower it."
        )
    listed = {"validation": sorted(left[: asked.validation]), "train": left[asked.validation :]}
    result = {
        split: _taken(train, listed[split], 0, asked.seen, asked, split)
        for split in ("train", "validation")
    }
    out = [
        derive_seed("camera-unseen", seed, name) % (asked.seen + asked.unseen) >= asked.seen
        for name in test.ids
    ]
    result["test"] = _taken(
        test, [row for row, far in enumerate(out) if not far], 0, asked.seen, asked, "test"
    )
    result["test-ood"] = _taken(
        test,
        [row for row, far in enumerate(out) if far],
        asked.seen,
        asked.unseen,
        asked,
        "test-ood",
    )
    return result


def _taken(
    table: ImageTable, rows: list[int], first: int, count: int, asked: Cameras, split: str
) -> ImageTable:
    """The images of these rows, each taken by one of the cameras `first` … `first + count − 1`."""
    most = asked.most.get(split, len(rows))
    ids, seed = table.ids, asked.seed
    if len(rows) > most:
        rows = sorted(rows, key=lambda row: derive_seed("camera-part", seed, ids[row]))[:most]
    part = table.select(sorted(rows))
    numbers, paths = [], []
    stored = part.rows.select_columns("image").with_format("arrow")[:]["image"].combine_chunks()
    for name, path in zip(part.ids, stored.field("path").to_pylist(), strict=True):
        if path is not None and path.startswith(SCHEME):
            path = None  # a name that the data gave to a picture that it holds
        number = first + derive_seed("camera-of", seed, name) % count
        clean = derive_seed("camera-clean", seed, name) % 1000 < 1000 * asked.clean
        numbers.append(number)
        paths.append(
            path
            if clean
            else camera_address(seed, number, derive_seed("camera-shot", seed, number, name), path)
        )
    if not rows:
        raise DataError(
            f"data.cameras leaves no image in {split}; lower data.cameras.seen or unseen."
        )
    image = pa.StructArray.from_arrays(
        [stored.field("bytes").cast(pa.binary()), pa.array(paths, pa.string())],
        names=["bytes", "path"],
    )
    columns = {
        "id": pa.array(part.ids),
        "image": image,
        "label": pa.array(part.labels),
        "domain": [f"camera-{number:02d}" for number in numbers],
    }
    return replace(part, rows=rows_of(pa.table(columns)), schemes=part.schemes | {SCHEME})
