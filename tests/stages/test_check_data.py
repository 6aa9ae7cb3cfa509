"""`discl data check` reports every problem of a data set at once."""

from __future__ import annotations

import io
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from typer.testing import CliRunner

from discl.cli import app
from discl.data import inspect_images, read_tables
from discl.errors import DataError
from discl.recipe import Data, Groups, LongTail, load_recipe
from discl.run_folder.open import open_run
from discl.spectrum.store import picture_shards
from discl.stages.check_data import (
    CIFAR100_LT,
    PUBLISHED,
    _published,
    check_data,
    describe_check,
)
from discl.stages.init import write_starter
from discl.stages.prepare_data import long_tail_rows, prepare_data
from discl.stages.resize_data import prepare_squares, prepared_table
from discl.stages.sample_pool import real_aspects
from helpers import miniatures

CIFAR100 = Path(
    os.environ.get("DISCL_CIFAR100", Path(__file__).parents[3] / "shared" / "data" / "cifar100")
)


def write(path: Path, number: int, size: tuple[int, int] = (6, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """12 training and 4 test images of two classes, all different."""
    root = tmp_path / "images"
    for number in range(12):
        write(
            root / "train" / ("cat" if number < 9 else "dog") / f"{number}.png",
            number,
            (6 + number, 6),
        )
    for number in range(4):
        write(root / "test" / ("cat", "dog")[number % 2] / f"{number}.png", 100 + number)
    return root


def told(root: Path, **values: object) -> list[tuple[bool, str]]:
    return [
        (problem.fatal, problem.text)
        for problem in check_data(Data(root=str(root), **values)).problems
    ]


def test_classes_that_are_left_out_are_told(images: Path) -> None:
    write(images / "test" / "emu" / "1.png", 200)
    assert any("drop_empty_classes" in text for fatal, text in told(images) if fatal)
    found = told(images, drop_empty_classes=True)
    assert not any(fatal for fatal, _ in found)
    assert any("left out (emu); with them 1 image of test" in text for _, text in found)


def test_init_leaves_listed_classes_without_images_out(tmp_path: Path) -> None:
    names = ClassLabel(names=["ant", "bee", "cow", "dog"])
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    rows = {"image": [{"bytes": stream.getvalue(), "path": None}] * 4, "label": [1, 3, 1, 3]}
    features = Features({"image": ImageFeature(), "label": names})
    (tmp_path / "hub").mkdir()
    Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "hub" / "train.parquet"))
    recipe = load_recipe(str(write_starter(tmp_path / "hub", tmp_path / "hub.yaml")))
    assert recipe.data.drop_empty_classes
    check = check_data(recipe.data)
    assert check.class_names == ("bee", "dog")


GIVEN = {"own_split": {"validation": 0, "test": 0}}


def test_a_sound_data_set(images: Path) -> None:
    check = check_data(Data(root=str(images), **GIVEN))
    assert not check.fatal and not check.problems
    assert describe_check(check, Groups(many=8, few=5)).splitlines()[1:] == [
        "train                   12        2         3 … 9           11 × 6 (6 … 17)        –",
        "test                     4        2         2 … 2                     6 × 6        –",
        "2 classes: 1 many, 1 few",
        "no problem found",
    ]


def test_poor_and_copied_images_are_told_in_short(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(6):
        image = Image.fromarray(random.integers(0, 256, (8, 8, 3)).astype(np.uint8))
        for split, changed in (("train", image.resize((64, 64), Image.Resampling.BICUBIC)),):
            (tmp_path / split / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            changed.save(tmp_path / split / "ab"[number % 2] / f"{number}.png")
    first = Image.open(tmp_path / "train/a/0.png")
    for number, copy in enumerate((first.transpose(Image.Transpose.FLIP_LEFT_RIGHT), first)):
        (tmp_path / "test" / "ab"[number]).mkdir(parents=True)
        (copy if number == 0 else copy.point(lambda value: value // 8)).save(
            tmp_path / "test" / "ab"[number] / f"{number}.png"
        )
    found = told(tmp_path, **GIVEN)
    assert not any(fatal for fatal, _ in found)
    texts = [text for _, text in found]
    assert any(text.startswith("test: too dark: 1 (for example 'test/b/1.png')") for text in texts)
    assert any(text.startswith("test against train: ") and "mirrored" in text for text in texts)


def test_the_data_are_divided_as_a_run_divides_them(images: Path, tmp_path: Path) -> None:
    own = {"validation": 0.25, "test": 0}
    check = check_data(Data(root=str(images), own_split=own))
    told = describe_check(check, Groups()).splitlines()
    assert [line.split()[:2] for line in told[1:4]] == [
        ["train", "9"],
        ["test", "4"],
        ["validation", "*"],
    ]
    assert told[4] == "* taken from the training images, by data.own_split"
    run = open_on(images, tmp_path / "run", own_split=own)
    prepare_data(run)
    assert {split: each.rows for split, each in check.splits.items()} == {
        split: len(table) for split, table in run.tables.items()
    }
    for split, each in check.splits.items():
        assert each.class_counts.tolist() == run.tables[split].class_counts.tolist()


def test_a_missing_split_that_is_not_to_be_made_is_fatal(images: Path) -> None:
    shutil.rmtree(images / "test")
    assert not any(fatal for fatal, _ in told(images))
    assert told(images, **GIVEN) == [
        (
            True,
            "there is neither a validation nor a test split; set data.own_split or name them in "
            "data.splits.",
        )
    ]


@pytest.mark.parametrize(
    ("names", "mend"),
    [
        (
            ("nest/animals/cat", "nest/animals/dog"),
            r"animals holds only folders \(cat, dog\): did you mean .*/nest/animals as the root\?",
        ),
        (
            ("nest/train/animals/cat", "nest/train/animals/dog"),
            r"\(cat, dog\): if these are .*, move them up into .*/nest/train\.",
        ),
        (("nest/cat",), r"Expected are a folder, or a label, for each class\."),
    ],
)
def test_one_class_is_too_few(names: tuple[str, ...], mend: str, tmp_path: Path) -> None:
    for folder, name in enumerate(names):
        for number in range(8):
            write(tmp_path / name / f"{number}.png", 10 * folder + number)
    message = rf"'.*/nest' has only one class, (animals|cat); at least two are needed.*{mend}"
    (fatal,) = [text for fatal, text in told(tmp_path / "nest") if fatal]
    assert re.fullmatch(message, fatal)
    with pytest.raises(DataError, match=message):
        prepare_data(open_on(tmp_path / "nest", tmp_path / "run"))
    with pytest.raises(DataError, match=message):
        write_starter(tmp_path / "nest", tmp_path / "nest.yaml")


def test_every_problem_is_told_at_once(images: Path) -> None:
    (images / "train" / "cat" / "0.png").write_bytes(b"")
    (images / "train" / "cat" / "1.png").write_bytes(
        (images / "train" / "cat" / "1.png").read_bytes()[:50]
    )
    shutil.copy(images / "test" / "cat" / "0.png", images / "train" / "dog" / "copy.png")
    shutil.copy(images / "train" / "cat" / "2.png", images / "train" / "cat" / "twin.png")
    write(images / "test" / "owl" / "1.png", 200)
    found = told(images, **GIVEN)
    assert [text for fatal, text in found if fatal] == [
        *(text for _, text in found if text.startswith("train: 'train/cat/0.png'")),
        *(text for _, text in found if text.startswith("train: 'train/cat/1.png'")),
        "1 picture is in train and in test, by content (for example "
        "'train/dog/copy.png' is 'test/cat/0.png').",
        "1 class has no image in train: owl. data.drop_empty_classes: true leaves them out.",
    ]
    assert "the file is empty" in found[0][1]
    assert (False, "train holds 1 copy of its own images.") in found
    kept = told(images, unreadable="skip", overlap="keep", **GIVEN)
    assert [text for fatal, text in kept if fatal] == [
        "1 class has no image in train: owl. data.drop_empty_classes: true leaves them out."
    ]


def test_exit_status(images: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: x\ndata: {{root: '{images}', own_split: {{validation: 0, test: 0}}}}\n"
        "spectrum: {checkpoint: none, levels: [0]}\n"
        "filter: {checkpoint: none}\nmethods: {ce: {}}\n"
    )
    sound = CliRunner().invoke(app, ["data", "check", str(recipe)])
    assert sound.exit_code == 0 and "no problem found" in sound.output
    shutil.copy(images / "test" / "cat" / "0.png", images / "train" / "dog" / "copy.png")
    broken = CliRunner().invoke(app, ["data", "check", str(recipe)])
    assert broken.exit_code == 1 and "error: 1 picture is in train and in test" in broken.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_cifar100_lt_has_the_published_counts() -> None:
    """The images of the sample that ships are found among the 50,000 by their content."""
    if not CIFAR100.is_dir():
        pytest.skip(
            f"CIFAR-100 is not at {CIFAR100}; set DISCL_CIFAR100 to a folder of its Parquet files"
        )
    data = load_recipe("cifar100-lt-ir100-ce-discl", {"data.root": str(CIFAR100)}).data
    tables = read_tables(data.root)
    digests = inspect_images(tables["train"]).digests
    rows = long_tail_rows(tables["train"], digests, data.long_tail)
    counts = {"train": len(rows), "test": len(tables["test"])}
    assert counts == {"train": CIFAR100_LT[100], "test": 10_000}
    assert _published(data, counts, 100) == []


def test_an_index_takes_the_same_pictures_from_a_copy_with_other_ids_and_another_order(
    tmp_path: Path,
) -> None:
    for copy, step in (("one", 1), ("two", -1)):
        for label in "ab":
            for place, number in enumerate(range(8)[::step]):
                write(
                    tmp_path / copy / "train" / label / f"{place}.png",
                    number + 20 * (label == "b"),
                    (4, 4),
                )
    tables = [read_tables(str(tmp_path / copy))["train"] for copy in ("one", "two")]
    contents = [inspect_images(table).digests for table in tables]
    listed = [content[:12] for content in contents[0][1:8]] + [
        content[:12] for content in contents[0][10:14]
    ]
    (tmp_path / "index.txt").write_text("\n".join(listed))
    profile = LongTail(n_max=6, imbalance_ratio=3, index=str(tmp_path / "index.txt"))
    taken = [
        {found[row] for row in long_tail_rows(table, found, profile)}
        for table, found in zip(tables, contents, strict=True)
    ]
    assert taken[0] == taken[1] == {*contents[0][1:7], *contents[0][10:12]}
    with pytest.raises(
        DataError,
        match=r"^data\.long_tail\.n_max: .* has 4 images in the index, .* needs 5",
    ):
        long_tail_rows(
            tables[0],
            contents[0],
            LongTail(n_max=5, imbalance_ratio=1, index=str(tmp_path / "index.txt")),
        )
    (tmp_path / "index.txt").write_text("abc")
    with pytest.raises(DataError, match="lists none of the 16 images"):
        long_tail_rows(tables[0], contents[0], profile)


def test_a_listed_link_out_of_the_root_and_a_split_without_use_are_told(
    images: Path, tmp_path: Path
) -> None:
    write(tmp_path / "secret.png", 77)
    (images / "train" / "link.png").symlink_to(tmp_path / "secret.png")
    (images / "images.csv").write_text(
        "path,label,split\ntrain/cat/0.png,cat,train\n"
        "train/link.png,dog,train\ntest/dog/1.png,dog,unlabelled\n"
    )
    found = told(images / "images.csv", own_split={"validation": 0.1, "test": 0})
    assert [text for fatal, text in found if fatal][1:] == [
        "1 class has no image in train: dog. data.drop_empty_classes: true leaves them out."
    ]  # for the only one leads away
    assert (
        "train: 'train/link.png'" in found[0][1]
        and f"it leads to {tmp_path / 'secret.png'}, outside the root {images}" in found[0][1]
    )
    assert any(
        text.startswith("splits that are not used: unlabelled; name them in data.splits")
        for _, text in found
    )


def test_counts_that_differ_from_the_published_are_told(tmp_path: Path) -> None:
    for label in range(100):
        for number in range(6):
            write(tmp_path / "train" / f"{label:02d}" / f"{number}.png", 2 * label, (4 + number, 4))
    found = told(tmp_path, long_tail={"n_max": 5, "imbalance_ratio": 5})
    assert not any(
        "published" in text for _, text in found
    )  # another profile than the published one


def test_published_counts() -> None:
    """Published counts give no problem; another number or version gives one."""
    for kind, (classes, rows) in PUBLISHED.items():
        data = Data(root="x", format=kind)
        assert _published(data, rows, classes) == []
        for split, count in rows.items():
            (problem,) = _published(data, {**rows, split: 5}, classes)
            assert (problem.fatal, problem.text) == (
                False,
                f"{split} has 5 images; {count:,} are published.",
            )
        (problem,) = _published(data, rows, 77)
        assert "has 77 classes" in problem.text and f"has {classes:,}:" in problem.text
        assert (
            _published(Data(root="x", format=kind, files={"train": "mine.txt"}), {"train": 5}, 77)
            == []
        )
    for ratio, count in CIFAR100_LT.items():
        data = Data(
            root="x", format="parquet", long_tail=LongTail(n_max=500, imbalance_ratio=ratio)
        )
        assert _published(data, {"train": count, "test": 10_000}, 100) == []
        found = _published(data, {"train": count + 1, "test": 9_999}, 100)
        assert [each.text for each in found] == [
            f"train has {count + 1:,} images; {count:,} are published.",
            "test has 9,999 images; 10,000 are published.",
        ]
    assert (
        len(_published(Data(root="x", format="cifar"), {"train": 49_999, "test": 10_000}, 100)) == 1
    )


def test_a_known_set_is_recognised_without_its_format(tmp_path: Path) -> None:
    miniatures.iwildcam(tmp_path / "wild")
    expected = (
        False,
        "the data set has 3 classes; wilds as published has 182: another version, or a part of it.",
    )
    found = told(tmp_path / "wild")
    assert found == told(tmp_path / "wild", format="wilds") and found[0] == expected
    assert all("dark" in text or "grey" in text for _, text in found[1:])


@pytest.mark.parametrize(
    ("build", "file", "text", "labels"),
    [
        (
            miniatures.iwildcam,
            "categories.csv",
            "y,category_id,name\n0,0,empty\n",
            "2 of 3 labels have a number for a name (1, 2)",
        ),
        (
            miniatures.imagenet_lt,
            "LOC_synset_mapping.txt",
            "n01440764 tench\n",
            "2 of 3 labels have .* (n01443537, n02007558)",
        ),
        (
            miniatures.imagenet_lt,
            "LOC_synset_mapping.txt",
            "",
            "3 of 3 labels have .* (n01440764, n01443537, n02007558)",
        ),
    ],
)
def test_labels_without_names_are_told_once(
    build, file: str, text: str, labels: str, tmp_path: Path
) -> None:
    build(tmp_path / "set")
    (tmp_path / "set" / file).write_text(text)
    found = [each for _, each in told(tmp_path / "set") if "for a name" in each]
    assert len(found) == 1 and re.match(re.escape(labels).replace(r"\.\*", ".*"), found[0])


def test_copies_under_another_label_are_told(images: Path) -> None:
    shutil.copy(images / "train" / "cat" / "0.png", images / "train" / "dog" / "same.png")
    assert told(images, **GIVEN)[1:] == [
        (
            False,
            "1 picture has copies under another label (for example 'train/cat/0.png' as cat and "
            "'train/dog/same.png' as dog).",
        )
    ]


def test_no_more_than_twenty_broken_files_of_a_split_are_listed(images: Path) -> None:
    for number in range(30):
        (images / "train" / "cat" / f"broken-{number}.png").write_bytes(b"")
    broken = [text for _, text in told(images, **GIVEN) if text.startswith("train: ")]
    assert len(broken) == 21 and broken[-1] == "train: 10 more images cannot be read."


def test_too_few_images_for_a_long_tail_are_told_with_the_rest(images: Path) -> None:
    found = told(images, long_tail={"n_max": 50, "imbalance_ratio": 2}, **GIVEN)
    assert len(found) == 1 and found[0][0] and "long-tail profile needs 50" in found[0][1]


def open_on(images: Path, folder: Path, size: int = 8, **data: object):
    tree = {
        "name": "x",
        "data": {"root": str(images), **data},
        "spectrum": {"checkpoint": "none", "levels": [0]},
        "filter": {"checkpoint": "none"},
        "train": {"image_size": size},
        "methods": {"ce": {}},
    }
    return open_run(tree, folder, amend=True)


def test_prepared_squares_are_what_training_sees(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from discl.training.image_cache import ImageCache

    run = open_on(images, tmp_path / "run")
    prepare_data(run)
    before = ImageCache([prepared_table(run, "train", 8)], 8).memory
    prepare_squares(run)
    prepared = prepared_table(run, "train", 8)
    assert all(row["image"]["bytes"] for row in prepared.rows)
    assert (prepared.ids, prepared.labels.tolist()) == (
        run.tables["train"].ids,
        run.tables["train"].labels.tolist(),
    )
    assert (ImageCache([prepared], 8).memory == before).all()
    files = sorted(run.path("prepared").glob("*.parquet"))
    monkeypatch.setattr(
        "discl.stages.resize_data.encode_image", None
    )  # nothing is encoded a second time
    prepare_squares(run)
    assert sorted(run.path("prepared").glob("*.parquet")) == files


def test_squares_of_five_crops_are_prepared_for_evaluation(images: Path, tmp_path: Path) -> None:
    run = open_on(images, tmp_path / "run")
    wider = {**run.recipe.plain(), "evaluate": {"test_time_crops": 5, "test_time_margin": 2}}
    run = open_run(wider, tmp_path / "run", amend=True)
    prepare_data(run)
    prepare_squares(run)
    for split, size in (("train", 8), ("test", 8), ("test", 10)):
        table = prepared_table(run, split, size)
        assert {table.image(row).size for row in range(len(table))} == {(size, size)}
    assert prepared_table(run, "train", 10) is run.tables["train"]


def test_prepared_whole_pictures_are_what_training_sees(tmp_path: Path) -> None:
    from discl.training.image_cache import ImageCache

    for label, name in enumerate(("bag", "boot")):
        (tmp_path / "wide" / name).mkdir(parents=True)
        for index in range(10):
            pixels = np.random.default_rng([label, index]).integers(0, 256, (12, 20 + index, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "wide" / name / f"{index}.png")
    tree = {
        "name": "x",
        "data": {"root": str(tmp_path / "wide")},
        "spectrum": {"checkpoint": "none", "levels": [0]},
        "filter": {"checkpoint": "none"},
        "train": {"image_size": 8, "resize_mode": "whole"},
        "methods": {"ce": {}, "square": {"train": {"resize_mode": "square"}}},
    }
    run = open_run(tree, tmp_path / "run", amend=True)
    prepare_data(run)
    aspects = real_aspects(run, "train")
    assert len(set(aspects.tolist())) > 4
    sizes = [run.train.image(row).size for row in range(len(run.train))]
    assert aspects.tolist() == [width / height for width, height in sizes]
    before = {
        mode: ImageCache([prepared_table(run, "train", 8, mode)], 8, aspects=given).memory
        for mode, given in (("whole", aspects), ("square", None))
    }
    assert not torch.equal(before["whole"], before["square"])
    prepare_squares(run)
    for mode, given in (("whole", aspects), ("square", None)):
        table = prepared_table(run, "train", 8, mode)
        assert all(row["image"]["bytes"] for row in table.rows)
        assert torch.equal(ImageCache([table], 8, aspects=given).memory, before[mode])


def test_squares_of_another_size_are_not_used(images: Path, tmp_path: Path) -> None:
    run = open_on(images, tmp_path / "run")
    prepare_data(run)
    prepare_squares(run)
    other = open_on(images, tmp_path / "run", size=16)
    assert prepared_table(other, "train", 16).rows[0]["image"]["bytes"] is None


def test_a_killed_preparation_goes_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from discl.stages import resize_data

    run = open_on(images, tmp_path / "run")
    prepare_data(run)
    monkeypatch.setattr(resize_data, "SHARD_ROWS", 5)
    calls, encode = [], resize_data.encode_image

    def until_seven(*arguments):
        calls.append(1)
        if len(calls) > 7:
            raise KeyboardInterrupt
        return encode(*arguments)

    monkeypatch.setattr(resize_data, "encode_image", until_seven)
    with pytest.raises(KeyboardInterrupt):
        prepare_squares(run)
    monkeypatch.setattr(resize_data, "encode_image", encode)
    assert prepared_table(run, "train", 8).rows[0]["image"]["bytes"] is None
    prepare_squares(run)
    assert all(
        row["image"]["bytes"] for split in run.tables for row in prepared_table(run, split, 8).rows
    )
    assert len(picture_shards(run.path("prepared")).read(["id"])) == 16


def test_files_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    """A class whose pictures are left out without a word would become hard, and be paid for."""
    root = tmp_path / "photos"
    for name in ("cat/1.jpg", "dog/1.jpg", ".net/1.jpg"):
        miniatures.draw(root / name, 0, len(name))
    for name in ("dog/2.heic", "dog/sub/3.HEIC", "dog/notes.txt", "cat/._1.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"other")
    shutil.copy(root / "cat" / "1.jpg", root / "cover.jpg")
    told = [
        each.text for each in check_data(Data(root=str(root))).problems if "left out" in each.text
    ]
    assert len(told) == 1
    for part in (
        "2 that end in .heic ('dog/2.heic')",
        "1 that ends in .txt ('dog/notes.txt')",
        "1 hidden ('cat/._1.jpg')",
        "1 in no class ('cover.jpg')",
        "1 hidden folder of images ('.net')",
    ):
        assert part in told[0]
    (root / "dog" / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"class 'dog' has no images.*2 that end in \.heic"):
        check_data(Data(root=str(root)))


def test_files_of_a_tar_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    miniatures.draw(tmp_path / "a.jpg", 0, 1)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for number, label in enumerate("ab"):
            for suffix, data in (
                ("jpg", (tmp_path / "a.jpg").read_bytes()),
                ("cls", label.encode()),
                ("npy", b"1"),
            ):
                entry = tarfile.TarInfo(f"{number}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    told = [each.text for each in check_data(Data(root=str(tmp_path / "train.tar"))).problems]
    assert any("2 that end in .npy ('0.npy')" in each for each in told)
