"""One function per format, all in `FORMATS`.

An image is a mapping: `id`, encoded `bytes`, `label` (a number), and facts such as level and
prompt. Facts are plain values and become metadata. All images of an export have the same keys.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from PIL import Image as Pillow

from ..escaping import one_line
from .signatures import suffix_of

Image = Mapping[str, Any]
Write = Callable[[Path, Iterable[Image], Sequence[str]], None]

SPLIT = "train"
"""Split of an export."""
SHARD_IMAGES, SHARD_BYTES = 5_000, 400_000_000
LABELLING = """\
<View>
  <Image name="image" value="$image"/>
  <Choices name="class" toName="image" choice="single">
{choices}  </Choices>
</View>
"""
"""The labelling interface of Label Studio for one class per image."""
LONGEST_NAME = 80
RESERVED = {
    *("con", "prn", "aux", "nul"),
    *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)),
}
"""Names of devices on Windows, which no file may have."""


def write_imagefolder(folder: Path, images: Iterable[Image], class_names: Sequence[str]) -> None:
    """Writes `CLASS/LEVEL-ID.webp` and `metadata.jsonl`.

    `datasets.load_dataset("imagefolder", data_dir=...)` and torchvision read it.
    """
    _write_class_folders(folder, "", images, class_names)


def write_yolo(folder: Path, images: Iterable[Image], class_names: Sequence[str]) -> None:
    """Writes `train/CLASS/LEVEL-ID.webp` and `metadata.jsonl`: a classification set of Ultralytics.

    Add real images as `train/` and `val/`; there is no synthetic validation image.
    """
    _write_class_folders(folder, f"{SPLIT}/", images, class_names)


def write_coco(folder: Path, images: Iterable[Image], class_names: Sequence[str]) -> None:
    """Writes `train/ID.webp` and `annotations/instances_train.json`.

    The box of an annotation is the whole image. Categories are numbered from 1. The entry of an
    image has its facts, the text id as `request_id`.
    """
    (folder / SPLIT).mkdir()
    (folder / "annotations").mkdir()
    entries, boxes = [], []
    for number, image in enumerate(images, 1):
        name = f"{image['id']}.{suffix_of(image['bytes'])}"
        (folder / SPLIT / name).write_bytes(image["bytes"])
        with Pillow.open(io.BytesIO(image["bytes"])) as opened:
            width, height = opened.size
        facts = {**_facts(image, class_names), "request_id": image["id"], "id": number}
        entries.append({**facts, "file_name": name, "width": width, "height": height})
        boxes.append(
            {
                "id": number,
                "image_id": number,
                "category_id": image["label"] + 1,
                "bbox": [0, 0, width, height],
                "area": width * height,
                "iscrowd": 0,
            }
        )
    categories = [{"id": label, "name": name} for label, name in enumerate(class_names, 1)]
    content = {"images": entries, "annotations": boxes, "categories": categories}
    _write_json(folder / "annotations" / f"instances_{SPLIT}.json", content)


def write_fiftyone(folder: Path, images: Iterable[Image], class_names: Sequence[str]) -> None:
    """Writes `data/ID.webp` and `labels.json`: FiftyOne's type FiftyOneImageClassificationDataset.

    The facts of an image are attributes of its label.
    """
    (folder / "data").mkdir()
    labels = {}
    for image in images:
        name = f"{image['id']}.{suffix_of(image['bytes'])}"
        (folder / "data" / name).write_bytes(image["bytes"])
        facts = {key: value for key, value in image.items() if key not in {"bytes", "label", "id"}}
        labels[image["id"]] = {"label": image["label"], "attributes": facts}
    _write_json(folder / "labels.json", {"classes": list(class_names), "labels": labels})


def write_label_studio(folder: Path, images: Iterable[Image], class_names: Sequence[str]) -> None:
    r"""Writes `images/ID.webp`, `tasks.json` and `labels.xml`: tasks to import into Label Studio.

    The class of an image is a prediction, which a person confirms or changes. Paths are those of
    Label Studio's local files, below the document root `folder`. XML holds no control characters:
    they are written as `\x1b` in the names of classes.
    """
    class_names = [one_line(name) for name in class_names]
    (folder / "images").mkdir()
    tasks: list[dict[str, Any]] = []
    for image in images:
        name = f"images/{image['id']}.{suffix_of(image['bytes'])}"
        (folder / name).write_bytes(image["bytes"])
        facts = _facts(image, class_names)
        chosen: dict[str, Any] = {"choices": [facts["label"]]}
        result = {"from_name": "class", "to_name": "image", "type": "choices", "value": chosen}
        tasks.append(
            {
                "data": {**facts, "image": f"/data/local-files/?d={name}"},
                "predictions": [{"model_version": "discl", "result": [result]}],
            }
        )
    _write_json(folder / "tasks.json", tasks)
    choices = "".join(f"    <Choice value={quoteattr(name)}/>\n" for name in class_names)
    (folder / "labels.xml").write_text(LABELLING.format(choices=choices), encoding="utf-8")


def write_webdataset(folder: Path, images: Iterable[Image], class_names: Sequence[str]) -> None:
    """Writes `train-000000.tar` and so on, with `ID.webp` and `ID.json` for each image.

    The key `label` of the JSON is the name of the class.
    """
    for number, part in enumerate(_parts(images)):
        with tarfile.open(
            folder / f"train-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT
        ) as tar:
            for image in part:
                _add(tar, f"{image['id']}.{suffix_of(image['bytes'])}", image["bytes"])
                _add(
                    tar,
                    f"{image['id']}.json",
                    json.dumps(_facts(image, class_names), ensure_ascii=False).encode(),
                )


def write_hub_folder(folder: Path, images: Iterable[Image], class_names: Sequence[str]) -> None:
    """Writes `data/train-00000.parquet` and so on.

    `datasets.load_dataset(FOLDER)` and the hub's viewer read it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import ClassLabel, Features, Image, Value

    (folder / "data").mkdir()
    kinds = {bool: "bool", int: "int32", float: "float64", str: "string"}
    for number, part in enumerate(_parts(images)):
        facts = [key for key in part[0] if key not in {"id", "label", "bytes"}]
        known = {
            key: next((image[key] for image in part if image[key] is not None), "") for key in facts
        }
        features = Features(
            {"image": Image(), "label": ClassLabel(names=list(class_names)), "id": Value("string")}
            | {key: Value(kinds[type(value)]) for key, value in known.items()}
        )
        rows = [
            {
                "image": {
                    "bytes": image["bytes"],
                    "path": f"{image['id']}.{suffix_of(image['bytes'])}",
                },
                "label": image["label"],
            }
            | {"id": image["id"], **{key: image[key] for key in facts}}
            for image in part
        ]
        table = pa.Table.from_pylist(rows, features.arrow_schema)
        pq.write_table(table, folder / "data" / f"train-{number:05d}.parquet", row_group_size=100)


FORMATS: dict[str, Write] = {
    "imagefolder": write_imagefolder,
    "webdataset": write_webdataset,
    "hub-folder": write_hub_folder,
    "yolo": write_yolo,
    "coco": write_coco,
    "fiftyone": write_fiftyone,
    "label-studio": write_label_studio,
}


def safe_names(names: Sequence[str]) -> list[str]:
    """A folder name for each class that is valid on every file system.

    Different names stay different, also where case is ignored.
    """
    taken: set[str] = set()
    result = []
    for name in names:
        plain = re.sub(r"[^\w.+-]+", "_", unicodedata.normalize("NFC", name)).strip("._")
        while len(plain.encode()) > LONGEST_NAME:
            plain = plain[:-1]
        if not plain or plain.casefold().split(".")[0] in RESERVED:
            plain = f"class_{plain}"
        if plain.casefold() in taken:
            plain = f"{plain}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
        taken.add(plain.casefold())
        result.append(plain)
    return result


def _write_class_folders(
    folder: Path, below: str, images: Iterable[Image], class_names: Sequence[str]
) -> None:
    """A folder per class below `below` ("" or "train/"), and `metadata.jsonl`."""
    folders = safe_names(class_names)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as listed:
        for image in images:
            file = f"{image['level']:03d}-{image['id']}.{suffix_of(image['bytes'])}"
            name = f"{below}{folders[image['label']]}/{file}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(image["bytes"])
            row = {"file_name": name, **_facts(image, class_names)}
            listed.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _facts(image: Image, class_names: Sequence[str]) -> dict[str, Any]:
    facts = {key: value for key, value in image.items() if key not in {"bytes", "label"}}
    return {**facts, "label": class_names[image["label"]], "label_index": image["label"]}


def _parts(images: Iterable[Image]) -> Iterator[list[Image]]:
    """Consecutive images: at most 5,000, and about 400 MB."""
    part: list[Image] = []
    size = 0
    for image in images:
        part.append(image)
        size += len(image["bytes"])
        if len(part) >= SHARD_IMAGES or size >= SHARD_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file without date and owner, so that the same images give the same tar."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))
