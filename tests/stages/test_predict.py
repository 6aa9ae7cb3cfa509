"""Use of a trained classifier on new images."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from discl.cli import app
from discl.errors import DataError, RunError
from discl.models.classifier import ClassifierConfig, build_classifier, save_classifier
from discl.recipe import load_recipe
from discl.stages import predict as predict_stage
from discl.stages.predict import find_classifier, predict


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
        match=r"expected .*/train/METHOD/model\.safetensors\. Run `discl train` first",
    ):
        find_classifier(tmp_path)
    model = write_classifier(tmp_path / "model", 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty' holds no image \(none ends in .*\.bmp"):
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
        with pytest.raises(RunError, match=f"has no device '{device}'; use --device cpu"):
            predict(model, tmp_path / "any.png", tmp_path / "out.csv", device=device)


def rows_of(file: Path) -> list[str]:
    with file.open(newline="") as stream:
        return [row[0] for row in csv.reader(stream)][1:]


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """What a folder that somebody has kept for years holds beside its two images."""
    folder = write_images(tmp_path / "photos")
    (folder / "._b.png").write_bytes(b"\0\5\x16\7")
    (folder / ".cache").mkdir()
    (folder / "sub" / "x.jpg").mkdir()
    (folder / "empty.jpg").mkdir()
    (folder / "sub" / "x.jpg" / "c.JFIF").write_bytes((folder / "sub" / "a c.jpg").read_bytes())
    (folder / "broken.png").write_text("no image")
    (folder / "phone.heic").write_bytes(b"ftypheic")
    (folder / "phone2.HEIC").write_bytes(b"ftypheic")
    (folder / "README").touch()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.png")
    return folder


def test_a_real_folder_ends_in_a_table(
    messy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_classifier(tmp_path / "model", 0)
    written = predict(model, messy, messy / "out.csv")
    expected = [messy / "b.png", messy / "sub" / "a c.jpg", messy / "sub" / "x.jpg" / "c.JFIF"]
    assert rows_of(written) == [str(path) for path in expected]
    told = " ".join(capsys.readouterr().err.split())
    assert "3 unreadable images are skipped" in told and "pipe.png': it is a pipe" in told
    for part in (
        "2 hidden",
        "2 that end in .heic ('phone.heic')",
        "1 without an ending ('README')",
        "1 linked folder ('up')",
        "1 folder without images, named like an image ('empty.jpg')",
    ):
        assert part in told
    whole_text = written.read_text()
    monkeypatch.setattr(predict_stage, "BATCH", 1)
    counted: list[int] = []
    again = predict(model, messy, tmp_path / "again.csv", on_progress=counted.append)
    assert again.read_text() == whole_text and counted == [1, 1, 1]
    with pytest.raises(DataError, match=r"broken\.png.*--unreadable skip"):
        predict(model, messy, tmp_path / "none.csv", unreadable="error")
    assert not list(tmp_path.glob("*none.csv*"))


def test_the_command_line_says_what_to_do_with_broken_images(messy: Path, tmp_path: Path) -> None:
    model = write_classifier(tmp_path / "model", 0)
    asked = ["predict", str(model), str(messy), "--out", str(tmp_path / "out.csv"), "--unreadable"]
    for value, error in (("error", DataError), ("often", RunError), ("skip", type(None))):
        assert isinstance(CliRunner().invoke(app, [*asked, value]).exception, error)
    assert len(rows_of(tmp_path / "out.csv")) == 3


def test_what_leads_out_of_the_folder_is_not_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, images = write_classifier(tmp_path / "model", 0), write_images(tmp_path / "images")
    outside = write_images(tmp_path / "outside")
    (images / "link.png").symlink_to(outside / "b.png")
    assert len(rows_of(predict(model, images, tmp_path / "out.csv"))) == 2
    assert "link.png': it leads to" in capsys.readouterr().err
    named = predict(model, images / "link.png", tmp_path / "named.csv")  # whoever names it means it
    assert rows_of(named) == [str(images / "link.png")]


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out.csv", tmp_path, Path("/proc/none/out.csv")):
        with pytest.raises(RunError, match=rf"cannot be written to {out}"):
            predict(tmp_path / "no-classifier", images, out)
