"""iWildCam v2.0 as WILDS writes it: classes, names, splits, and what other copies have instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from discl.assets import common_names
from discl.data import read_tables
from discl.errors import DataError

SPLITS = ("train", "id_val", "id_test", "val", "test")


def write(
    root: Path,
    labels: list[int],
    categories: list[tuple[int, str]],
    splits: tuple[str, ...] = SPLITS,
) -> Path:
    """A list with an image of each label in each split; the image files do not exist."""
    rows = [(split, label) for split in splits for label in labels]
    lines = [
        f"{number},{split},{number % 3},{number},{label},{number:08x}.jpg"
        for number, (split, label) in enumerate(rows)
    ]
    (root / "metadata.csv").write_text(
        "\n".join((",split,location_remapped,sequence_remapped,y,filename", *lines))
    )
    (root / "categories.csv").write_text(
        "\n".join(
            ("y,category_id,name", *(f"{label},{label + 7},{name}" for label, name in categories))
        )
    )
    return root


@pytest.mark.parametrize("none", [99999, -1])
def test_a_category_or_an_image_without_a_class_makes_none(
    none: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(
        tmp_path,
        [1, 0, none],
        [(none, "gulo gulo"), (0, "empty"), (1, "panthera onca"), (none, "lutra lutra")],
    )
    tables = read_tables(str(tmp_path))
    assert {split: table.labels.tolist() for split, table in tables.items()} == {
        split: [1, 0] for split in tables
    }
    assert len(tables) == 5 and tables["train"].class_names == ("empty landscape", "jaguar")
    assert (
        "5 images have no class (y = 99999, below 0 or empty); they are left out"
        in capsys.readouterr().err
    )


def test_all_182_names_differ_and_none_is_latin(tmp_path: Path) -> None:
    """The shipped list is in the order of the labels; mazama temama is 153 and 181."""
    scientific = [*common_names("iwildcam"), "mazama temama"]
    assert len(scientific) == 182
    assert [label for label, name in enumerate(scientific) if name == "mazama temama"] == [153, 181]
    write(tmp_path, list(range(182)), [*enumerate(scientific), (99999, "gulo gulo")])
    names = read_tables(str(tmp_path))["train"].class_names
    assert len(set(names)) == 182 and not set(names) & (set(scientific) - {"motorcycle"})
    assert (names[153], names[181]) == ("Central American red brocket deer", "temazate deer")
    assert (names[0], names[82], names[178]) == ("empty landscape", "bird", "unidentified bird")
    assert not any("(" in name or "unknown" in name for name in names)


def test_a_name_that_stands_twice_gets_its_label(tmp_path: Path) -> None:
    write(tmp_path, [0, 1, 2], [(0, "gulo gulo"), (2, "gulo gulo"), (1, "meles meles")])
    assert read_tables(str(tmp_path))["train"].class_names == (
        "gulo gulo (0)",
        "meles meles",
        "gulo gulo (2)",
    )


def test_a_missing_split_is_told(tmp_path: Path) -> None:
    write(tmp_path, [0], [(0, "empty")], ("train", "val", "test"))
    with pytest.raises(
        DataError,
        match=r"no row of the split id_val and none of id_test; .* train, val, test\.",
    ):
        read_tables(str(tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("filename", "file", "has no column filename"),
        (",1,", ",cat,", "the column y holds string; whole numbers are expected"),
    ],
)
def test_metadata_of_another_version(old: str, new: str, message: str, tmp_path: Path) -> None:
    write(tmp_path, [1], [(1, "empty")], ("train",))
    (tmp_path / "metadata.csv").write_text(
        (tmp_path / "metadata.csv").read_text().replace(old, new)
    )
    with pytest.raises(DataError, match=rf"metadata\.csv.* {message}"):
        read_tables(str(tmp_path), "wilds")
