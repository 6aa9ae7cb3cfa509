"""Readers of image folders and Parquet files: what they find, and what they refuse."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from discl.data import ImageTable, inspect_images, read_tables
from discl.data.addresses import SLICE
from discl.data.cameras import SCHEME, camera_address
from discl.data.table import make_table
from discl.errors import DataError, RecipeError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (number % 256, number // 256, 7))


def write_images(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(root / name)
    return root


def write_parquet(
    path: Path, labels: list[Any], feature: Any, **columns: tuple[list[Any], Any]
) -> Path:
    """A Parquet file with the features of `datasets`; `columns` are further (values, feature)."""
    stored = []
    for number in range(len(labels)):
        stream = io.BytesIO()
        picture(number).save(stream, "PNG")
        stored.append({"bytes": stream.getvalue(), "path": None})
    everything = {"image": (stored, ImageFeature()), "label": (labels, feature), **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(
        {name: values for name, (values, _) in everything.items()},
        Features({name: kind for name, (_, kind) in everything.items()}),
    ).to_parquet(str(path))
    return path


def told(table: ImageTable) -> list[tuple[str, str]]:
    """(id, class name) of each row."""
    return [
        (name, table.class_names[label])
        for name, label in zip(table.ids, table.labels, strict=True)
    ]


# ---------------------------------------------------------------- image folders


def test_a_flat_folder_is_training_data(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", "dog/b.png", "dog/a.jpg", "cat/sub/c.PNG", "cat/x.webp")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_bytes(b"")
    (root / ".git").mkdir()
    tables = read_tables(str(root))
    assert list(tables) == ["train"]
    assert told(tables["train"]) == [
        ("cat/sub/c.PNG", "cat"),
        ("cat/x.webp", "cat"),
        ("dog/a.jpg", "dog"),
        ("dog/b.png", "dog"),
    ]
    assert tables["train"].class_counts.tolist() == [2, 2]
    assert tables["train"].image(3).getpixel((0, 0)) == (0, 0, 7)


def test_a_folder_with_splits(tmp_path: Path) -> None:
    root = write_images(
        tmp_path,
        "Training/a/1.png",
        "Training/b/1.png",
        "val/b/2.png",
        "test/a/3.png",
        "test/b/3.png",
    )
    tables = read_tables(str(root))
    assert list(tables) == ["train", "validation", "test"]
    assert {split: told(table) for split, table in tables.items()} == {
        "train": [("Training/a/1.png", "a"), ("Training/b/1.png", "b")],
        "validation": [("val/b/2.png", "b")],
        "test": [("test/a/3.png", "a"), ("test/b/3.png", "b")],
    }
    assert {table.class_names for table in tables.values()} == {("a", "b")}


def test_splits_of_a_folder_may_have_other_names(tmp_path: Path) -> None:
    root = write_images(tmp_path, "train/a/1.png", "eval/a/2.png")
    tables = read_tables(str(root), splits={"test": "eval"})
    assert {split: told(table) for split, table in tables.items()} == {
        "train": [("train/a/1.png", "a")],
        "test": [("eval/a/2.png", "a")],
    }


def test_splits_beside_other_folders_are_not_taken_for_classes(tmp_path: Path) -> None:
    root = write_images(tmp_path, "train/a/1.png", "test/a/2.png", "extra/a/3.png")
    message = r"^splits: .*holds splits \(test, train\) and other folders \(extra\)"
    with pytest.raises(DataError, match=message):
        read_tables(str(root))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    root = write_images(tmp_path, "train/1.png", "bus/1.png")
    assert told(read_tables(str(root))["train"]) == [("bus/1.png", "bus"), ("train/1.png", "train")]


def test_names_with_spaces_and_of_all_scripts(tmp_path: Path) -> None:
    root = write_images(
        tmp_path / "Vögel im Gärten 鳥",
        "Rotkehlchen (♀)/bild 1.png",
        "シジュウカラ/#2 %20.png",
        "it's/a.png",
    )
    table = read_tables(str(root))["train"]
    assert told(table) == [
        ("Rotkehlchen (♀)/bild 1.png", "Rotkehlchen (♀)"),
        ("it's/a.png", "it's"),
        ("シジュウカラ/#2 %20.png", "シジュウカラ"),
    ]
    assert [table.image(row).size for row in range(3)] == [(4, 4)] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names themselves")
def test_a_file_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png")
    (tmp_path / "a" / os.fsdecode(b"x\xff.png")).write_bytes(b"")
    with pytest.raises(
        DataError,
        match=r"the file name 'a/x\\udcff\.png' in .* is not valid UTF-8; rename the file",
    ):
        read_tables(str(tmp_path))


def test_ids_are_stable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_images(tmp_path / "data", "b/2.png", "a/1.png")
    ids = read_tables(str(root))["train"].ids
    monkeypatch.chdir(tmp_path)
    assert read_tables("data")["train"].ids == ids == ["a/1.png", "b/2.png"]
    write_images(root, "a/0.png")
    assert read_tables("data")["train"].ids == ["a/0.png", *ids]


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"class 'empty' has no images: none in .*empty ends in .*\.bmp, .*\.gif"
    ):
        read_tables(str(tmp_path))


def test_links_that_leave_the_root_are_refused(tmp_path: Path) -> None:
    outside = write_images(tmp_path / "outside", "c/secret.png")
    root = write_images(tmp_path / "data", "a/1.png", "b/1.png")
    (root / "a" / "within.png").symlink_to(root / "b" / "1.png")
    assert len(read_tables(str(root))["train"]) == 3
    (root / "a" / "link.png").symlink_to(outside / "c" / "secret.png")
    with pytest.raises(
        DataError,
        match=r"link\.png.* leads to .*secret\.png, outside the root .*data; copy the images there",
    ):
        read_tables(str(root))
    (root / "a" / "link.png").unlink()
    (root / "c").symlink_to(outside / "c")
    with pytest.raises(DataError, match=r"c.* leads to .*outside.c, outside the root"):
        read_tables(str(root))


@pytest.mark.parametrize("listed", [False, True])
def test_file_names_may_hold_two_colons(listed: bool, tmp_path: Path) -> None:
    """They separate the parts of addresses, and nothing else."""
    root = write_images(tmp_path / "da::ta", "a/a::b.png", "b/slice:::::1.png")
    if listed:
        (root / "all.csv").write_text("path,label\na/a::b.png,a\nb/slice:::::1.png,b\n")
    table = read_tables(str(root / "all.csv" if listed else root))["train"]
    assert table.ids == ["a/a::b.png", "b/slice:::::1.png"] and table.root is not None
    assert inspect_images(table).unreadable == []
    assert (
        inspect_images(replace(table, root=root / "b")).unreadable[0][0] == 0
    )  # what leads away is still told


def test_addresses_of_files_whose_names_hold_two_colons(tmp_path: Path) -> None:
    file = write_images(tmp_path / "da::ta", "a::b.png") / "a::b.png"
    part = f"slice://0:{file.stat().st_size}::{file}"
    paths = [str(file), part, camera_address(0, 0, 1, str(file)), camera_address(0, 0, 1, part)]
    columns = {
        "id": ["a", "b", "c", "d"],
        "image": [{"bytes": None, "path": path} for path in paths],
        "label": [0] * 4,
    }
    with pytest.raises(DataError, match="slice://"):
        make_table(columns, ["x"], file.parent)
    table = make_table(columns, ["x"], file.parent, (SCHEME, SLICE))
    found = inspect_images(table)
    assert found.unreadable == [] and len(set(found.digests)) == 2
    assert len(inspect_images(replace(table, root=tmp_path / "elsewhere")).unreadable) == 4


def test_a_root_that_is_itself_a_link_is_followed(tmp_path: Path) -> None:
    write_images(tmp_path / "data", "a/1.png")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert read_tables(str(tmp_path / "link"))["train"].ids == ["a/1.png"]


def test_a_root_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        DataError,
        match=r"does not exist; looked for .*none\..*\nimagefolder:\n  class/image\.jpg",
    ):
        read_tables(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"^root: '.*none' does not exist; looked for"):
        read_tables(str(tmp_path / "none"), "parquet")
    (tmp_path / "file.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"^root: '.*file\.zip' is no Parquet, CSV or tar file"):
        read_tables(str(tmp_path / "file.zip"))
    with pytest.raises(
        DataError,
        match=r"has no sub-folders; expected root/class/image\.jpg or root/train/class/image\.jpg",
    ):
        read_tables(str(tmp_path / "file.zip"), "imagefolder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no sub-folders"):
        read_tables(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"holds no \*\.parquet file"):
        read_tables(str(tmp_path / "empty"), "parquet")
    with pytest.raises(RecipeError, match=r"unknown embedded asset 'mnist'; known: fashion-mnist"):
        read_tables("embedded:mnist/data")


def test_what_the_hub_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, *_: Any, **__: Any) -> None:
        raise ConnectionError(f"cannot reach {name}")

    monkeypatch.setattr("discl.data.readers.tabular.load_dataset", refuse)
    with pytest.raises(
        DataError,
        match=r"^root: 'photos/birds' is no local folder, .* hub: cannot reach photos/birds",
    ):
        read_tables("photos/birds")


# ---------------------------------------------------------------- Parquet files

CLASSES = ClassLabel(names=["cat", "dog"])


def test_parquet_with_the_features_of_datasets(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", [1, 0], CLASSES)
    write_parquet(tmp_path / "train-00001-of-00002.parquet", [1], CLASSES)
    write_parquet(tmp_path / "test.parquet", [0], CLASSES)
    tables = read_tables(str(tmp_path))
    assert {split: told(table) for split, table in tables.items()} == {
        "train": [("train-00000000", "dog"), ("train-00000001", "cat"), ("train-00000002", "dog")],
        "test": [("test-00000000", "cat")],
    }
    assert tables["train"].image(1).getpixel((0, 0)) == (1, 0, 7)
    assert read_tables(str(tmp_path / "test.parquet"))["train"].class_names == ("cat", "dog")


def test_the_embedded_data_set() -> None:
    tables = read_tables("embedded:fashion-mnist/data")
    assert {split: len(table) for split, table in tables.items()} == {
        "train": 5000,
        "validation": 1000,
        "test": 10_000,
    }
    assert tables["test"].class_counts.tolist() == [1000] * 10
    assert tables["train"].class_names[:2] == ("T-shirt/top", "Trouser")
    assert tables["train"].image(0).size == (32, 32)


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_labels_as_texts_are_numbered_in_order_over_all_splits(tmp_path: Path, kind: str) -> None:
    write_parquet(tmp_path / "train.parquet", ["owl", "ant", "elk"], Value(kind))
    write_parquet(tmp_path / "test.parquet", ["owl", "owl"], Value(kind))
    tables = read_tables(str(tmp_path))
    assert tables["train"].class_names == tables["test"].class_names == ("ant", "elk", "owl")
    assert (tables["train"].labels.tolist(), tables["test"].labels.tolist()) == ([2, 0, 1], [2, 2])


def test_labels_as_numbers_are_their_own_names(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [2, 0, 1], Value("int32"))
    write_parquet(tmp_path / "test.parquet", [0], Value("int32"))
    tables = read_tables(str(tmp_path))
    assert tables["train"].class_names == tables["test"].class_names == ("0", "1", "2")
    assert (tables["train"].labels.tolist(), tables["test"].labels.tolist()) == ([2, 0, 1], [0])


def test_columns_and_splits_of_other_names(tmp_path: Path) -> None:
    file = write_parquet(
        tmp_path / "fitting.parquet",
        [0, 1],
        CLASSES,
        coarse=(["x", "y"], Value("string")),
        camera=(["c1", "c2"], Value("string")),
        key=([10, 11], Value("int64")),
    )
    columns = {"label": "coarse", "group": "camera", "id": "key"}
    table = read_tables(str(tmp_path), columns=columns, splits={"train": "fitting"})["train"]
    assert told(table) == [("10", "x"), ("11", "y")]
    assert (table.rows.column_names, list(table.rows["group"])) == (
        ["id", "image", "label", "group"],
        ["c1", "c2"],
    )
    with pytest.raises(
        DataError,
        match=r"^splits: .* has no training split \(it has fitting\)",
    ):
        read_tables(str(tmp_path))
    with pytest.raises(
        DataError,
        match=r"^splits: train: .* unknown split 'fiting'; .* Did you mean 'fitting'\?",
    ):
        read_tables(str(tmp_path), splits={"train": "fiting"})
    with pytest.raises(
        DataError,
        match=r"^columns: group: .* unknown column 'cam'; .* Did you mean 'camera'",
    ):
        read_tables(str(file), columns={"group": "cam"})


def test_a_split_of_any_name_may_be_there(tmp_path: Path) -> None:
    for name in ("train", "test", "left over (2)"):
        write_parquet(tmp_path / f"{name}.parquet", [0, 1], CLASSES)
    assert list(read_tables(str(tmp_path))) == ["train", "test"]


def test_missing_columns_are_named(tmp_path: Path) -> None:
    Dataset.from_dict({"picture": [1], "label": [0]}).to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(
        DataError,
        match=r"^columns: split 'train' of .* has no column 'image' \(it has picture, label\)",
    ):
        read_tables(str(tmp_path))
    with pytest.raises(
        DataError,
        match=r"^columns: split 'train' of .*: the column 'image' .* Value\('int64'\)",
    ):
        read_tables(str(tmp_path), columns={"image": "picture"})
    write_parquet(tmp_path / "train.parquet", [0], CLASSES)
    table = pa.parquet.read_table(tmp_path / "train.parquet").drop(["label"])
    pa.parquet.write_table(table.replace_schema_metadata(None), tmp_path / "train.parquet")
    with pytest.raises(
        DataError, match=r"^columns: .*has no column 'label' \(it has image\); name it"
    ):
        read_tables(str(tmp_path))


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        (
            [0, -1, 1],
            Value("int64"),
            r"split 'train' of .*: labels below 0 \(-1\).*\{test: null\}",
        ),
        (
            [0, -1, -1],
            CLASSES,
            r"split 'train' of .*: labels below 0 \(-1\)",
        ),
        (
            [0.0, 1.0],
            Value("float32"),
            "labels of type float32; whole numbers, texts or a ClassLabel are expected",
        ),
        (
            [True, False],
            Value("bool"),
            "labels of type bool; whole numbers, texts or a ClassLabel are expected",
        ),
        (
            [0, None],
            Value("int64"),
            "split 'train' of .* has images without a label; remove these rows",
        ),
        (["a", None], Value("string"), "has images without a label"),
        ([], CLASSES, r"train\.parquet cannot be read as Parquet: .* no data"),
    ],
)
def test_labels_that_are_none_are_refused(
    tmp_path: Path, labels: list[Any], feature: Any, message: str
) -> None:
    write_parquet(tmp_path / "train.parquet", labels, feature)
    with pytest.raises(DataError, match=message):
        read_tables(str(tmp_path))


def test_an_id_that_stands_twice_is_refused(tmp_path: Path) -> None:
    write_parquet(
        tmp_path / "train.parquet", [0, 1, 0], CLASSES, id=(["a", "b", "a"], Value("string"))
    )
    with pytest.raises(
        DataError,
        match=r"id 'a' occurs twice; ids have to be unique",
    ):
        read_tables(str(tmp_path))


@pytest.mark.parametrize("names", [["dog", "cat"], ["cat", "dog", "cow"]])
def test_splits_that_name_different_classes_are_refused(tmp_path: Path, names: list[str]) -> None:
    """Read together, `datasets` would silently take the names of one split for all."""
    write_parquet(tmp_path / "train.parquet", [0, 1], CLASSES)
    write_parquet(tmp_path / "test.parquet", [0, 1], ClassLabel(names=names))
    with pytest.raises(
        DataError,
        match=f"the splits name different classes, .*{', '.join(names)}.* cat, dog",
    ):
        read_tables(str(tmp_path))


def test_shards_of_a_split_that_name_different_classes_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-0.parquet", [0, 1], CLASSES)
    write_parquet(tmp_path / "train-1.parquet", [0, 1], ClassLabel(names=["dog", "cat"]))
    with pytest.raises(
        DataError,
        match=r"train-1\.parquet has other columns or class names than .*train-0\.parquet",
    ):
        read_tables(str(tmp_path))


def test_texts_in_one_split_and_numbers_in_another_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", ["a", "b"], Value("string"))
    write_parquet(tmp_path / "test.parquet", [0, 1], Value("int64"))
    with pytest.raises(DataError, match="the labels are texts in one split and numbers in another"):
        read_tables(str(tmp_path))


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"train\.parquet cannot be read as Parquet: "):
        read_tables(str(tmp_path))


def test_an_unreadable_image_is_named_when_it_is_asked_for(tmp_path: Path) -> None:
    write_images(tmp_path, "a/1.png")
    (tmp_path / "a" / "2.png").write_text("no image")
    table = read_tables(str(tmp_path))["train"]
    with pytest.raises(
        DataError,
        match=r"image 'a/2\.png' \(.*2\.png\) cannot be read: the file is no image",
    ):
        table.image(1)


def test_two_classes_of_one_name_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"classes 0 and 2 are both called 'cat'; class names have to differ"
    ):
        make_table(
            {"id": ["a"], "image": [{"bytes": None, "path": "a.png"}], "label": [0]},
            ["cat", "dog", "cat"],
        )
