"""Layouts of other programs: metadata, Roboflow's exports, splits without labels, COCO."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from discl.data import ImageTable, inspect_images, read_tables, without_empty_classes
from discl.data.readers import format_of
from discl.data.table import make_table
from discl.errors import DataError
from discl.stages.init import write_starter
from helpers.miniatures import draw_all, png


def told(table: ImageTable) -> list[tuple[str, str]]:
    """(id, class name) of each row; every image can be read."""
    assert inspect_images(table).unreadable == []
    return [(name, table.class_names[n]) for name, n in zip(table.ids, table.labels, strict=True)]


ROWS = [("1.png", "cat"), ("2.png", "dog"), ("3.png", "cat")]


def as_csv(file: Path, rows: list[tuple[str, str]]) -> None:
    file.write_text("file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows))


def as_jsonl(file: Path, rows: list[tuple[str, str]]) -> None:
    lines = [json.dumps({"file_name": name, "label": label}) for name, label in rows]
    file.write_text("\n".join(lines) + "\n")


def as_parquet(file: Path, rows: list[tuple[str, str]]) -> None:
    names, labels = zip(*rows, strict=True)
    pq.write_table(pa.table({"file_name": names, "label": labels}), file)


WRITERS = {"csv": as_csv, "jsonl": as_jsonl, "parquet": as_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_metadata_beside_the_images(kind: str, tmp_path: Path) -> None:
    draw_all(tmp_path, "1.png", "2.png", "3.png", "4.png")
    WRITERS[kind](tmp_path / f"metadata.{kind}", ROWS)
    assert format_of(str(tmp_path)) == "metadata"
    left_out: list[str] = []
    tables = read_tables(str(tmp_path), on_left_out=left_out.append)
    assert told(tables["train"]) == ROWS
    assert "1 images that the metadata do not name ('4.png')" in left_out[0]


@pytest.mark.parametrize("kind", WRITERS)
def test_metadata_of_each_split(kind: str, tmp_path: Path) -> None:
    for split in ("train", "test"):
        draw_all(tmp_path / split, "1.png", "2.png", "3.png")
        WRITERS[kind](tmp_path / split / f"metadata.{kind}", ROWS)
    tables = read_tables(str(tmp_path))
    assert {split: told(table) for split, table in tables.items()} == {
        split: [(f"{split}/{name}", label) for name, label in ROWS] for split in ("train", "test")
    }


def test_metadata_of_a_root_with_folders_of_splits(tmp_path: Path) -> None:
    draw_all(tmp_path, "train/x/1.png", "train/2.png", "test/3.png")
    rows = [("train/x/1.png", "001"), ("train/2.png", "002"), ("test/3.png", "001")]
    as_csv(tmp_path / "metadata.csv", rows)
    tables = read_tables(str(tmp_path))
    assert {split: told(table) for split, table in tables.items()} == {
        "train": rows[:2],
        "test": rows[2:],
    }


def test_folders_of_classes_stay_folders_of_classes(tmp_path: Path) -> None:
    """As our own export has them: the metadata names the classes that the folders are."""
    draw_all(tmp_path, "brown_bear/1.png", "owl/2.png", "owl/3.png")
    rows = [("brown_bear/1.png", "brown bear"), ("owl/2.png", "owl"), ("owl/3.png", "owl")]
    as_jsonl(tmp_path / "metadata.jsonl", rows)
    assert format_of(str(tmp_path)) == "imagefolder"
    (tmp_path / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "text": "a photo"}) + "\n" for name, _ in rows)
    )
    assert format_of(str(tmp_path)) == "imagefolder"
    as_jsonl(tmp_path / "metadata.jsonl", [*rows[:2], ("owl/3.png", "tawny owl")])
    assert read_tables(str(tmp_path))["train"].class_names == ("brown bear", "owl", "tawny owl")


def test_metadata_that_name_no_class(tmp_path: Path) -> None:
    draw_all(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,a cat\n2.png,a dog\n")
    with pytest.raises(DataError, match=r"^columns: .* no column 'label' \(it has .*text"):
        read_tables(str(tmp_path))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "objects": {"bbox": [1]}}\n')
    with pytest.raises(DataError, match=r"holds metadata\.csv and metadata\.jsonl; keep one"):
        read_tables(str(tmp_path))


def test_a_split_without_metadata_is_told(tmp_path: Path) -> None:
    draw_all(tmp_path, "train/1.png", "train/2.png", "train/3.png", "test/1.png")
    as_csv(tmp_path / "train" / "metadata.csv", ROWS)
    with pytest.raises(DataError, match=r"train have a metadata file, test none.*test: null"):
        read_tables(str(tmp_path))
    assert list(read_tables(str(tmp_path), splits={"test": None})) == ["train"]


def test_init_finds_the_columns_of_metadata(tmp_path: Path) -> None:
    draw_all(tmp_path / "birds", "1.png", "2.png", "3.png")
    as_csv(tmp_path / "birds" / "metadata.csv", ROWS)
    text = (tmp_path / "birds" / "metadata.csv").read_text().replace("label", "class")
    (tmp_path / "birds" / "metadata.csv").write_text(text)
    recipe = yaml.safe_load(write_starter(tmp_path / "birds", tmp_path / "a.yaml").read_text())
    assert recipe["data"]["columns"] == {"label": "class"}
    tables = read_tables(recipe["data"]["root"], columns=recipe["data"]["columns"])
    assert told(tables["train"]) == ROWS


# ---------------------------------------------------------------- Roboflow


def test_roboflows_folders(tmp_path: Path) -> None:
    draw_all(
        tmp_path,
        *(f"{split}/{name}/1.png" for split in ("train", "valid", "test") for name in "ab"),
    )
    (tmp_path / "README.roboflow.txt").write_text("Exported via roboflow.com")
    (tmp_path / "README.dataset.txt").write_text("# birds")
    tables = read_tables(str(tmp_path))
    assert {split: told(table) for split, table in tables.items()} == {
        ours: [(f"{split}/a/1.png", "a"), (f"{split}/b/1.png", "b")]
        for ours, split in (("train", "train"), ("validation", "valid"), ("test", "test"))
    }


def test_roboflows_csv_of_classes(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        draw_all(tmp_path / split, "1.png", "2.png")
        (tmp_path / split / "_classes.csv").write_text(
            "filename, dog, cat\n1.png, 0, 1\n2.png, 1, 0\n"
        )
    tables = read_tables(str(tmp_path))
    assert {split: told(table) for split, table in tables.items()} == {
        ours: [(f"{split}/1.png", "cat"), (f"{split}/2.png", "dog")]
        for ours, split in (("train", "train"), ("validation", "valid"))
    }
    (tmp_path / "valid" / "_classes.csv").write_text("filename, dog, cat\n1.png,1,1\n2.png,0,0\n")
    with pytest.raises(DataError, match="1 images have several classes and 1 have none"):
        read_tables(str(tmp_path))
    (tmp_path / "valid" / "_classes.csv").write_text("filename, dog, cat\n1.png,2,1\n")
    with pytest.raises(DataError, match="0 and 1 are expected; one holds 2"):
        read_tables(str(tmp_path))


def test_roboflows_coco(tmp_path: Path) -> None:
    for split in ("train", "valid"):
        draw_all(tmp_path / split, "1.png", "2.png")
        content = {
            "categories": [
                {"id": n, "name": name} for n, name in enumerate(("birds", "owl", "tit"))
            ],
            "images": [{"id": n, "file_name": f"{n + 1}.png"} for n in range(2)],
            "annotations": [{"id": n, "image_id": n, "category_id": n + 1} for n in range(2)],
        }
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
    tables = read_tables(str(tmp_path))
    assert tables["validation"].class_names == ("birds", "owl", "tit")
    assert [label for _, label in told(tables["validation"])] == ["owl", "tit"]
    left, told_of = without_empty_classes(tables)
    assert left["train"].class_names == ("owl", "tit")
    assert told_of.startswith("1 of 3 classes have no training image and are left out (birds).")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("_annotations.csv", r"_annotations\.csv \(boxes"),
        ("1.xml", r"1\.xml \(boxes of Pascal VOC\)"),
        ("_annotations.createml.json", r"boxes of CreateML"),
        ("labels/1.txt", "images/ and labels/, the layout of YOLO"),
    ],
)
def test_exports_of_boxes_are_named(name: str, message: str, tmp_path: Path) -> None:
    draw_all(tmp_path, "train/images/1.png" if "/" in name else "train/1.png")
    (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "train" / name).write_text("0 0.5 0.5 1 1\n")
    with pytest.raises(DataError, match=f"{message}.*Crop the objects first"):
        read_tables(str(tmp_path))


def test_a_test_folder_without_labels(tmp_path: Path) -> None:
    draw_all(tmp_path, "train/a/1.png", "train/b/1.png", "test/1.png", "test/2.png")
    with pytest.raises(
        DataError, match=r"test holds images and no folders of classes.*test: null.*discl predict"
    ):
        read_tables(str(tmp_path))
    assert list(read_tables(str(tmp_path), splits={"test": None})) == ["train"]
    (tmp_path / "docs").mkdir()
    with pytest.raises(DataError, match=r"holds splits \(test, train\) and other folders \(docs\)"):
        read_tables(str(tmp_path))
    (tmp_path / "docs").rmdir()
    for file in (tmp_path / "test").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="holds neither folders of classes nor images"):
        read_tables(str(tmp_path))


# ---------------------------------------------------------------- tars


def shard(file: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_hidden_files_and_others_in_tars_are_left_out(tmp_path: Path) -> None:
    sample = [("./a.png", png()), ("./a.cls", b"cat"), ("b.jpg", png()), ("b.cls", b"dog")]
    other = [("._a.png", b"x"), ("__MACOSX/._b.jpg", b"x"), (".DS_Store", b"x"), ("README", b"x")]
    text = [("LICENSE.txt", b"MIT"), ("./a.npy", b"x"), ("stats.json", b'{"images": 2}')]
    shard(tmp_path / "train-0.tar", *sample, *other, *text)
    (tmp_path / "._train-0.tar").write_bytes(b"resource fork")
    left_out: list[str] = []
    table = read_tables(str(tmp_path), on_left_out=left_out.append)["train"]
    assert told(table) == [("train-0/./a", "cat"), ("train-0/b", "dog")]
    for text in (
        "3 hidden ('._a.png')",
        "3 that belong to no sample ('README')",
        "1 that ends in .npy",
    ):
        assert text in left_out[0]


def test_one_of_two_pictures_is_chosen(tmp_path: Path) -> None:
    members = [("a.png", png()), ("a.seg.png", b"no picture"), ("a.jpg", b""), ("a.cls", b"1")]
    shard(tmp_path / "train-0.tar", *members)
    with pytest.raises(DataError, match=r"'a' has 2 images \(jpg, png\).*\{image: jpg\}"):
        read_tables(str(tmp_path))
    table = read_tables(str(tmp_path), columns={"image": "png"})["train"]
    assert told(table) == [("train-0/a", "1")]
    shard(tmp_path / "train-0.tar", *members[:1], *members)
    with pytest.raises(DataError, match=r"'a\.png' occurs twice"):
        read_tables(str(tmp_path), columns={"image": "png"})


def test_a_dot_in_a_name_is_explained(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", ("photo.v2.png", png()), ("photo.cls", b"1"))
    with pytest.raises(DataError, match=r"'photo' has no image.*photo\.v2\.png.*first dot"):
        read_tables(str(tmp_path))
    table = read_tables(str(tmp_path), columns={"image": "v2.png"})["train"]
    assert told(table) == [("train-0/photo", "1")]


def test_a_tar_that_is_cut_off(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", ("a.cls", b"1"), ("a.png", bytes(3000)))
    data = (tmp_path / "train-0.tar").read_bytes()
    (tmp_path / "train-0.tar").write_bytes(data[: 4 * 512])
    with pytest.raises(DataError, match=r"train-0\.tar (is cut off|cannot be read as a tar)"):
        read_tables(str(tmp_path))


# ---------------------------------------------------------------- COCO


def coco(root: Path, *names: str) -> None:
    draw_all(root, "train2017/1.png", "train2017/2.png")
    content = {
        "categories": [{"id": 1, "name": "owl"}, {"id": 2, "name": "tit"}],
        "images": [{"id": n, "file_name": f"{n}.png"} for n in (1, 2)],
        "annotations": [{"id": n, "image_id": n, "category_id": n} for n in (1, 2)],
    }
    (root / "annotations").mkdir()
    for name in names:
        (root / "annotations" / name).write_text(json.dumps(content))


def test_coco_as_downloaded(tmp_path: Path) -> None:
    coco(
        tmp_path,
        "captions_train2017.json",
        "instances_train2017.json",
        "person_keypoints_train2017.json",
    )
    (tmp_path / "annotations" / "captions_train2017.json").write_text('{"images": []}')
    assert [name for _, name in told(read_tables(str(tmp_path))["train"])] == ["owl", "tit"]


def test_annotations_that_may_both_be_meant(tmp_path: Path) -> None:
    coco(tmp_path, "a_train.json", "b_train.json")
    with pytest.raises(DataError, match=r"2 files for train \(a_train\.json, b_train\.json\)"):
        read_tables(str(tmp_path))
    tables = read_tables(str(tmp_path), files={"train": "annotations/b_train.json"})
    assert len(tables["train"]) == 2
    for file in (tmp_path / "annotations").iterdir():
        file.unlink()
    (tmp_path / "annotations" / "captions_train2017.json").write_text("{}")
    with pytest.raises(DataError, match=r"no instances_train….json.*captions_train2017\.json"):
        read_tables(str(tmp_path))


# ---------------------------------------------------------------- lists

LISTS: dict[str, Callable[[], bytes]] = {
    "semicolons": lambda: b"path;label\na.png;cat, tame\nsub/b.png;dog\n",
    "utf-16": lambda: "path,label\na.png,cat, tame\nsub/b.png,dog\n".replace(", t", "; t").encode(
        "utf-16"
    ),
    "backslashes": lambda: b"path,label\na.png,cat\nsub\\b.png,dog\n",
    "blank lines": lambda: b"\n\npath,label\n\na.png,cat\n\n\nsub/b.png,dog\n\n",
    "trailing delimiters": lambda: b"path,label,,\na.png,cat,,\nsub/b.png,dog,,\n",
    "new lines in quotes": lambda: (
        b'path,label,note\na.png,cat,"one\ntwo"\nsub/b.png,dog,"""x"""\n'
    ),
    "spaces in the heading": lambda: b"path, label\na.png,cat\nsub/b.png,dog\n",
    "two of another column": lambda: b"path,label,x,x\na.png,cat,1,2\nsub/b.png,dog,3,4\n",
    "bars and a mark": lambda: "\ufeffpath|label\na.png|cat\nsub/b.png|dog\n".encode(),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_other_programs(kind: str, tmp_path: Path) -> None:
    draw_all(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "list.csv").write_bytes(LISTS[kind]())
    first = "cat, tame" if kind == "semicolons" else "cat; tame" if kind == "utf-16" else "cat"
    if kind == "utf-16":
        text = LISTS[kind]().decode("utf-16").replace("cat; tame", '"cat; tame"')
        (tmp_path / "list.csv").write_bytes(text.encode("utf-16"))
    assert told(read_tables(str(tmp_path / "list.csv"))["train"]) == [
        ("a.png", first),
        ("sub/b.png", "dog"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"path,label,label\na.png,x,y\n", "the column label occurs twice"),
        (b"path,path,label\na.png,x,y\n", "the column path occurs twice"),
        (b"path,label\nC:\\birds\\a.png,x\n", r"names 'C:.*a\.png', which is no path below"),
        (b"path,label\nhttps://x.org/a.png,x\n", r"names 'https://x\.org/a\.png', which is no"),
        (b"path,label\na\0.png,x\n", r"names 'a\\x00\.png', which is no path below"),
        (b"path,label\n..\\..\\a.png,x\n", r"'\.\./\.\./a\.png', which leads out of"),
        (b"", "cannot be read as a table"),
        (b"path,label" + b"[" * 100_000 + b",label\na.png,x,7\n", "its first line, .* has no end"),
        (b"path,label\na.png\n", "cannot be read as a table"),
    ],
)
def test_lists_that_are_none(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(text)
    with pytest.raises(DataError, match=message):
        read_tables(str(tmp_path / "list.csv"))


def test_lines_of_json(tmp_path: Path) -> None:
    draw_all(tmp_path, "a.png", "b.png")
    (tmp_path / "list.jsonl").write_text(
        '{"path": "a.png", "label": 7, "more": {"x": [1]}}\n\n{"path": "b.png", "label": 100}\n'
    )
    assert told(read_tables(str(tmp_path / "list.jsonl"))["train"]) == [
        ("a.png", "7"),
        ("b.png", "100"),
    ]


@pytest.mark.parametrize("kind", ["fifo", "folder"])
@pytest.mark.parametrize(
    "name",
    ["list.csv", "metadata.jsonl", "train.parquet", "train-0.tar", "train.bin", "train2018.json"],
)
def test_a_pipe_or_a_folder_that_is_called_like_a_file(
    kind: str, name: str, tmp_path: Path
) -> None:
    """Nothing waits for a pipe, whether it is the root, or lies in it."""
    (os.mkfifo if kind == "fifo" else Path.mkdir)(tmp_path / name)
    for root in (tmp_path / name, tmp_path):
        with pytest.raises(DataError):
            read_tables(str(root))


# ---------------------------------------------------------------- empty classes


def test_classes_without_training_images_are_taken_out() -> None:
    def table(labels: list[int], split: str) -> ImageTable:
        images = [{"bytes": png(), "path": None}] * len(labels)
        ids = [f"{split}-{row}" for row in range(len(labels))]
        return make_table({"id": ids, "image": images, "label": labels}, ("a", "b", "c", "d"))

    tables = {"train": table([3, 1, 3], "train"), "test": table([0, 1, 2, 3], "test")}
    left, text = without_empty_classes(tables)
    assert {split: told(each) for split, each in left.items()} == {
        "train": [("train-0", "d"), ("train-1", "b"), ("train-2", "d")],
        "test": [("test-1", "b"), ("test-3", "d")],
    }
    assert left["test"].class_names == ("b", "d")
    assert text == (
        "2 of 4 classes have no training image and are left out (a, c); with them 2 images of test."
    )
    same, text = without_empty_classes({"train": table([0, 1, 2, 3], "train")})
    assert (same["train"].class_names, text) == (("a", "b", "c", "d"), "")
    with pytest.raises(DataError, match=r"no image of the split test.*\{test: null\}"):
        without_empty_classes({"train": table([3], "train"), "test": table([0], "test")})
