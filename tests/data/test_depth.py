"""Grey pictures of more than 8 bits: one rule for a data set, in every stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from discl.data import Cameras, ImageTable, digest_image, read_tables, with_depth
from discl.data.depth import Depth, Wide, common_depth, depth_of
from discl.data.readers.camera_traps import read_camera_traps
from discl.errors import DataError, RecipeError
from discl.models.classifier import (
    ClassifierConfig,
    build_classifier,
    load_classifier,
    save_classifier,
)
from discl.recipe import Data, load_recipe
from discl.run_folder.open import open_run
from discl.stages.check_data import check_data
from discl.stages.predict import predict
from discl.stages.prepare_data import prepare_data


def grey(path: Path, values: list[float], kind: type = np.uint16) -> Path:
    """A grey picture, of which a row holds these values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.repeat(np.asarray([values], kind), 4, 0)).save(path)
    return path


@pytest.fixture
def twelve_bits(tmp_path: Path) -> Path:
    """Images of 12 bits in 16, in two splits: one uses them all, one is as dark as 8 bits."""
    root = tmp_path / "greys"
    for split, number in (("train", 0), ("test", 1)):
        for label in ("cat", "dog"):
            for row in range(3):
                values = [0, 16 + number, 200 + row, 255]
                grey(root / split / label / f"{row}.png", values)
    grey(root / "test" / "dog" / "bright.png", [0, 1000, 2000, 4095])
    return root


def first_row(table: ImageTable, name: str) -> list[int]:
    return np.asarray(table.image(table.ids.index(name)))[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("found", "bits", "expected"),
    [
        ([(False, 0, 255)], None, Depth((0, 255))),
        ([(False, 0, 255), (False, 3, 1000)], None, Depth((0, 1023))),
        ([(False, 0, 255), (False, 3, 4095)], None, Depth((0, 4095))),
        ([(False, 0, 4096)], None, Depth((0, 16383))),
        ([(False, 0, 60_000)], None, Depth((0, 65535))),
        ([(False, 0, 60_000)], 12, Depth((0, 4095))),
        ([(False, -5, 10), (False, 0, 90)], None, Depth((-5, 90))),
        ([(False, 0, 70_000)], None, Depth((0, 70_000))),
        ([(True, 0, 0.5)], None, Depth(fractions=(0, 1))),
        ([(True, 0, 0.5), (True, 0, 200)], 12, Depth((0, 4095), (0, 255))),
        ([(True, 0, 200), (False, 0, 900)], None, Depth((0, 1023), (0, 255))),
    ],
)
def test_the_rule_follows_from_all_pictures(
    found: list[tuple[bool, float, float]], bits: int | None, expected: Depth
) -> None:
    depth = common_depth([Wide(*each) for each in found], bits)
    assert depth == expected
    assert depth_of(json.loads(json.dumps(depth.plain()))) == depth


@pytest.mark.parametrize(
    "plain",
    [
        None,
        "{",
        "[]",
        {},
        {"whole": [0]},
        {"whole": [0, 1], "fractions": ["a", 1]},
        '{"whole": [0, NaN], "fractions": [0, 1]}',
    ],
)
def test_a_rule_that_is_none(plain: Any) -> None:
    with pytest.raises(DataError, match="depth of grey images"):
        depth_of(plain)


def test_values_beyond_the_rule_and_none_at_all() -> None:
    scaled = Depth((0, 1023)).scale(np.array([0, 1023, 5000, -4]), False)
    assert scaled.tolist() == [0, 255, 255, 0]
    odd = np.array([np.nan, np.inf, -np.inf, 0.5], np.float32)
    assert Depth().scale(odd, True).tolist() == [0, 255, 0, 128]


def recipe_of(root: Path, **data: Any) -> Any:
    changes = {"data": {"root": str(root), "overlap": "keep", **data}, "hard": {"fewer_than": 9}}
    return load_recipe("fashion-lt", {**changes, "data.long_tail": None})


def test_every_stage_sees_the_same_pixels(twelve_bits: Path, tmp_path: Path) -> None:
    run = open_run(recipe_of(twelve_bits), tmp_path / "run")
    prepare_data(run)
    expected = [0, 1, 12, 16]  # of 4095, not of 255
    assert first_row(run.train, "train/cat/0.png") == expected
    assert run.train.depth == run.tables["test"].depth == Depth((0, 4095))
    listed = pq.read_table(run.path("data.parquet")).to_pylist()
    digest = {row["id"]: row["digest"] for row in listed}
    again = open_run(run.recipe, run.folder)
    for row, name in enumerate(again.train.ids):
        assert again.checked_image(row, digest[name]) == again.train.image(row)
    table = with_depth(read_tables(str(twelve_bits)))["train"]
    assert digest_image(table.image(0)) == digest[table.ids[0]]
    degraded = read_camera_traps(
        {"train": table, "test": table}, Cameras(validation=1, clean=0.0, pretraining=0.0)
    )
    assert degraded["train"].depth == table.depth
    assert degraded["train"].image(0).size == (4, 4)


def test_the_rule_is_said_and_may_be_stated(twelve_bits: Path, tmp_path: Path) -> None:
    def told(**data: Any) -> str:
        found = check_data(Data(root=str(twelve_bits), overlap="keep", **data)).problems
        return next(each.text for each in found if "8 bits" in each.text)

    assert "13 of whole numbers from 0 to 4095, where 0 is black and 4095 white" in told()
    assert "1023 white; values beyond are cut off" in told(bits=10)
    run = open_run(recipe_of(twelve_bits, bits=16), tmp_path / "run")
    prepare_data(run)
    assert first_row(run.train, "train/cat/0.png") == [0, 0, 1, 1]
    for bits in (7, 17, "twelve"):
        with pytest.raises(RecipeError, match=rf"data\.bits.*{bits}"):
            recipe_of(twelve_bits, bits=bits)
    assert "bits" not in recipe_of(twelve_bits).plain()["data"]


def test_data_without_such_pictures_is_listed_as_before(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number, label in enumerate(("cat", "dog")):
            grey(tmp_path / "set" / split / label / "1.png", [0, number, 9, len(split)], np.uint8)
    run = open_run(recipe_of(tmp_path / "set"), tmp_path / "run")
    prepare_data(run)
    assert "depth" not in pq.read_schema(run.path("data.parquet")).names
    assert run.train.depth is None


def test_a_classifier_keeps_the_rule_of_its_training(
    twelve_bits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dark picture is as dark as it was in training, whatever it is predicted beside."""
    config = ClassifierConfig(
        "resnet10",
        "3x3",
        4,
        ("cat", "dog"),
        4,
        4,
        (0.5,) * 3,
        (0.5,) * 3,
        depth=Depth((0, 4095)).plain(),
    )
    model = build_classifier(config)
    save_classifier(model, config, tmp_path / "model")
    assert load_classifier(tmp_path / "model")[1].depth == config.depth
    dark = twelve_bits / "train" / "cat" / "0.png"
    made = Image.fromarray(np.repeat(np.array([[0, 1, 12, 16]], np.uint8), 4, 0))
    made.save(tmp_path / "eight.png")

    def row(image: Path) -> list[str]:
        return predict(tmp_path / "model", image, tmp_path / "out.csv").read_text().split(",")[-2:]

    assert row(dark) == row(tmp_path / "eight.png")
    predict(tmp_path / "model", dark, tmp_path / "out.csv")
    assert "4095 white (the rule of training)" in " ".join(capsys.readouterr().err.split())
    save_classifier(
        model, ClassifierConfig(**{**config.__dict__, "depth": None}), tmp_path / "plain"
    )
    assert "depth" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    predict(tmp_path / "plain", dark, tmp_path / "out.csv")
    assert "65535 white (the usual rule" in " ".join(capsys.readouterr().err.split())


def test_a_data_set_of_your_own_loop_has_one_rule(twelve_bits: Path, tmp_path: Path) -> None:
    real = read_tables(str(twelve_bits / "test"))["train"]
    assert real.depth is None
    table = with_depth({"train": real})["train"]
    assert table.depth == Depth((0, 4095))
    assert with_depth({"train": table}, 16)["train"].depth == Depth((0, 4095))
    grey(twelve_bits / "test" / "cat" / "broken.png", [0, 1]).write_text("no image")
    again = with_depth(read_tables(str(twelve_bits / "test")))["train"]
    assert again.depth == Depth((0, 4095))
    with pytest.raises(DataError, match="broken"):
        again.image(again.ids.index("cat/broken.png"))
