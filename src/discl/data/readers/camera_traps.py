"""A clean data set read as one of camera traps, in disjoint splits.

Written by hand because no library degrades photos by camera: ids, splits and pixels are pure
functions of the images' ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from ...errors import DataError
from ...utils.hashing import derive_seed
from ..cameras import SCHEME, camera_address
from ..table import ImageTable, rows_of


@dataclass(frozen=True)
class Cameras:
    """How a clean data set becomes one of camera traps.

    - `seed`: of all draws.
    - `seen`: number of cameras in train, validation and test.
    - `unseen`: number of further cameras, in test-ood.
    - `clean`: fraction of images that stay as they are, in [0, 1].
    - `pretraining`: fraction of the training images that are left out, for the generator and CLIP
      to be trained on.
    - `validation`: number of validation images, drawn from the other training images.
    - `most`: largest number of images per split.
    """

    seed: int = 0
    seen: int = 12
    unseen: int = 6
    clean: float = 0.2
    pretraining: float = 0.6
    validation: int = 2000
    most: Mapping[str, int] = field(default_factory=dict)


def is_pretraining(image_id: str, fraction: float = 0.6) -> bool:
    """Whether a training image is reserved for training the generator and CLIP; decided by id."""
    return derive_seed("cifar10-pretraining", image_id) % 1000 < 1000 * fraction


def read_camera_traps(clean: Mapping[str, ImageTable], cameras: Cameras) -> dict[str, ImageTable]:
    """`{split: table}` with the splits train, validation, test and test-ood.

    The column `domain` names the camera. Cameras of test-ood are in no other split. The split of
    an image depends on its id alone.

    - `clean`: tables of another reader, with the splits train and test.
    - `cameras`: number of cameras and images.

    Raises DataError without a test split, or with too few training images.
    """
    if "test" not in clean:
        raise DataError(
            "a training and a test split are needed; name the test split, for example "
            "{test: their_name}.",
            argument="splits",
        )
    train, test, seed = clean["train"], clean["test"], cameras.seed
    train_ids, test_ids = train.ids, test.ids
    free = [
        row for row, name in enumerate(train_ids) if not is_pretraining(name, cameras.pretraining)
    ]
    free.sort(key=lambda row: derive_seed("camera-part", seed, train_ids[row]))
    if len(free) <= cameras.validation:
        raise DataError(
            f"validation = {cameras.validation} leaves no training image: {len(free)} of "
            f"{len(train)} are not for pretraining; lower it.",
            argument="cameras",
        )
    everything = cameras.seen + cameras.unseen
    unseen = [
        derive_seed("camera-unseen", seed, name) % everything >= cameras.seen for name in test_ids
    ]
    seen_cameras = range(cameras.seen)
    parts: dict[str, tuple[ImageTable, list[int], range]] = {
        "train": (train, free[cameras.validation :], seen_cameras),
        "validation": (train, sorted(free[: cameras.validation]), seen_cameras),
        "test": (test, [row for row, far in enumerate(unseen) if not far], seen_cameras),
        "test-ood": (
            test,
            [row for row, far in enumerate(unseen) if far],
            range(cameras.seen, everything),
        ),
    }
    return {
        split: _photograph(table, rows, numbers, split, cameras)
        for split, (table, rows, numbers) in parts.items()
    }


def _photograph(
    table: ImageTable, rows: list[int], numbers: Sequence[int], split: str, cameras: Cameras
) -> ImageTable:
    """The images of these rows, each taken by one of the cameras `numbers`."""
    most = cameras.most.get(split, len(rows))
    ids, seed = table.ids, cameras.seed
    if not rows:
        raise DataError(f"no image is left for {split}; lower seen or unseen.", argument="cameras")
    if len(rows) > most:
        rows = sorted(rows, key=lambda row: derive_seed("camera-part", seed, ids[row]))[:most]
    part = table.select(sorted(rows))
    domains, paths = [], []
    stored = part.rows.select_columns("image").with_format("arrow")[:]["image"].combine_chunks()
    for name, path in zip(part.ids, stored.field("path").to_pylist(), strict=True):
        if path is not None and path.startswith(SCHEME):
            path = None  # a name in the data for an image that is stored as bytes
        number = numbers[derive_seed("camera-of", seed, name) % len(numbers)]
        if derive_seed("camera-clean", seed, name) % 1000 >= 1000 * cameras.clean:
            shot = derive_seed("camera-shot", seed, number, name)
            path = camera_address(seed, number, shot, path)
        domains.append(f"camera-{number:02d}")
        paths.append(path)
    image = pa.StructArray.from_arrays(
        [stored.field("bytes").cast(pa.binary()), pa.array(paths, pa.string())],
        names=["bytes", "path"],
    )
    columns = {
        "id": pa.array(part.ids),
        "image": image,
        "label": pa.array(part.labels),
        "domain": domains,
    }
    return replace(part, rows=rows_of(pa.table(columns)), schemes=part.schemes | {SCHEME})
