"""ImageNet-LT's lists over ILSVRC as people unpack it, and lists of different versions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from discl.assets import common_names
from discl.data import read_tables
from discl.errors import DataError
from helpers import miniatures


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return miniatures.imagenet_lt(tmp_path / "imagenet")


HOMONYMS = {
    "n02012849": ("crane", "crane bird"),
    "n02113186": ("Cardigan, Cardigan Welsh corgi", "Cardigan Welsh corgi"),
    "n02963159": ("cardigan", "cardigan sweater"),
    "n03126707": ("crane", "construction crane"),
    "n03710637": ("maillot", "maillot tights"),
    "n03710721": ("maillot, tank suit", "one-piece maillot swimsuit"),
    "n04355933": ("sunglass", "sunglass lenses"),
    "n04356056": ("sunglasses, dark glasses, shades", "pair of sunglasses"),
}
"""Synsets of ILSVRC: their names in LOC_synset_mapping.txt, and what texts call them."""


def named(root: Path, file: str, names: Mapping[str, str]) -> list[str]:
    """Class names of a training list over the folders in `names`, which `file` names."""
    for label, folder in enumerate(names):
        miniatures.draw(root / "train" / folder / "1.JPEG", label, 1)
    lines = [f"train/{folder}/1.JPEG {label}" for label, folder in enumerate(names)]
    (root / "mine.txt").write_text("\n".join(lines))
    (root / file).write_text("".join(f"{folder} {name}\n" for folder, name in names.items()))
    found = read_tables(str(root), "imagenet-lt", files={"train": "mine.txt"})
    return list(found["train"].class_names)


def test_homonyms_of_wordnet_are_told_apart(tmp_path: Path) -> None:
    stated = {folder: first for folder, (first, _) in HOMONYMS.items()}
    ours = [name for _, name in HOMONYMS.values()]
    assert named(tmp_path, "LOC_synset_mapping.txt", {**stated, "n01440764": "tench, Tinca"}) == [
        *ours,
        "tench",
    ]


def test_names_of_ones_own_are_kept_but_where_two_classes_share_one(tmp_path: Path) -> None:
    stated = {
        "n01440764": "my tench",
        "n02012849": "wading crane",
        "n03773504": "missile",
        "n04008634": "Missile",
        "mine-1": "thing",
        "mine-2": "thing",
    }
    assert named(tmp_path, "classnames.txt", stated) == [
        "my tench",
        "wading crane",
        "missile",
        "projectile in flight",
        "thing (mine-1)",
        "thing (mine-2)",
    ]


@pytest.mark.parametrize("name", ["imagenet", "iwildcam"])
def test_shipped_names_are_all_different(name: str) -> None:
    names = [each.casefold() for names in common_names(name).values() for each in names]
    assert len(set(names)) == len(names) > 100
    assert not [each for each in names if "," in each or not each.isprintable()]


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
        match=rf"lacks ImageNet_LT_{lost}\.txt, so results would be on other images",
    ):
        read_tables(str(root))
    assert list(read_tables(str(root), files={"train": "ImageNet_LT_train.txt"})) == ["train"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            (1, 2, 0),
            r"label 1 is n01443537 in .*_train\.txt and n01440764 in .*_test\.txt; .* different",
        ),
        (
            (0, 1, 1),
            r"label 1 is n01443537 in .*_train\.txt and n02007558 in .*_test\.txt",
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
        match=r"1 labels have no image in a folder \(for example 5\)",
    ):
        read_tables(str(root))
