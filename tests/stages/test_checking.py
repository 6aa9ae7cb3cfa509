"""A data set looked at before anything is made from it: everything that is wrong is told at once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from discl.cli import app
from discl.data import inspect_images, read_tables
from discl.errors import DataError
from discl.recipe import Data, Groups, LongTail, load_recipe
from discl.stages.checking import CIFAR100_LT, check_data, describe_check
from discl.stages.data import long_tail_rows, prepare_data
from discl.stages.preparing import prepare_squares, prepared_table
from discl.workspace import open_run

CIFAR100 = Path(os.environ.get("DISCL_CIFAR100", Path(__file__).parents[3] / "shared" / "data" / "cifar100"))


def write(path: Path, number: int, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number, 255 - number, 7)).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """12 training and 4 test images of two classes, all different."""
    root = tmp_path / "images"
    for number in range(12):
        write(root / "train" / ("cat" if number < 9 else "dog") / f"{number}.png", number, (6 + number, 4))
    for number in range(4):
        write(root / "test" / ("cat", "dog")[number % 2] / f"{number}.png", 100 + number)
    return root


def told(root: Path, **values: object) -> list[tuple[bool, str]]:
    return [(finding.fatal, finding.text) for finding in check_data(Data(root=str(root), **values)).findings]


def test_a_sound_data_set(images: Path) -> None:
    check = check_data(Data(root=str(images)))
    assert not check.fatal and not check.findings
    assert describe_check(check, Groups(many=8, few=5)).splitlines()[1:] == [
        "train                   12        2         3 … 9           11 × 4 (4 … 17)        –",
        "test                     4        2         2 … 2                     6 × 4        –",
        "2 classes: 1 many, 1 few",
        "no problem found",
    ]


def test_every_problem_is_told_at_once(images: Path) -> None:
    (images / "train" / "cat" / "0.png").write_bytes(b"")
    (images / "train" / "cat" / "1.png").write_bytes((images / "train" / "cat" / "1.png").read_bytes()[:50])
    shutil.copy(images / "test" / "cat" / "0.png", images / "train" / "dog" / "copy.png")
    shutil.copy(images / "train" / "cat" / "2.png", images / "train" / "cat" / "twin.png")
    write(images / "test" / "owl" / "1.png", 200)
    found = told(images)
    assert [text for fatal, text in found if fatal] == [
        *(text for _, text in found if text.startswith("train: 'train/cat/0.png'")),
        *(text for _, text in found if text.startswith("train: 'train/cat/1.png'")),
        "1 pictures lie in train and in test, by content (for example 'train/dog/copy.png' is 'test/cat/0.png').",
        "1 classes have no image in train: owl.",
    ]
    assert "the file is empty" in found[0][1]
    assert (False, "1 images of train are copies of another one in it.") in found
    kept = told(images, unreadable="skip", overlap="keep")
    assert [text for fatal, text in kept if fatal] == ["1 classes have no image in train: owl."]


def test_exit_status(images: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: x\ndata: {{root: '{images}'}}\nspectrum: {{checkpoint: none, levels: [0]}}\n"
        "filter: {checkpoint: none}\nmethods: {ce: {}}\n"
    )
    sound = CliRunner().invoke(app, ["data", "check", str(recipe)])
    assert sound.exit_code == 0 and "no problem found" in sound.output
    shutil.copy(images / "test" / "cat" / "0.png", images / "train" / "dog" / "copy.png")
    broken = CliRunner().invoke(app, ["data", "check", str(recipe)])
    assert broken.exit_code == 1 and "error: 1 pictures lie in train and in test" in broken.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("ratio", [100, 50, 10])
def test_cifar100_lt_has_the_published_counts(ratio: int) -> None:
    if not CIFAR100.is_dir():
        pytest.skip(f"CIFAR-100 is not at {CIFAR100}; set DISCL_CIFAR100 to a folder of its Parquet files")
    recipe = load_recipe("cifar100-lt-ir100-ce-discl", {"data.root": str(CIFAR100), "data.long_tail.imbalance_ratio": ratio})
    check = check_data(recipe.data)
    assert check.splits["train"].rows == CIFAR100_LT[ratio] and check.splits["test"].rows == 10_000
    assert not any("published" in finding.text for finding in check.findings)


def test_an_index_takes_the_same_pictures_from_a_copy_with_other_ids_and_another_order(tmp_path: Path) -> None:
    for copy, step in (("one", 1), ("two", -1)):
        for label in "ab":
            for place, number in enumerate(range(8)[::step]):
                write(tmp_path / copy / "train" / label / f"{place}.png", number + 20 * (label == "b"), (4, 4))
    tables = [read_tables(str(tmp_path / copy))["train"] for copy in ("one", "two")]
    contents = [inspect_images(table).digests for table in tables]
    listed = [content[:12] for content in contents[0][1:8]] + [content[:12] for content in contents[0][10:14]]
    (tmp_path / "index.txt").write_text("\n".join(listed))
    profile = LongTail(n_max=6, imbalance_ratio=3, index=str(tmp_path / "index.txt"))
    taken = [{found[row] for row in long_tail_rows(table, found, profile)} for table, found in zip(tables, contents, strict=True)]
    assert taken[0] == taken[1] == {*contents[0][1:7], *contents[0][10:12]}
    with pytest.raises(DataError, match=r"has 4 images that data\.long_tail\.index lists, the long-tail profile asks for 5"):
        long_tail_rows(tables[0], contents[0], LongTail(n_max=5, imbalance_ratio=1, index=str(tmp_path / "index.txt")))
    (tmp_path / "index.txt").write_text("abc")
    with pytest.raises(DataError, match="lists none of the 16 images"):
        long_tail_rows(tables[0], contents[0], profile)


def test_a_listed_link_out_of_the_root_and_a_split_without_use_are_told(images: Path, tmp_path: Path) -> None:
    write(tmp_path / "secret.png", 77)
    (images / "train" / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "images.csv").write_text(
        "path,label,split\ntrain/cat/0.png,cat,train\ntrain/link.png,dog,train\ntest/dog/1.png,dog,unlabelled\n"
    )
    found = told(images / "images.csv", own_split={"validation": 0.1, "test": 0})
    assert [fatal for fatal, _ in found] == [True, False]
    assert "train: 'train/link.png'" in found[0][1] and f"it leads to {tmp_path / 'secret.png'}, outside data.root {images}" in found[0][1]
    assert found[1][1].startswith("splits that are not used: unlabelled; name them in data.splits")


def test_counts_that_differ_from_the_published_are_told(tmp_path: Path) -> None:
    for label in range(100):
        for number in range(6):
            write(tmp_path / "train" / f"{label:02d}" / f"{number}.png", 2 * label, (4 + number, 4))
    found = told(tmp_path, long_tail={"n_max": 5, "imbalance_ratio": 5})
    assert not any("published" in text for _, text in found)  # another profile than the published one


def open_on(images: Path, folder: Path, size: int = 8):
    tree = {
        "name": "x", "data": {"root": str(images)}, "spectrum": {"checkpoint": "none", "levels": [0]}, "filter": {"checkpoint": "none"},
        "train": {"image_size": size}, "methods": {"ce": {}},
    }  # fmt: skip
    return open_run(tree, folder, amend=True)


def test_prepared_squares_are_what_training_sees(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from discl.curriculum.pixels import Pixels

    run = open_on(images, tmp_path / "run")
    prepare_data(run)
    before = Pixels([prepared_table(run, "train", 8).rows], 8).memory
    prepare_squares(run)
    prepared = prepared_table(run, "train", 8)
    assert all(row["image"]["bytes"] for row in prepared.rows)
    assert (prepared.ids, prepared.labels.tolist()) == (run.tables["train"].ids, run.tables["train"].labels.tolist())
    assert (Pixels([prepared.rows], 8).memory == before).all()
    files = sorted(run.path("prepared").glob("*.parquet"))
    monkeypatch.setattr("discl.stages.preparing.encode_image", None)  # nothing is encoded a second time
    prepare_squares(run)
    assert sorted(run.path("prepared").glob("*.parquet")) == files


def test_squares_of_another_size_are_not_used(images: Path, tmp_path: Path) -> None:
    run = open_on(images, tmp_path / "run")
    prepare_data(run)
    prepare_squares(run)
    other = open_on(images, tmp_path / "run", size=16)
    assert prepared_table(other, "train", 16).rows[0]["image"]["bytes"] is None


def test_a_killed_preparation_goes_on(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from discl.stages import preparing

    run = open_on(images, tmp_path / "run")
    prepare_data(run)
    monkeypatch.setattr(preparing, "SHARD_ROWS", 5)
    calls, encode = [], preparing.encode_image

    def until_seven(*arguments):
        calls.append(1)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(preparing, "encode_image", until_seven)
    with pytest.raises(KeyboardInterrupt):
        prepare_squares(run)
    monkeypatch.setattr(preparing, "encode_image", encode)
    assert prepared_table(run, "train", 8).rows[0]["image"]["bytes"] is None
    prepare_squares(run)
    assert all(row["image"]["bytes"] for split in run.tables for row in prepared_table(run, split, 8).rows)
    assert len(preparing._store(run).read(["id"])) == 16
