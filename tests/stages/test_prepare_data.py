"""From a data set to checked splits and hard images."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from discl.data import ImageTable
from discl.errors import DataError, RecipeError, RunError
from discl.run_folder.run import Run
from discl.stages import hard as hard_stage
from discl.stages import prepare_data as prepare_data_stage
from discl.stages.hard import describe_hard, ensure_hard
from discl.stages.prepare_data import prepare_data
from helpers.runs import open_on


def write_image(path: Path, number: int, **options: Any) -> None:
    """A small picture that is determined by `number`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def write_classes(root: Path, start: int = 0, **counts: int) -> None:
    """So many different pictures in a folder for each class."""
    number = start
    for name, count in counts.items():
        for index in range(count):
            write_image(root / name / f"{index:02d}.png", number)
            number += 1


def listed(run: Run) -> list[dict[str, Any]]:
    return pq.read_table(run.path("data.parquet")).to_pylist()


def ids_of(run: Run) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for row in listed(run):
        result.setdefault(row["split"], []).append(row["id"])
    return result


def test_given_splits_are_listed_as_they_are(tmp_path: Path) -> None:
    write_classes(tmp_path / "images" / "train", a=2, b=1)
    write_classes(tmp_path / "images" / "val", start=10, a=1)
    write_classes(tmp_path / "images" / "test", start=20, b=1)
    run = open_on(tmp_path)
    assert prepare_data(run) == run.path("data.parquet")
    rows = listed(run)
    assert [
        (row["split"], row["source_split"], row["row"], row["id"], row["label"]) for row in rows
    ] == [
        ("train", "train", 0, "train/a/00.png", 0),
        ("train", "train", 1, "train/a/01.png", 0),
        ("train", "train", 2, "train/b/00.png", 1),
        ("validation", "validation", 0, "val/a/00.png", 0),
        ("test", "test", 0, "test/b/00.png", 1),
    ]
    assert {(row["width"], row["height"]) for row in rows} == {(6, 4)}
    assert len({row["digest"] for row in rows}) == 5
    assert {name: table.ids for name, table in run.tables.items()} == ids_of(run)


def test_own_data_is_split_once_and_resumed(tmp_path: Path) -> None:
    write_classes(tmp_path / "images", a=20, b=10)
    run = open_on(tmp_path)
    prepare_data(run)
    counts = {
        split: np.bincount([row["label"] for row in listed(run) if row["split"] == split]).tolist()
        for split in ids_of(run)
    }
    assert counts == {"train": [14, 7], "validation": [2, 1], "test": [4, 2]}
    before, changed = listed(run), run.path("data.parquet").stat().st_mtime_ns
    prepare_data(open_on(tmp_path))
    assert run.path("data.parquet").stat().st_mtime_ns == changed
    run.path("data.parquet").unlink()
    prepare_data(open_on(tmp_path))
    assert listed(run) == before
    assert not list((tmp_path / "run").glob("*.new"))


def test_only_the_lacking_split_is_taken_from_training(tmp_path: Path) -> None:
    write_classes(tmp_path / "images" / "train", a=10, b=10)
    write_classes(tmp_path / "images" / "test", start=20, a=3)
    run = open_on(tmp_path)
    prepare_data(run)
    assert {split: len(ids) for split, ids in ids_of(run).items()} == {
        "train": 18,
        "validation": 2,
        "test": 3,
    }
    assert {(row["split"], row["source_split"]) for row in listed(run)} == {
        ("train", "train"),
        ("validation", "train"),
        ("test", "test"),
    }


def test_copies_of_a_picture_stay_in_one_split(tmp_path: Path) -> None:
    for number in range(10):
        for suffix in ("png", "bmp", "tif"):
            write_image(tmp_path / "images" / "ab"[number % 2] / f"{number}.{suffix}", number)
    run = open_on(tmp_path, data__own_split={"validation": 0.3, "test": 0.3})
    prepare_data(run)
    where: dict[str, set[str]] = {}
    for row in listed(run):
        where.setdefault(row["digest"], set()).add(row["split"])
    assert len(where) == 10
    assert all(len(splits) == 1 for splits in where.values())


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_image_of_another_format_with_the_pixels_of_a_training_image_is_refused(
    tmp_path: Path, split: str
) -> None:
    write_classes(tmp_path / "images" / "train", a=3, b=1)
    write_image(tmp_path / "images" / split / "a" / "copy.webp", 1, lossless=True)
    write_image(tmp_path / "images" / split / "a" / "new.png", 50)
    name = "validation" if split == "val" else "test"
    with pytest.raises(
        DataError,
        match=rf"1 image is in train and in {name}, .*'{split}/a/copy\.webp' is 'train/a/01\.png'",
    ):
        prepare_data(open_on(tmp_path, data__own_split={"validation": 0, "test": 0}))
    assert not (tmp_path / "run" / "data.parquet").exists()


def test_unreadable_images_are_listed_or_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "images", a=10, b=10)
    (tmp_path / "images" / "a" / "00.png").write_bytes(b"")
    (tmp_path / "images" / "b" / "x.jpg").write_text("no image")
    with pytest.raises(DataError) as raised:
        prepare_data(open_on(tmp_path))
    count, empty, foreign, advice = str(raised.value).splitlines()
    assert "2 of 21 train images" in count and "data.unreadable: skip" in advice
    assert f"'a/00.png' ({tmp_path / 'images' / 'a' / '00.png'}): the file is empty" in empty
    assert f"'b/x.jpg' ({tmp_path / 'images' / 'b' / 'x.jpg'}): the file is no image" in foreign
    run = open_on(tmp_path, amend=True, data__unreadable="skip")
    prepare_data(run)
    assert "2 unreadable train images are skipped:\n  'a/00.png'" in capsys.readouterr().err
    ids = [row["id"] for row in listed(run)]
    assert len(ids) == 19
    assert not {"a/00.png", "b/x.jpg"} & set(ids)
    assert {name: table.ids for name, table in run.tables.items()} == ids_of(run)


def test_a_class_without_training_images_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path / "images" / "train", a=2)
    write_classes(tmp_path / "images" / "test", start=10, a=1, b=1)
    with pytest.raises(
        DataError,
        match=r"1 class has no training image: b\. .*data\.drop_empty_classes: true",
    ):
        prepare_data(open_on(tmp_path, data__own_split__validation=0))


def test_classes_without_training_images_may_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(tmp_path / "images" / "train", b=2, d=3)
    write_classes(tmp_path / "images" / "test", start=10, a=2, b=1, c=1, d=1)
    asked = {"data__drop_empty_classes": True, "data__own_split__validation": 0}
    run = open_on(tmp_path, **asked)
    prepare_data(run)
    assert (
        "2 of 4 classes have no training image and are left out (a, c); with them 3 images of test"
        in capsys.readouterr().err
    )
    for opened in (run, open_on(tmp_path, **asked)):
        assert opened.train.class_names == ("b", "d")
        assert opened.tables["test"].ids == ["test/b/00.png", "test/d/00.png"]
        assert opened.tables["test"].labels.tolist() == [0, 1]


def test_a_long_tail_is_cut_from_training_only(tmp_path: Path) -> None:
    write_classes(tmp_path / "images" / "train", a=12, b=12, c=12)
    write_classes(tmp_path / "images" / "test", start=50, a=2, b=2, c=2)
    tail = {"n_max": 9, "imbalance_ratio": 9, "class_order": ["c", "a", "b"]}
    run = open_on(tmp_path, data__own_split__validation=0, data__long_tail=tail)
    prepare_data(run)
    assert run.train.class_counts.tolist() == [3, 1, 9]
    assert run.tables["test"].class_counts.tolist() == [2, 2, 2]
    assert run.groups == {"few": [0, 1, 2]}


def write_parquet_splits(tmp_path: Path, **splits: dict[str, Any]) -> None:
    """Parquet splits of a class, and one image of another, with further columns of texts."""
    from datasets import Dataset
    from datasets import Image as ImageFeature

    (tmp_path / "images").mkdir()
    number = 0
    for split, columns in splits.items():
        stored = []
        for _ in range(len(next(iter(columns.values())))):
            write_image(tmp_path / "picture.png", number)
            stored.append({"bytes": (tmp_path / "picture.png").read_bytes(), "path": None})
            number += 1
        labels = ["a"] * (len(stored) - 1) + ["b"]
        rows = Dataset.from_dict({"image": stored, "label": labels, **columns}).cast_column(
            "image", ImageFeature()
        )
        rows.to_parquet(str(tmp_path / "images" / f"{split}.parquet"))


def test_groups_of_the_data_stay_together_and_an_image_without_one_is_its_own(
    tmp_path: Path,
) -> None:
    groups = [f"camera {number // 4}" for number in range(40)] + [None] * 40
    write_parquet_splits(tmp_path, train={"group": groups})
    run = open_on(tmp_path)
    prepare_data(run)
    where: dict[str, set[str]] = {}
    for row in listed(run):
        where.setdefault(row["group"], set()).add(row["split"])
    assert len(where) == 50
    assert all(len(splits) == 1 for splits in where.values())
    assert {split: len(ids) for split, ids in ids_of(run).items()} == {
        "train": 56,
        "validation": 8,
        "test": 16,
    }


def test_a_split_may_lack_the_domain(tmp_path: Path) -> None:
    write_parquet_splits(tmp_path, train={"domain": ["day", "night"]}, test={"id": ["x"]})
    run = open_on(tmp_path, data__own_split__validation=0)
    prepare_data(run)
    assert [(row["id"], row["domain"]) for row in listed(run)] == [
        ("train-00000000", "day"),
        ("train-00000001", "night"),
        ("x", ""),
    ]


@pytest.mark.parametrize("change", ["removed", "added", "moved"])
def test_data_that_changed_under_a_run_is_refused(tmp_path: Path, change: str) -> None:
    write_classes(tmp_path / "images", a=6, b=6)
    prepare_data(open_on(tmp_path, data__own_split={"validation": 0, "test": 0.2}))
    if change == "removed":
        (tmp_path / "images" / "b" / "05.png").unlink()
    elif change == "added":
        write_image(tmp_path / "images" / "a" / "000.png", 99)
    else:
        shutil.move(tmp_path / "images", tmp_path / "images" / ".." / "train")
        shutil.move(tmp_path / "train", tmp_path / "images" / "val")
    run = open_on(tmp_path, data__own_split={"validation": 0, "test": 0.2})
    with pytest.raises(
        (RunError, DataError),
        match=r"are no longer those of .*data\.parquet; start a new folder|no training split",
    ):
        _ = run.tables


def test_the_hard_images_of_rare_classes(tmp_path: Path) -> None:
    write_classes(tmp_path / "images" / "train", a=3, b=2, c=1)
    write_classes(tmp_path / "images" / "test", start=20, a=1)
    run = open_on(tmp_path, data__own_split__validation=0, hard__fewer_than=3)
    prepare_data(run)
    rows = pq.read_table(ensure_hard(run)).to_pylist()
    digests = {row["id"]: row["digest"] for row in listed(run)}
    assert rows == [
        {
            "id": name,
            "label": label,
            "digest": digests[name],
            "width": 6,
            "height": 4,
            "class_count": count,
        }
        for name, label, count in (
            ("train/b/00.png", 1, 2),
            ("train/b/01.png", 1, 2),
            ("train/c/00.png", 2, 1),
        )
    ]


def test_classes_that_are_excluded_are_never_hard(tmp_path: Path) -> None:
    write_classes(tmp_path / "images", a=8, b=2, empty=1)
    whole = {"data__own_split": {"validation": 0, "test": 0}, "hard__fewer_than": 3}
    run = open_on(tmp_path, **whole, hard__exclude=["empty"])
    prepare_data(run)
    assert pq.read_table(ensure_hard(run))["label"].to_pylist() == [1, 1]


@pytest.mark.parametrize(
    ("exclude", "error", "message"),
    [
        (["emtpy"], RecipeError, "unknown class 'emtpy'; known: a, empty. Did you mean 'empty'?"),
        (["a", "empty"], DataError, "hard.exclude names every class"),
        (["empty"], DataError, "outside of hard.exclude has fewer than 3"),
    ],
)
def test_what_cannot_be_excluded_is_told(
    tmp_path: Path, exclude: list[str], error: type[Exception], message: str
) -> None:
    write_classes(tmp_path / "images", a=8, empty=1)
    whole = {"data__own_split": {"validation": 0, "test": 0}, "hard__fewer_than": 3}
    run = open_on(tmp_path, **whole, hard__exclude=exclude)
    prepare_data(run)
    with pytest.raises(error, match=re.escape(message)):
        ensure_hard(run)


@pytest.mark.parametrize("exclude", ["empty", ["empty", "empty"], {"empty": 1}])
def test_what_is_no_list_of_classes_is_refused(tmp_path: Path, exclude: object) -> None:
    with pytest.raises(RecipeError, match="empty"):
        open_on(tmp_path, hard__exclude=exclude)


def test_no_rare_class_is_told_with_the_smallest(tmp_path: Path) -> None:
    write_classes(tmp_path / "images", a=8, b=5)
    run = open_on(tmp_path, data__own_split={"validation": 0, "test": 0}, hard__fewer_than=5)
    prepare_data(run)
    with pytest.raises(
        DataError,
        match=r"fewer than 5 training images; raise hard\.fewer_than \(the smallest class has 5\)",
    ):
        ensure_hard(run)


def test_hard_images_by_probability_are_judged_by_classifiers_that_saw_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(9):
        write_image(tmp_path / "images" / "a" / f"{number}.png", number)
        write_image(tmp_path / "images" / "a" / f"{number}.bmp", number)  # a copy in another format
    write_image(tmp_path / "images" / "b" / "9.png", 9)
    calls: list[tuple[set[str], set[str]]] = []

    def fit(
        table: ImageTable, fitted: list[int], judged: list[int], *_: Any, **__: Any
    ) -> np.ndarray:
        calls.append(
            (
                {Path(table.ids[row]).stem for row in fitted},
                {Path(table.ids[row]).stem for row in judged},
            )
        )
        return np.array([[int(Path(table.ids[row]).stem) / 10] * 2 for row in judged])

    monkeypatch.setattr(hard_stage, "fit_classifier", fit)
    values = {"data__own_split": {"validation": 0, "test": 0}, "hard__rule": "probability"}
    run = open_on(tmp_path, **values, hard__below=0.25)
    prepare_data(run)
    rows = pq.read_table(ensure_hard(run)).to_pylist()
    assert [(row["id"], row["true_class_probability"]) for row in rows] == [
        ("a/0.bmp", 0.0),
        ("a/0.png", 0.0),
        ("a/1.bmp", 0.1),
        ("a/1.png", 0.1),
        ("a/2.bmp", 0.2),
        ("a/2.png", 0.2),
    ]
    assert len(calls) == 3
    assert all(not fitted & judged for fitted, judged in calls)
    run = open_on(tmp_path, amend=True, **values, hard__below=1e-9)
    rows = pq.read_table(ensure_hard(run)).to_pylist()
    assert [row["id"] for row in rows] == ["a/0.bmp", "a/0.png"]
    run = open_on(tmp_path, amend=True, **values, hard__below=0.95, hard__exclude=["a"])
    assert [row["id"] for row in pq.read_table(ensure_hard(run)).to_pylist()] == ["b/9.png"]


def test_a_split_without_groups_beside_one_that_has_them_goes_by_content() -> None:
    listed = pa.table({"group": ["", "", "g"], "digest": ["x", "y", "z"]})
    assert prepare_data_stage.listed_units(listed) == ["x", "y", "g"]
    assert prepare_data_stage.listed_units(listed.drop_columns("group")) == ["x", "y", "z"]


@pytest.mark.parametrize(("epochs", "level"), [(10, 0.1), (3, 0.9)])
def test_what_is_hard_is_told(
    epochs: int,
    level: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_classes(tmp_path / "images", a=4, b=6)

    def fit(
        table: ImageTable, fitted: list[int], judged: list[int], *_: Any, **__: Any
    ) -> np.ndarray:
        return np.array([[0.25 if table.labels[row] == 0 else level, level] for row in judged])

    monkeypatch.setattr(hard_stage, "fit_classifier", fit)
    run = open_on(
        tmp_path,
        data__own_split={"validation": 0, "test": 0},
        hard={"rule": "probability", "epochs": epochs},
    )
    prepare_data(run)
    capsys.readouterr()
    ensure_hard(run)
    told = capsys.readouterr().err.splitlines()
    lines = [line.strip() for line in told if not line.endswith("done")]
    assert lines == describe_hard(run).splitlines()
    if level < 0.5:
        assert (
            lines[0]
            == "10 of 10 training images are hard (b 6 of 6, a 4 of 4; probability of their class "
            "0.10 to 0.25)"
        )
        assert (
            lines[1].startswith("warning: nearly all images are hard")
            and "learnt nothing; try more hard.epochs (now 10)" in lines[1]
        )
    else:
        assert lines == [
            "4 of 10 training images are hard (a 4 of 4; probability of their class 0.25 to 0.25)"
        ]
    ensure_hard(run)
    assert not capsys.readouterr().err  # told when it is found


def test_no_more_than_a_handful_of_hard_classes_is_told(tmp_path: Path) -> None:
    write_classes(tmp_path / "images", **dict.fromkeys("abcdefg", 2), rich=30)
    run = open_on(tmp_path, data__own_split={"validation": 0, "test": 0})
    prepare_data(run)
    ensure_hard(run)
    shown = ", ".join(f"{name} 2 of 2" for name in "abcde")
    assert describe_hard(run) == f"14 of 44 training images are hard ({shown} and 2 more classes)"


def test_no_image_of_low_probability_is_told_with_the_lowest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path / "images", a=6, b=6)
    monkeypatch.setattr(
        hard_stage,
        "fit_classifier",
        lambda table, fitted, judged, *_, **__: np.full((len(judged), 2), 0.75),
    )
    run = open_on(tmp_path, data__own_split={"validation": 0, "test": 0}, hard__rule="probability")
    prepare_data(run)
    with pytest.raises(
        DataError, match=r"below 0\.5; raise hard\.below \(the lowest probability is 0\.750\)"
    ):
        ensure_hard(run)
