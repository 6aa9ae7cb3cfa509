"""Images of an archive are read without labels, and assigned to classes by their embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from discl.data import read_archive
from discl.data.retrieval import (
    Candidates,
    assign_classes,
    choose_images,
    first_of_each,
    mean_embeddings,
)
from discl.errors import DataError


def unit(*rows: tuple[float, float]) -> np.ndarray:
    vectors = np.asarray(rows, np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


TEXTS, PROTOTYPES = unit((1, 0), (0, 1)), unit((0, 1), (1, 0))
IMAGES = unit((1, 0), (3, 4), (0, 1))


def test_an_image_has_the_class_of_the_closest_text() -> None:
    found = assign_classes(IMAGES, TEXTS, PROTOTYPES, unit((1, 0)), image_weight=0.0)
    assert found.labels.tolist() == [0, 1, 1]
    np.testing.assert_allclose(found.similarity, [1, 0.8, 1], atol=1e-6)
    np.testing.assert_allclose(found.scores, found.similarity)
    np.testing.assert_allclose(found.nearest, [1, 0.6, 0], atol=1e-6)


def test_the_weight_of_the_mean_image_decides_between_text_and_image() -> None:
    """The prototypes here are those of the other class, so they turn the labels around."""
    found = assign_classes(IMAGES, TEXTS, PROTOTYPES, unit((1, 0)), image_weight=0.75)
    assert found.labels.tolist() == [1, 0, 0]
    np.testing.assert_allclose(found.scores, [0.75, 0.75 * 0.8 + 0.25 * 0.6, 0.75], atol=1e-6)
    np.testing.assert_allclose(found.similarity, [0, 0.6, 0], atol=1e-6)


def test_prototypes_have_length_one_and_an_empty_class_none() -> None:
    found = mean_embeddings(unit((1, 0), (0, 1), (1, 0)), np.array([2, 2, 0]), 3)
    np.testing.assert_allclose(found, [[1, 0], [0, 0], [0.5**0.5, 0.5**0.5]], atol=1e-6)


def test_the_best_usable_images_of_each_class_are_chosen() -> None:
    scores = np.array([0.5, 0.9, 0.9, 0.7, 0.8], np.float32)
    labels = np.array([0, 1, 1, 1, 0])
    candidates = Candidates(labels, scores, scores, scores)
    usable = np.array([True, True, True, True, False])
    assert choose_images(candidates, usable, {1: 2, 0: 5}).tolist() == [1, 2, 0]
    assert choose_images(candidates, usable, {7: 2}).tolist() == []
    assert first_of_each(["a", "b", "a", "b", "c"]).tolist() == [True, True, False, False, True]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number, name in enumerate(("x.png", "birds/y.png", "birds/more/z.jpg")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 20), (60 * number, 0, 0)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_is_searched_at_any_depth(pictures: Path) -> None:
    told: list[str] = []
    table = read_archive(str(pictures), on_left_out=told.append)
    assert table.ids == ["birds/more/z.jpg", "birds/y.png", "x.png"]
    assert table.image(0).size == (22, 20) and "notes.txt" in told[0]


def test_lists_and_parquet_files_need_no_labels(pictures: Path) -> None:
    (pictures / "list.csv").write_text("path\nbirds/y.png\nx.png\n")
    table = read_archive(str(pictures / "list.csv"))
    assert table.ids == ["birds/y.png", "x.png"] and table.image(1).size == (20, 20)
    (pictures / "labelled.csv").write_text("file,label\nx.png,\nbirds/y.png,bird\n")
    table = read_archive(str(pictures / "labelled.csv"), columns={"image": "file"})
    assert table.ids == ["x.png", "birds/y.png"] and table.labels.tolist() == [0, 0]
    stored = [{"bytes": (pictures / "x.png").read_bytes(), "path": None}]
    for split in ("train", "test"):  # with equal ids
        (pictures / "both").mkdir(exist_ok=True)
        rows = {"image": stored, "id": ["a"]}
        pq.write_table(pa.table(rows), pictures / "both" / f"{split}.parquet")
    table = read_archive(str(pictures / "both"))
    assert sorted(table.ids) == ["test/a", "train/a"] and table.image(0).size == (20, 20)


@pytest.mark.parametrize(("name", "told"), [("none", "does not exist"), ("empty", "no image")])
def test_an_archive_without_images(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=f"{name}' .*{told}|{name}' {told}") as caught:
        read_archive(str(tmp_path / name))
    assert caught.value.argument == "root"
