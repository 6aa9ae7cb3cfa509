"""Each data set's exact layout on disk, in miniature: what its reader reads and refuses."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from discl.data import ImageTable, read_tables
from discl.data.readers import READERS
from discl.errors import DataError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def shade(number: int) -> Image.Image:
    return Image.new("RGB", (6, 4), (number, 255 - number, 7))


def draw(root: Path, *names: str) -> None:
    """Images whose first channel is their number."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shade(number).save(root / name, lossless=True) if name.endswith(".webp") else shade(
            number
        ).save(root / name)


def encoded(number: int) -> bytes:
    stream = io.BytesIO()
    shade(number).save(stream, "PNG")
    return stream.getvalue()


def told(table: ImageTable) -> list[tuple[str, int, str]]:
    """(id, first channel of the picture, class name) of each row."""
    pixels = [table.image(row).getpixel((0, 0)) for row in range(len(table))]
    return [
        (name, pixel[0], table.class_names[label])
        for name, pixel, label in zip(table.ids, pixels, table.labels, strict=True)
    ]


# ---------------------------------------------------------------- one miniature per format


def imagenet_lt(root: Path) -> None:
    draw(
        root,
        "train/n01/n01_1.png",
        "train/n02/n02 ü 1.png",
        "train/n01/n01_2.png",
        "val/n02/val_1.png",
        "val/n01/val_2.png",
    )
    (root / "ImageNet_LT_train.txt").write_text(
        "train/n02/n02 ü 1.png 1\ntrain/n01/n01_1.png 0\n", encoding="utf-8"
    )
    (root / "ImageNet_LT_val.txt").write_text("train/n01/n01_2.png 0\n")
    (root / "ImageNet_LT_test.txt").write_text("val/n02/val_1.png 1\nval/n01/val_2.png 0\n")
    (root / "LOC_synset_mapping.txt").write_text("n01 tench, Tinca tinca\nn02 goldfish\n")


def cifar_binary(root: Path, label_bytes: int, files: dict[str, int]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for place, (name, rows) in enumerate(files.items()):
        records = np.zeros((rows, label_bytes + 3072), np.uint8)
        records[:, label_bytes - 1] = np.arange(rows) % 3
        records[:, label_bytes : label_bytes + 1024] = 10 * place + np.arange(rows)[:, None]  # red
        records[:, label_bytes + 1024 : label_bytes + 2048] = 100
        records.tofile(root / name)


def cifar10(root: Path) -> None:
    cifar_binary(
        root, 1, {f"data_batch_{number}.bin": 3 for number in range(1, 6)} | {"test_batch.bin": 4}
    )
    (root / "batches.meta.txt").write_text("airplane\nautomobile\nbird\n\n")


def cifar100(root: Path) -> None:
    cifar_binary(root, 2, {"train.bin": 6, "test.bin": 3})
    (root / "fine_label_names.txt").write_text("apple\naquarium_fish\nbaby\n")


def inaturalist(root: Path) -> None:
    draw(
        root,
        "train_val2018/Aves/5/a.png",
        "train_val2018/Aves/9/b.png",
        "train_val2018/Aves/9/c.png",
    )

    def write(name: str, images: list[tuple[int, str, int]]) -> None:
        content = {
            "images": [
                {"id": number, "file_name": f"train_val2018/Aves/{category}/{file}"}
                for number, file, category in images
            ],
            "annotations": [
                {"id": number, "image_id": number, "category_id": category}
                for number, _, category in images
            ],
            "categories": [{"id": 5, "name": "5"}, {"id": 9, "name": "9"}],
        }
        (root / name).write_text(json.dumps(content))

    write("train2018.json", [(1, "a.png", 5), (2, "b.png", 9)])
    write("val2018.json", [(3, "c.png", 9)])
    (root / "categories.json").write_text(
        json.dumps([{"id": 5, "name": "Corvus corax"}, {"id": 9, "name": "Pica pica"}])
    )


def coco(root: Path) -> None:
    draw(root, "train2017/1.png", "train2017/2.png", "val2017/3.png")
    (root / "annotations").mkdir()
    for split, numbers in (("train", (1, 2)), ("val", (3,))):
        content = {
            "images": [{"id": number, "file_name": f"{number}.png"} for number in numbers],
            "annotations": [
                {"id": number * 10 + part, "image_id": number, "category_id": number % 2}
                for number in numbers
                for part in (0, 1)
            ],
            "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
        }
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def wilds(root: Path) -> None:
    draw(root / "train", *(f"{name}.png" for name in "abcdef"))
    splits = ["train", "train", "id_val", "val", "id_test", "test"]
    lines = [
        f"{place},{split},{place + 100},s{place},{1 + place % 2},{'abcdef'[place]}.png"
        for place, split in enumerate(splits)
    ]
    (root / "metadata.csv").write_text(
        ",split,location_remapped,sequence_remapped,y,filename\n" + "\n".join(lines) + "\n"
    )
    names = (
        "0,0,empty",
        "1,2,tayassu pecari",
        "2,3,dasyprocta punctata",
        "99999,9,gulo gulo",
        "99999,10,lutra lutra",
    )
    (root / "categories.csv").write_text("\n".join(("y,category_id,name", *names)))


def manifest(root: Path) -> None:
    draw(root, "pictures/one.png", "pictures/two, or three.png", "pictures/vier.png")
    lines = [
        "path,label,split",
        "pictures/one.png,cat,train",
        '"pictures/two, or three.png",dog,train',
        "pictures/vier.png,cat,test",
    ]
    (root / "list.csv").write_text("\n".join(lines) + "\n")


def webdataset(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for shard, numbers in (("train-000000", (0, 1)), ("train-000001", (2,)), ("test-000000", (3,))):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for number in numbers:
                for suffix, data in (
                    ("png", encoded(number)),
                    ("json", json.dumps({"label": "ab"[number % 2]}).encode()),
                ):
                    member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


EXPECTED: dict[str, tuple[Callable[[Path], None], str, dict[str, list[tuple[str, int, str]]]]] = {
    "imagenet-lt": (
        imagenet_lt,
        "imagenet-lt",
        {
            "train": [
                ("train/n02/n02 ü 1.png", 1, "goldfish"),
                ("train/n01/n01_1.png", 0, "tench"),
            ],
            "validation": [("train/n01/n01_2.png", 2, "tench")],
            "test": [("val/n02/val_1.png", 3, "goldfish"), ("val/n01/val_2.png", 4, "tench")],
        },
    ),
    "cifar-100": (
        cifar100,
        "cifar",
        {
            "train": [
                (f"train-0000{row}", row, ("apple", "aquarium fish", "baby")[row % 3])
                for row in range(6)
            ],
            "test": [
                (f"test-0000{row}", 10 + row, ("apple", "aquarium fish", "baby")[row])
                for row in range(3)
            ],
        },
    ),
    "inaturalist": (
        inaturalist,
        "inaturalist",
        {
            "train": [
                ("train_val2018/Aves/5/a.png", 0, "Corvus corax"),
                ("train_val2018/Aves/9/b.png", 1, "Pica pica"),
            ],
            "validation": [("train_val2018/Aves/9/c.png", 2, "Pica pica")],
        },
    ),
    "coco": (
        coco,
        "coco",
        {"train": [("1.png", 0, "dog"), ("2.png", 1, "cat")], "validation": [("3.png", 2, "dog")]},
    ),
    "wilds": (
        wilds,
        "wilds",
        {
            "train": [
                ("a.png", 0, "white-lipped peccary"),
                ("b.png", 1, "Central American agouti"),
            ],
            "validation": [("c.png", 2, "white-lipped peccary")],
            "test": [("e.png", 4, "white-lipped peccary")],
            "validation-ood": [("d.png", 3, "Central American agouti")],
            "test-ood": [("f.png", 5, "Central American agouti")],
        },
    ),
    "manifest": (
        manifest,
        "manifest",
        {
            "train": [("pictures/one.png", 0, "cat"), ("pictures/two, or three.png", 1, "dog")],
            "test": [("pictures/vier.png", 2, "cat")],
        },
    ),
    "webdataset": (
        webdataset,
        "webdataset",
        {
            "train": [
                ("train-000000/000", 0, "a"),
                ("train-000000/001", 1, "b"),
                ("train-000001/002", 2, "a"),
            ],
            "test": [("test-000000/003", 3, "b")],
        },
    ),
}


@pytest.fixture(params=EXPECTED)
def miniature(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[Path, str, dict[str, list[tuple[str, int, str]]]]:
    make, kind, expected = EXPECTED[request.param]
    root = tmp_path / "data ü"
    root.mkdir()
    make(root)
    return root, kind, expected


def test_what_lies_in_the_exact_layout_is_found(
    miniature: tuple[Path, str, dict[str, list[tuple[str, int, str]]]],
) -> None:
    root, kind, expected = miniature
    assert {split: told(table) for split, table in read_tables(str(root), kind).items()} == expected


def test_the_format_is_recognised(
    miniature: tuple[Path, str, dict[str, list[tuple[str, int, str]]]],
) -> None:
    root, kind, _ = miniature
    named, guessed = read_tables(str(root), kind), read_tables(str(root))
    assert {split: table.ids for split, table in guessed.items()} == {
        split: table.ids for split, table in named.items()
    }


@pytest.mark.parametrize(
    "kind", sorted(set(READERS) - {"hub", "imagefolder", "parquet", "datasets", "manifest"})
)
def test_a_wrong_root_shows_the_tree_that_was_expected(kind: str, tmp_path: Path) -> None:
    draw(tmp_path, "photos/cat/1.jpg")
    with pytest.raises(
        DataError, match=rf"is not laid out as {kind}. Expected in .*(\n.*)+\nFound: photos/"
    ) as raised:
        read_tables(str(tmp_path), kind)
    assert "train" in str(raised.value)


def test_cifar10_in_five_batches(tmp_path: Path) -> None:
    cifar10(tmp_path / "cifar-10-batches-bin")
    tables = read_tables(str(tmp_path))
    assert [len(table) for table in tables.values()] == [15, 4]
    assert told(tables["train"])[3] == ("train-00003", 10, "airplane")
    assert tables["train"].image(0).getpixel((31, 31)) == (0, 100, 0)


def test_pickled_cifar_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(DataError, match=r"never unpickled .* binary version .*Parquet"):
        read_tables(str(tmp_path))


def test_a_truncated_batch_is_told(tmp_path: Path) -> None:
    cifar100(tmp_path)
    with (tmp_path / "test.bin").open("ab") as file:
        file.write(b"12345")
    with pytest.raises(DataError, match=r"test\.bin has 9227 bytes, which is no multiple of 3074"):
        read_tables(str(tmp_path))


def test_wilds_carries_cameras_and_sequences(tmp_path: Path) -> None:
    wilds(tmp_path)
    table = read_tables(str(tmp_path))["train"]
    assert (table.rows["domain"][:], table.rows["group"][:]) == (["100", "101"], ["s0", "s1"])
    assert table.class_names == (
        "empty landscape",
        "white-lipped peccary",
        "Central American agouti",
    )


def test_a_split_that_was_given_another_name_is_not_taken_twice(tmp_path: Path) -> None:
    inaturalist(tmp_path)
    assert set(read_tables(str(tmp_path), splits={"test": "val"})) == {"train", "test"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train/n01/n01_1.png", r"ImageNet_LT_train\.txt, line 1: 'path label' is expected"),
        ("train/n01/n01_1.png -1", r"line 1: .* a whole number from 0"),
        ("train/n01/n01_1.png n01", r"line 1: .* a whole number from 0"),
        (
            "train/n01/n01_1.png 7",
            r"n01 has the label 7 in ImageNet_LT_train\.txt and 0 in ImageNet_LT_val\.txt",
        ),
        ("../outside/1.png 0", r"leads out of"),
        ("/etc/1.png 0", r"names '/etc/1\.png', which is outside /"),
        ("train/../../1.png 0", r"leads out of"),
    ],
)
def test_a_list_of_another_kind(line: str, message: str, tmp_path: Path) -> None:
    imagenet_lt(tmp_path)
    (tmp_path / "ImageNet_LT_train.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_tables(str(tmp_path), "imagenet-lt")


def test_lists_by_name(tmp_path: Path) -> None:
    imagenet_lt(tmp_path)
    for name in ("train", "val", "test"):
        (tmp_path / f"ImageNet_LT_{name}.txt").rename(tmp_path / f"my_{name}.txt")
    tables = read_tables(
        str(tmp_path), "imagenet-lt", files={"train": "my_train.txt", "test": "my_test.txt"}
    )
    assert {split: len(table) for split, table in tables.items()} == {"train": 2, "test": 2}
    with pytest.raises(DataError, match=r"there is no list .*lost\.txt"):
        read_tables(str(tmp_path), "imagenet-lt", files={"train": "lost.txt"})


def test_ids_of_images_may_be_texts(tmp_path: Path) -> None:
    coco(tmp_path)
    told_before = {split: told(table) for split, table in read_tables(str(tmp_path)).items()}
    for file in (tmp_path / "annotations").iterdir():
        content = json.loads(file.read_text())
        for each in content["images"]:
            each["id"] = f"camera/{each['id']}"
        for each in content["annotations"]:
            each["image_id"] = f"camera/{each['image_id']}"
        file.write_text(json.dumps(content))
    assert {
        split: told(table) for split, table in read_tables(str(tmp_path)).items()
    } == told_before


def test_a_category_that_is_not_listed(tmp_path: Path) -> None:
    coco(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 4711
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"category 4711 is in no list"):
        read_tables(str(tmp_path))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("name", ["short", "ü", "deep/" * 30 + "picture", "x" * 90, "x" * 95])
def test_tars_of_every_kind_give_the_same(kind: int, name: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w", format=kind) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        for suffix, data in (
            ("png", encoded(5)),
            ("cls", b"1"),
            ("png", encoded(6)),
            ("cls", b"0"),
        ):
            member = tarfile.TarInfo(f"{name}{int(data in (encoded(6), b'0'))}.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        if name == "short":
            tar.addfile(folder)
    assert told(read_tables(str(tmp_path))["train"]) == [
        (f"train-0/{name}0", 5, "1"),
        (f"train-0/{name}1", 6, "0"),
    ]


def test_an_image_of_several_categories_is_of_no_class(tmp_path: Path) -> None:
    coco(tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"].append({"id": 99, "image_id": 1, "category_id": 0})
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1 images show several categories"):
        read_tables(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1",
        '{"images": []}',
        "null",
        '{"images": [',
        '{"images": [{"id": 1.5}], "annotations": []}',
    ],
)
def test_annotations_of_another_kind(text: str, tmp_path: Path) -> None:
    inaturalist(tmp_path)
    (tmp_path / "train2018.json").write_text(text)
    with pytest.raises(DataError, match=r"train2018\.json (cannot be read as JSON|has no)"):
        read_tables(str(tmp_path))


def test_a_manifest_of_its_own_words(tmp_path: Path) -> None:
    manifest(tmp_path)
    (tmp_path / "list.csv").write_text("file;kind\n")
    draw(tmp_path, "a.png", "b.png")
    (tmp_path / "list.tsv").write_text("file\tkind\na.png\t3\nb.png\t0\n")
    tables = read_tables(str(tmp_path / "list.tsv"), columns={"image": "file", "label": "kind"})
    assert told(tables["train"]) == [("a.png", 0, "3"), ("b.png", 1, "0")]
    with pytest.raises(DataError, match=r"unknown column 'path'; known: file, kind"):
        read_tables(str(tmp_path / "list.tsv"))


def test_a_sample_without_a_label_is_named(tmp_path: Path) -> None:
    webdataset(tmp_path)
    with tarfile.open(tmp_path / "train-000000.tar", "a") as tar:
        member = tarfile.TarInfo("lonely.png")
        member.size = len(encoded(1))
        tar.addfile(member, io.BytesIO(encoded(1)))
    with pytest.raises(DataError, match=r"sample 'lonely' has no label"):
        read_tables(str(tmp_path))


def test_a_shard_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(b"no tar" * 300)
    with pytest.raises(DataError, match=r"train-0\.tar cannot be read as a tar file"):
        read_tables(str(tmp_path))
