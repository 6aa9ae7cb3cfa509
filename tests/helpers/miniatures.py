"""Miniatures of the paper's data sets: a few tiny images in the exact layout of each set."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REQUIRED: dict[str, Any] = {
    "name": "mine",
    "data": {"root": "images"},
    "spectrum": {"checkpoint": "owner/diffusion", "levels": [0, 50]},
    "filter": {"checkpoint": "owner/clip"},
    "methods": {"ce": {}},
}
"""The required keys of a recipe."""


def draw(path: Path, label: int, number: int) -> None:
    """A 32×32 image: the shade depends on the class, and the noise makes each image unique."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([label, number]).integers(0, 60, (32, 32, 3)) + 60 * (label % 4)
    Image.fromarray(pixels.astype(np.uint8)).save(
        path, "JPEG" if path.suffix in {".jpg", ".JPEG"} else None
    )


def draw_all(root: Path, *names: str) -> None:
    """Images by their paths; each has the label and the number of its place."""
    for number, name in enumerate(names):
        draw(root / name, number, number)


def png() -> bytes:
    """A PNG file of 4×4 black pixels."""
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


def imagenet_lt(root: Path) -> Path:
    """Lists "path label" over ILSVRC's folders; three classes of 24, 6 and 3 training images."""
    folders = ("n01440764", "n01443537", "n02007558")
    number = 0
    for split, counts in (("train", (24, 6, 3)), ("val", (2, 2, 2)), ("test", (2, 2, 2))):
        lines = []
        for label, (folder, count) in enumerate(zip(folders, counts, strict=True)):
            for _ in range(count):
                number += 1
                path = (
                    f"train/{folder}/{folder}_{number}.JPEG"
                    if split != "test"
                    else f"val/{folder}/ILSVRC2012_val_{number:08d}.JPEG"
                )
                draw(root / path, label, number)
                lines.append(f"{path} {label}")
        (root / f"ImageNet_LT_{split}.txt").write_text("\n".join(lines) + "\n")
    names = ("tench, Tinca tinca", "goldfish, Carassius auratus", "flamingo")
    (root / "LOC_synset_mapping.txt").write_text(
        "".join(f"{folder} {name}\n" for folder, name in zip(folders, names, strict=True))
    )
    return root


def cifar100(root: Path, names: list[str], counts: list[int]) -> Path:
    """The binary version: a coarse label, a fine label and 3,072 bytes (red first) per record."""
    root.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for split, of_class in (("train", counts), ("test", [1] * len(names))):
        labels = np.repeat(np.arange(len(names)), of_class)
        records = random.integers(0, 256, (len(labels), 2 + 3072)).astype(np.uint8)
        records[:, 1] = labels
        records.tofile(root / f"{split}.bin")
    (root / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    (root / "coarse_label_names.txt").write_text("everything\n")
    return root


def inaturalist2018(root: Path) -> Path:
    """COCO-style JSON; three species of 24, 5 and 2 training images."""
    species = (("Plantae", 7477), ("Aves", 3103), ("Insecta", 1205))
    categories = [
        {"id": number, "name": f"Species {number}", "supercategory": kind}
        for kind, number in species
    ]
    (root / "train_val2018").mkdir(parents=True)
    (root / "categories.json").write_text(json.dumps(categories))
    taken = 0
    for split, counts in (("train2018", (24, 5, 2)), ("val2018", (3, 3, 3))):
        images, annotations = [], []
        for label, ((kind, number), count) in enumerate(zip(species, counts, strict=True)):
            for _ in range(count):
                taken += 1
                name = f"train_val2018/{kind}/{number}/{taken:032x}.jpg"
                draw(root / name, label, taken)
                images.append(
                    {
                        "id": taken,
                        "file_name": name,
                        "width": 32,
                        "height": 32,
                        "license": 1,
                        "rights_holder": "nobody",
                    }
                )
                annotations.append({"id": taken, "image_id": taken, "category_id": number})
        listed = {
            "info": {"year": 2018},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": n} for _, n in species],
        }
        (root / f"{split}.json").write_text(json.dumps(listed))
    return root


def iwildcam(root: Path) -> Path:
    """`metadata.csv` and `categories.csv` as in iWildCam v2.0 of WILDS.

    There are three classes. Each split has its own cameras and sequences.
    """
    root.mkdir(parents=True, exist_ok=True)
    names = ("empty", "tayassu pecari", "panthera onca")
    with (root / "categories.csv").open("w", newline="") as file:
        listed = [
            *((label, 10 * label, name) for label, name in enumerate(names)),
            (99999, 77, "gulo gulo"),
            (99999, 78, "unknown"),
        ]
        csv.writer(file).writerows([("y", "category_id", "name"), *listed])
    # the first column, without a name, is the row number; y = 99999 is a category without images
    head = (
        "",
        "split",
        "location_remapped",
        "location",
        "sequence_remapped",
        "seq_id",
        "y",
        "category_id",
        "datetime",
        "filename",
        "image_id",
    )
    rows, number = [], 0
    for camera, (split, count) in enumerate(
        (("train", 8), ("id_val", 2), ("id_test", 2), ("val", 2), ("test", 2))
    ):
        for label in range(len(names)):
            for _ in range(count):
                number += 1
                draw(root / "train" / f"{number:08x}.jpg", label, number)
                place = camera if camera > 2 else 0
                taken = (label, 10 * label, "2013-01-01 00:00:00", f"{number:08x}.jpg", number)
                rows.append((number - 1, split, place, 100 + place, number, f"s{number}", *taken))
    with (root / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
    return root


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(root: Path, train: int = 400, test: int = 80) -> Path:
    """`uoft-cs/cifar10` on the hub: a Parquet file per split with `img` and `label`, no ids."""
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    root.mkdir(parents=True, exist_ok=True)
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=list(CIFAR10))})
    for split, first, count in (("train", 0, train), ("test", train, test)):
        rows: dict[str, list] = {"img": [], "label": []}
        for number in range(first, first + count):
            draw(root / "one.png", number % 10, number)
            rows["img"].append({"bytes": (root / "one.png").read_bytes(), "path": None})
            rows["label"].append(number % 10)
        Dataset.from_dict(rows, features).to_parquet(root / f"{split}-00000-of-00001.parquet")
    (root / "one.png").unlink()
    return root
