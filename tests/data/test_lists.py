"""ImageNet-LT's lists over ILSVRC as people have unpacked it, and lists that do not belong together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from discl.data import read_tables
from discl.errors import DataError

sys.path.insert(0, str(Path(__file__).parents[1]))
import miniatures


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return miniatures.imagenet_lt(tmp_path / "imagenet")


def flatten(root: Path) -> None:
    """`val/` as ILSVRC2012_img_val.tar unpacks it."""
    for file in list((root / "val").rglob("*.JPEG")):
        file.rename(root / "val" / file.name)


def shorten(root: Path) -> None:
    """The list of test names the flat `val/`."""
    file = root / "ImageNet_LT_test.txt"
    lines = (line.split("/") for line in file.read_text().splitlines())
    file.write_text("\n".join(f"val/{name}" for _, _, name in lines))


def pictures(root: Path) -> list[tuple[str, bytes]]:
    """Class name and pixels of each test image."""
    table = read_tables(str(root))["test"]
    return [
        (table.class_names[label], table.image(row).tobytes())
        for row, label in enumerate(table.labels)
    ]


@pytest.mark.parametrize("flat", [True, False], ids=["flat on disk", "in folders"])
@pytest.mark.parametrize("short", [True, False], ids=["flat in the list", "with folders"])
def test_val_may_be_flat_or_in_folders(flat: bool, short: bool, root: Path) -> None:
    before = pictures(root)
    assert [name for name, _ in before] == [
        "tench",
        "tench",
        "goldfish",
        "goldfish",
        "flamingo",
        "flamingo",
    ]
    if short:
        shorten(root)
    if flat:
        flatten(root)
    assert pictures(root) == before


@pytest.mark.parametrize("lost", ["val", "test"])
def test_a_missing_list_is_told_and_not_replaced(lost: str, root: Path) -> None:
    (root / f"ImageNet_LT_{lost}.txt").unlink()
    with pytest.raises(
        DataError,
        match=rf"lacks ImageNet_LT_{lost}\.txt, so figures would be on other images than the published",
    ):
        read_tables(str(root))
    assert list(read_tables(str(root), files={"train": "ImageNet_LT_train.txt"})) == ["train"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            (1, 2, 0),
            r"label 1 is n01443537 in ImageNet_LT_train\.txt and n01440764 in ImageNet_LT_test\.txt; .* different versions",
        ),
        (
            (0, 1, 1),
            r"label 1 is n01443537 in ImageNet_LT_train\.txt and n02007558 in ImageNet_LT_test\.txt",
        ),
        (
            (3, 1, 2),
            r"n01440764 has the label 0 in ImageNet_LT_train\.txt and 3 in ImageNet_LT_test\.txt",
        ),
    ],
)
def test_a_list_of_another_version_is_told(
    labels: tuple[int, ...], message: str, root: Path
) -> None:
    file = root / "ImageNet_LT_test.txt"
    file.write_text(
        "\n".join(f"{line[:-1]}{labels[int(line[-1])]}" for line in file.read_text().splitlines())
    )
    with pytest.raises(DataError, match=message):
        read_tables(str(root))


def test_a_flat_list_with_more_labels_than_training(root: Path) -> None:
    shorten(root)
    file = root / "ImageNet_LT_test.txt"
    file.write_text(file.read_text()[:-1] + "5")
    with pytest.raises(
        DataError,
        match=r"labels run to 5, but 3 of them have no image in a folder \(for example 3\)",
    ):
        read_tables(str(root))
