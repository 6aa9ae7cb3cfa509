"""Pictures as camera traps take them: pure, the same in every process, and in disjoint parts."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from typer.testing import CliRunner

from discl.cli import app
from discl.data import (
    Cameras,
    Gate,
    decode_image,
    digest_image,
    read_tables,
)
from discl.data.cameras import SCHEME, camera_address, degrade, draw_camera, parse_address
from discl.data.readers.camera_traps import is_pretraining, read_camera_traps
from discl.data.table import make_table
from discl.errors import DataError
from discl.recipe import load_recipe
from discl.run_folder.open import open_run
from discl.stages.prepare_data import prepare_data
from discl.training.image_cache import ImageCache

NAMES = ["cat", "dog"]


def photo(number: int, side: int = 32) -> Image.Image:
    """A picture of soft patches in colour."""
    coarse = np.random.default_rng(number).integers(40, 255, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def stored(number: int) -> dict[str, object]:
    out = io.BytesIO()
    photo(number).save(out, "PNG")
    return {"bytes": out.getvalue(), "path": None}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's layout on the hub: `img` and `label`, no ids; 300 training and 90 test images."""
    folder = tmp_path_factory.mktemp("cifar")
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=NAMES)})
    for split, first, count in (("train", 0, 300), ("test", 1000, 90)):
        rows = {
            "img": [stored(first + row) for row in range(count)],
            "label": [row % 2 for row in range(count)],
        }
        Dataset.from_dict(rows, features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def recipe(root: Path) -> dict[str, object]:
    return {
        "name": "lowlight",
        "data": {"root": str(root), "cameras": {"seen": 3, "unseen": 2, "validation": 30}},
        "spectrum": {"checkpoint": "none", "levels": [0]},
        "filter": {"checkpoint": "none"},
        "methods": {"base": {}},
    }


def test_a_picture_is_darker_of_the_same_size_and_a_pure_function_of_its_address() -> None:
    clean, camera = photo(1), draw_camera(0, 4)
    once, again = degrade(clean, camera, 7), degrade(clean, draw_camera(0, 4), 7)
    assert once.size == clean.size and digest_image(once) == digest_image(again)
    assert np.asarray(once).mean() < 0.8 * np.asarray(clean).mean()
    assert (
        digest_image(degrade(clean, camera, 8))
        != digest_image(once)
        != digest_image(degrade(clean, draw_camera(0, 5), 7))
    )
    assert digest_image(degrade(clean, draw_camera(1, 4), 7)) != digest_image(once)


def test_every_camera_leaves_something_to_see() -> None:
    """The brightness correlates with that of the clean image, whatever the camera."""
    for number in range(18):
        camera = draw_camera(0, number)
        pairs = [(photo(each), degrade(photo(each), camera, each)) for each in range(12)]
        seen = [
            np.corrcoef(*(np.asarray(image.convert("L"), float).ravel() for image in pair))[0, 1]
            for pair in pairs
        ]
        assert np.median(seen) > 0.5, (number, camera)
        grey = np.asarray(pairs[0][1], int)
        assert (np.ptp(grey, axis=2).max() <= 2) == camera.infrared


def test_an_address_is_decoded_where_pictures_are() -> None:
    picture = stored(3)
    address = camera_address(2, 5, 99, "photos/cat::1.png")
    assert parse_address(address) == (draw_camera(2, 5), 99, "photos/cat::1.png")
    assert parse_address(camera_address(2, 5, 99, None))[2] is None
    expected = degrade(photo(3), draw_camera(2, 5), 99)
    table = make_table(
        {"id": ["a"], "image": [{**picture, "path": address}], "label": [0]}, ["cat"]
    )
    assert digest_image(table.image(0)) == digest_image(photo(3))  # nobody made the address
    table = replace(table, schemes=frozenset({SCHEME}))
    assert digest_image(table.image(0)) == digest_image(expected)
    pixels = ImageCache([table], 32)
    assert np.array_equal(
        pixels.__getitems__([0])[0].permute(1, 2, 0).numpy(), np.asarray(expected)
    )


def test_a_file_that_a_camera_takes(tmp_path: Path) -> None:
    photo(3).save(tmp_path / "cat.png")
    taken = decode_image(
        {"bytes": None, "path": camera_address(0, 1, 2, str(tmp_path / "cat.png"))},
        Gate((tmp_path,), frozenset({SCHEME})),
    )
    assert digest_image(taken) == digest_image(degrade(photo(3), draw_camera(0, 1), 2))


@pytest.mark.slow
def test_another_process_sees_the_same_pictures(root: Path) -> None:
    program = (
        "import sys; from discl.data import Cameras, digest_image, read_tables\n"
        "tables = read_tables(sys.argv[1], cameras=Cameras(validation=30))\n"
        "print(*(digest_image(tables['train'].image(row)) for row in range(20)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(root)],
        capture_output=True,
        text=True,
        check=True,
        env={
            "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
            "PYTHONHASHSEED": "5",
            "OMP_NUM_THREADS": "2",
        },
    )
    table = read_tables(str(root), cameras=Cameras(validation=30))["train"]
    assert found.stdout.split() == [digest_image(table.image(row)) for row in range(20)]


def test_parts_are_disjoint_and_cameras_of_the_last_are_new(root: Path) -> None:
    clean = read_tables(str(root))
    tables = read_camera_traps(clean, Cameras(seen=3, unseen=2, validation=30, clean=0.25))
    assert list(tables) == ["train", "validation", "test", "test-ood"]
    ids = {split: set(table.ids) for split, table in tables.items()}
    assert not ids["train"] & ids["validation"] and not ids["test"] & ids["test-ood"]
    assert ids["train"] | ids["validation"] == {
        name for name in clean["train"].ids if not is_pretraining(name)
    }
    assert ids["test"] | ids["test-ood"] == set(clean["test"].ids)
    assert len(ids["validation"]) == 30 and 60 < len(ids["train"]) < 120
    domains = {split: set(table.rows["domain"][:]) for split, table in tables.items()}
    assert (
        domains["train"]
        == domains["validation"]
        == domains["test"]
        == {"camera-00", "camera-01", "camera-02"}
    )
    assert domains["test-ood"] == {"camera-03", "camera-04"}
    place = {name: row for row, name in enumerate(clean["train"].ids)}
    same = [
        digest_image(tables["train"].image(row)) == digest_image(clean["train"].image(place[name]))
        for row, name in enumerate(tables["train"].ids)
    ]
    assert 0.1 < np.mean(same) < 0.4
    labels = dict(zip(clean["train"].ids, clean["train"].labels, strict=True))
    assert [labels[name] for name in tables["train"].ids] == tables["train"].labels.tolist()


def test_most_takes_fewer_of_the_same(root: Path) -> None:
    clean = read_tables(str(root))
    whole, few = (
        read_camera_traps(clean, Cameras(validation=30, most=most))
        for most in ({}, {"train": 10, "test-ood": 5})
    )
    assert [len(few[split]) for split in few] == [10, 30, len(whole["test"]), 5]
    assert set(few["train"].ids) < set(whole["train"].ids)
    at = {name: row for row, name in enumerate(whole["train"].ids)}
    assert all(
        digest_image(few["train"].image(row)) == digest_image(whole["train"].image(at[name]))
        for row, name in enumerate(few["train"].ids)
    )


def test_the_rule_of_pretraining_is_the_one_that_the_shipped_weights_were_made_by() -> None:
    """Another rule would let the generator see what it is tested with."""
    listed = [f"airplane/{number:04d}.jpg" for number in range(5000)]
    assert [name for name in listed[:12] if is_pretraining(name)] == [
        f"airplane/{number:04d}.jpg" for number in [1, 6, 7, 8, 11]
    ]
    assert sum(map(is_pretraining, listed)) == 3053


def test_what_is_missing_is_told(root: Path) -> None:
    clean = read_tables(str(root))
    with pytest.raises(DataError, match="a training and a test split") as refused:
        read_camera_traps({"train": clean["train"]}, Cameras())
    assert refused.value.argument == "splits"
    with pytest.raises(
        DataError, match=r"validation = 2000 leaves no training image: 1\d\d of 300"
    ) as refused:
        read_camera_traps(clean, Cameras())
    assert refused.value.argument == "cameras"


def test_a_run_and_its_check_see_degraded_pictures(recipe: dict, tmp_path: Path) -> None:
    run = open_run(load_recipe(recipe), tmp_path / "run")
    listed = pq.read_table(prepare_data(run)).to_pylist()
    train = [row for row in listed if row["split"] == "train"]
    assert [row["digest"] for row in train[:5]] == [
        digest_image(run.train.image(row)) for row in range(5)
    ]
    assert {row["domain"] for row in train} == {"camera-00", "camera-01", "camera-02"}
    (tmp_path / "recipe.yaml").write_text(run.recipe.to_yaml())
    told = CliRunner().invoke(app, ["data", "check", str(tmp_path / "recipe.yaml")])
    assert told.exit_code == 0 and "error:" not in told.output  # notes: grey pictures of nights
    table = told.output[told.output.index("split ") :].splitlines()
    assert [line.split()[0] for line in table[1:5]] == ["train", "validation", "test", "test-ood"]


def test_a_column_img_is_an_image(root: Path) -> None:
    assert read_tables(str(root))["train"].rows.features["image"] == ImageFeature(decode=False)
    assert read_tables(str(root))["train"].rows.features["id"] == Value("string")
