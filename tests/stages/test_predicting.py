"""Use of a trained classifier on new images."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from discl.curriculum.models import ClassifierConfig, build_classifier, save_classifier
from discl.errors import DataError, RunError
from discl.recipe import load_recipe
from discl.stages.predicting import find_classifier, predict


def write_classifier(folder: Path, seed: int, age: int = 0) -> Path:
    """A small untrained classifier of three classes, saved `age` seconds ago."""
    torch.manual_seed(seed)
    config = ClassifierConfig(
        "resnet10", "3x3", 4, ("cat", "dog", "ä, b"), 8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    )
    save_classifier(build_classifier(config), config, folder)
    written = (folder / "model.safetensors").stat().st_mtime
    os.utime(folder / "model.safetensors", (written - age, written - age))
    return folder


def write_images(folder: Path) -> Path:
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("b.png", "sub/a c.jpg")):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)).save(
            folder / name
        )
    return folder


def test_one_row_for_each_image_and_one_column_for_each_class(tmp_path: Path) -> None:
    model, images = write_classifier(tmp_path / "model", 0), write_images(tmp_path / "images")
    assert predict(model, images, tmp_path / "new" / "out.csv") == tmp_path / "new" / "out.csv"
    with (tmp_path / "new" / "out.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["image", "prediction", "probability", "cat", "dog", "ä, b"]
    assert [row[0] for row in rows] == [str(images / "b.png"), str(images / "sub" / "a c.jpg")]
    for row in rows:
        probabilities = [float(value) for value in row[3:]]
        assert sum(probabilities) == pytest.approx(1, abs=3e-6)
        assert (row[1], float(row[2])) == (
            header[3 + int(np.argmax(probabilities))],
            max(probabilities),
        )
    alone = predict(model, images / "b.png", tmp_path / "alone.csv").read_text().splitlines()
    assert alone[1] == ",".join(rows[0])


def test_the_last_method_of_the_recipe_is_used_unless_one_is_named(tmp_path: Path) -> None:
    for name in ("z", "a", "left-over"):
        write_classifier(tmp_path / "train" / name, 0)
    recipe = load_recipe("fashion-lt", {"methods": {"a": {}, "z": {}, "not-trained-yet": {}}})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert find_classifier(tmp_path) == tmp_path / "train" / "z"
    assert find_classifier(tmp_path, "a") == tmp_path / "train" / "a"
    assert find_classifier(tmp_path / "train" / "left-over") == tmp_path / "train" / "left-over"
    with pytest.raises(RunError, match="unknown method 'disc'; known: a, z"):
        find_classifier(tmp_path, "disc")


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        RunError,
        match=r"holds no trained classifier; expected .*/train/METHOD/model\.safetensors\. Run `discl train` first",
    ):
        find_classifier(tmp_path)
    model = write_classifier(tmp_path / "model", 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty' holds no image \(none ends in .*\.bmp, "):
        predict(model, tmp_path / "empty", tmp_path / "out.csv")
    (tmp_path / "broken.png").write_text("no image")
    with pytest.raises(
        DataError, match=r"broken\.png.*the file is no image, or of an unknown format"
    ):
        predict(model, tmp_path / "broken.png", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model", 0)
    (tmp_path / "any.png").write_text("no image")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(RunError, match=f"there is no device '{device}' here; use --device cpu"):
            predict(model, tmp_path / "any.png", tmp_path / "out.csv", device=device)
