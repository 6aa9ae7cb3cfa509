"""What people have on disk: missing roots, links in circles, half an archive, foreign lists."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature

from discl.data import inspect_images, read_tables
from discl.data.readers import READERS
from discl.errors import DataError
from helpers import miniatures
from helpers.miniatures import draw_all, png


def shard(file: Path, **members: bytes) -> None:
    """A tar of files `NAME.SUFFIX`; `__` in a name stands for the dot."""
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("kind", sorted(set(READERS) - {"hub"}))
def test_a_root_that_is_not_there_shows_the_tree_that_was_expected(
    kind: str, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError,
        match=rf"does not exist; looked for {tmp_path}/none\..* laid out as\n{kind}:\n  .*",
    ) as told:
        read_tables(str(tmp_path / "none"), kind)
    words = {
        "imagefolder": "class/image.jpg",
        "manifest": "columns path, label",
        "imagenet-lt": "ImageNet_LT_val.txt",
        "wilds": "metadata.csv",
    }
    assert words.get(kind, "train") in str(told.value)


def test_links_in_a_circle(tmp_path: Path) -> None:
    draw_all(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a" / "self.png").symlink_to("self.png")
    with pytest.raises(DataError, match=r"self\.png cannot be followed: .*; delete the link"):
        read_tables(str(tmp_path))
    (tmp_path / "a" / "self.png").unlink()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"a/up leads to .*, which contains it; delete the link"):
        read_tables(str(tmp_path))


def test_binary_cifar_without_names(tmp_path: Path) -> None:
    root = miniatures.cifar100(tmp_path / "cifar", ["a", "b"], [3, 2])
    (root / "fine_label_names.txt").unlink()
    with pytest.raises(DataError, match=r"fine_label_names\.txt .*is missing"):
        read_tables(str(root))


def test_a_class_may_be_called_meta(tmp_path: Path) -> None:
    draw_all(tmp_path, "cat/1.png", "meta/1.png", "data_batch_1/1.png")
    assert read_tables(str(tmp_path))["train"].class_names == ("cat", "data_batch_1", "meta")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "meta").write_bytes(b"pickle")
    with pytest.raises(DataError, match="never unpickled"):
        read_tables(str(tmp_path / "pickled"))


def test_samples_of_a_shard_without_an_image(tmp_path: Path) -> None:
    shard(tmp_path / "train-0.tar", a__cls=b"1")
    with pytest.raises(
        DataError,
        match=r"train-0\.tar: sample 'a' has no image; a file a\.jpg",
    ):
        read_tables(str(tmp_path))
    shard(tmp_path / "train-0.tar")
    with pytest.raises(DataError, match=r"train-0\.tar holds no samples"):
        read_tables(str(tmp_path))


def test_shards_may_state_domain_and_group(tmp_path: Path) -> None:
    facts = json.dumps({"label": "cat", "camera": 7, "group": "burst 1"}).encode()
    shard(tmp_path / "train-0.tar", a__png=png(), a__json=facts, b__png=png(), b__cls=b"dog")
    table = read_tables(str(tmp_path), columns={"domain": "camera"})["train"]
    assert (table.rows["domain"][:], table.rows["group"][:]) == (["7", None], ["burst 1", None])
    assert table.class_names == ("cat", "dog")


# ---------------------------------------------------------------- lists


@pytest.mark.parametrize("text", ["path,label\na.png,vögel\n", "påth,label\na.png,x\n"])
def test_a_list_that_is_not_utf8(text: str, tmp_path: Path) -> None:
    draw_all(tmp_path, "a.png")
    (tmp_path / "list.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        DataError, match=r"list\.csv is not UTF-8 \(.*\); save it as UTF-8, for example with iconv"
    ):
        read_tables(str(tmp_path / "list.csv"))


@pytest.mark.parametrize(
    ("written", "names", "labels"),
    [
        (("true", "false"), ("false", "true"), [1, 0]),
        (("1.0", "0"), ("0", "1"), [1, 0]),
        (("2024-01-01", "2023-05-05"), ("2023-05-05", "2024-01-01"), [1, 0]),
        (("NA", "yes"), ("NA", "yes"), [0, 1]),
    ],
)
def test_labels_of_a_list_are_what_is_written(
    written: tuple[str, str], names: tuple[str, str], labels: list[int], tmp_path: Path
) -> None:
    draw_all(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_bytes(
        f"\ufeffpath,label\r\na.png,{written[0]}\r\nb.png,{written[1]}\r\n".encode()
    )
    table = read_tables(str(tmp_path / "list.csv"))["train"]
    assert (table.class_names, table.labels.tolist()) == (names, labels)


@pytest.mark.parametrize(
    ("text", "message"),
    [("0.5", r"labels are numbers with fractions \(0\.5\)"), ("", "has images without a label")],
)
def test_labels_of_a_list_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    draw_all(tmp_path, "a.png", "b.png")
    (tmp_path / "list.csv").write_text(f"path,label\na.png,{text}\nb.png,1\n")
    with pytest.raises(DataError, match=message):
        read_tables(str(tmp_path / "list.csv"))


@pytest.mark.parametrize("blank", ["", "  "])
@pytest.mark.parametrize("others", ["cat", "1"])
def test_a_label_that_is_left_out_makes_no_class(blank: str, others: str, tmp_path: Path) -> None:
    rows = [f"{number}.png,{blank if number > 1 else others}" for number in range(9)]
    (tmp_path / "list.csv").write_text("\n".join(("path,label", *rows)) + "\n")
    with pytest.raises(
        DataError,
        match=r"without a label; .*: row 3 \('2\.png'\), .*row 7 \('6\.png'\) and 2 more",
    ):
        read_tables(str(tmp_path / "list.csv"))


@pytest.mark.parametrize("blank", [None, "", " \t"])
def test_a_blank_label_of_a_parquet_file_makes_no_class(blank: str | None, tmp_path: Path) -> None:
    labels = pa.array(["a", blank, "b"], pa.string())
    pq.write_table(
        pa.table({"path": ["1.png", "2.png", "3.png"], "label": labels}), tmp_path / "list.parquet"
    )
    with pytest.raises(DataError, match=r"images without a label; .*: row 2 \('2\.png'\)\."):
        read_tables(str(tmp_path / "list.parquet"))
    pictures = pa.array(
        [{"bytes": png(), "path": None}] * 3,
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    pq.write_table(pa.table({"image": pictures, "label": labels}), tmp_path / "list.parquet")
    with pytest.raises(DataError, match=r"images without a label; .*: row 2\."):
        read_tables(str(tmp_path / "list.parquet"))


def test_a_list_may_state_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_all(tmp_path / "real", "p/1.png", "p/2.png", "p/3.png")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    paths = [f"{tmp_path}/real/p/1.png", "p/2.png", f"{tmp_path}/real/x/../p/3.png"]
    (tmp_path / "real" / "list.csv").write_text(
        "\n".join(("path,label", *(f"{path},a" for path in paths))) + "\n"
    )
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path / "real", Path("real"), Path("link")):
        table = read_tables(str(root / "list.csv"))["train"]
        assert table.ids == ["p/1.png", "p/2.png", "p/3.png"]
        assert inspect_images(table).unreadable == []
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "list.csv").write_text((tmp_path / "real" / "list.csv").read_text())
    with pytest.raises(
        DataError,
        match=r"real/p/1\.png', which is outside .*away; name the folder .*images",
    ):
        read_tables("away/list.csv")
    assert read_tables("away/list.csv", images="real")["train"].ids == [
        "p/1.png",
        "p/2.png",
        "p/3.png",
    ]
    (tmp_path / "away" / "list.csv").write_text("path,label\n../real/p/1.png,a\n")
    with pytest.raises(
        DataError, match=r"'\.\./real/p/1\.png', which leads out of .*away; name the folder"
    ):
        read_tables("away/list.csv")
    (tmp_path / "away" / "list.csv").write_text("path,label\np/1.png,a\n,a\n")
    with pytest.raises(DataError, match=r"list\.csv has rows without a path: row 2; remove"):
        read_tables("away/list.csv", images="real")


def test_the_folder_of_a_lists_images(tmp_path: Path) -> None:
    draw_all(tmp_path / "photos", "p/1.png")
    (tmp_path / "list.csv").write_text("path,label\np/1.png,a\n")
    table = read_tables(str(tmp_path / "list.csv"), images=str(tmp_path / "photos"))["train"]
    assert (table.ids, table.root, inspect_images(table).unreadable) == (
        ["p/1.png"],
        tmp_path / "photos",
        [],
    )
    with pytest.raises(DataError, match=r"^images: 'nowhere' is no folder; looked for /"):
        read_tables(str(tmp_path / "list.csv"), images="nowhere")
    with pytest.raises(
        DataError,
        match=r"^images: .*'.*photos' is read as imagefolder",
    ):
        read_tables(str(tmp_path / "photos"), images=str(tmp_path))


@pytest.mark.parametrize(
    ("column", "columns"),
    [("path", {}), ("image", {"image": "image"}), ("file", {"image": "file"})],
)
@pytest.mark.parametrize("below", ["list.parquet", ""], ids=["file", "folder"])
def test_a_list_may_be_parquet(
    column: str, columns: dict[str, str], below: str, tmp_path: Path
) -> None:
    draw_all(tmp_path, "p/1.png", "p/2.png")
    pq.write_table(
        pa.table({column: ["p/1.png", "p/2.png"], "label": ["a", "b"]}), tmp_path / "list.parquet"
    )
    table = read_tables(str(tmp_path / below), columns=columns)["train"]
    assert (table.ids, table.class_names, table.image(1).size) == (
        ["p/1.png", "p/2.png"],
        ("a", "b"),
        (32, 32),
    )


# ---------------------------------------------------------------- the hub


@pytest.mark.parametrize(
    ("root", "asked"),
    [
        ("photos/birds", ("photos/birds", None, None)),
        ("photos/birds:small", ("photos/birds", "small", None)),
        ("photos/birds@v1.0", ("photos/birds", None, "v1.0")),
        ("photos/birds@refs/convert/parquet", ("photos/birds", None, "refs/convert/parquet")),
        ("photos/birds:small@abc123", ("photos/birds", "small", "abc123")),
    ],
)
def test_configuration_and_revision_of_the_hub(
    root: str, asked: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a"])})

    def load(name: str, config: str | None, revision: str | None) -> DatasetDict:
        calls.append((name, config, revision))
        rows = Dataset.from_dict(
            {"image": [{"bytes": png(), "path": None}], "label": [0]}, features
        )
        return DatasetDict({"train": rows})

    monkeypatch.setattr("discl.data.readers.tabular.load_dataset", load)
    assert len(read_tables(root)["train"]) == 1 and calls == [asked]
