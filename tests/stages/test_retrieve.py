"""Real images of an archive in the place of synthetic ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from discl import Run, load_recipe, open_run
from discl.curriculum.sampling import SamplingConfig, draw_epoch
from discl.errors import DataError, DisclError, RecipeError, RunError
from discl.pipeline import run_until
from discl.spectrum.clip_filter import ClipScorer
from discl.stages import retrieve as retrieve_stage
from discl.stages.method_plan import check_training
from discl.stages.plan import check_models
from discl.stages.sample_pool import added_images, hard_rows, make_pool, rows_of
from discl.utils.stored import read_table

HARD = {2: 5, 3: 3}
"""Hard images of coat and hat in `filtered_run`; their images are brighter than the others."""
ROW = {"images": "retrieved"}


def paint(label: int, number: int) -> Image.Image:
    """An image like those of a class of `filtered_run`, which is in no split of it."""
    pixels = np.random.default_rng([label, 9, number]).integers(0, 60, (32, 32, 3)) + 60 * label
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Eight images like each class, in folders that say nothing."""
    for label in range(4):
        for number in range(8):
            file = tmp_path / "archive" / f"{number % 2}" / f"{label}-{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            paint(label, number).save(file)
    return tmp_path / "archive"


def amended(filtered_run: Path, archive: Path, folder: Path, **changes: Any) -> Run:
    """A copy of `filtered_run` with a row of retrieved images; mean images decide the class."""
    if not folder.exists():
        shutil.copytree(filtered_run, folder)
    tree = yaml.safe_load((filtered_run / "recipe.yaml").read_text())
    tree["retrieval"] = {
        **{"archive": str(archive), "per_image": 1, "threshold": -1},
        **{"image_weight": 1, "copy_cosine": 1, **changes},
    }
    tree["methods"] = {"ce": {"undersample": True}, "retrieval": ROW}
    tree["train"]["model"] = {"architecture": "resnet10", "stem": "3x3", "width": 4}
    return open_run(load_recipe(tree), folder, amend=True)


def chosen(run: Run) -> list[dict[str, Any]]:
    return read_table(retrieve_stage.retrieve(run)).to_pylist()


def test_an_archive_is_searched_before_any_image_is_made(
    filtered_run: Path, archive: Path, tmp_path: Path
) -> None:
    """Whoever has enough real images need not pay for a spectrum to learn it."""
    amended(filtered_run, archive, tmp_path / "run")
    shutil.copy(tmp_path / "run" / "recipe.yaml", tmp_path / "recipe.yaml")
    run = open_run(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "fresh")
    run_until(run, "retrieve")
    assert run.path("retrieved.parquet").exists()
    assert not {"plan.parquet", "spectrum"} & {each.name for each in run.folder.iterdir()}


def test_the_closest_images_of_the_hard_classes_are_chosen(
    filtered_run: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No copies, in whatever format, no broken ones, and each once."""
    run = amended(filtered_run, archive, tmp_path / "run")
    train, test = run.train, run.tables["test"]
    train.image(len(train) - 1).save(archive / "copy-of-train.bmp")
    test.image(len(test) - 1).save(archive / "copy-of-test.webp", lossless=True)
    paint(3, 0).save(archive / "twice.png")
    (archive / "broken.png").write_bytes(b"\x89PNG")
    rows = chosen(amended(filtered_run, archive, tmp_path / "run"))
    assert [row["label"] for row in rows] == [2] * 5 + [3] * 3
    names = [Path(row["id"]).name for row in rows]
    assert len({*names}) == 8 and all(
        name.startswith(f"{row['label']}-") or name == "twice.png"
        for name, row in zip(names, rows, strict=True)
    )
    assert not {"copy-of-train.bmp", "copy-of-test.webp", "broken.png"} & {*names}
    assert not {"twice.png", "3-0.png"} <= {*names}
    told = capsys.readouterr().err
    assert "1 unreadable, 2 equal to images of the data set, 1 twice in the archive" in told
    assert "broken.png" in told


@pytest.mark.slow
def test_an_archive_without_a_spectrum_needs_no_generator(
    filtered_run: Path, archive: Path, tmp_path: Path
) -> None:
    recipe = amended(filtered_run, archive, tmp_path / "run").recipe
    none = {"spectrum.budget": {"images": 0}, "spectrum.checkpoint": "no/generator"}
    run = open_run(load_recipe(recipe, none), tmp_path / "real")
    check_models(run, "train")
    run_until(run, "train")
    assert run.path("train/retrieval/model.safetensors").exists()
    lost = load_recipe(run.recipe, {"retrieval.archive": str(tmp_path / "lost")})
    with pytest.raises(DataError, match="lost"):
        check_models(open_run(lost, tmp_path / "other"), "train")


def test_the_pool_has_them_beside_the_training_images(
    filtered_run: Path, archive: Path, tmp_path: Path
) -> None:
    """They are drawn at level 100; a class without any draws its own hard images again."""
    run = amended(filtered_run, archive, tmp_path / "run")
    for file in archive.rglob("3-*.png"):
        file.unlink()
    retrieve_stage.retrieve(run := amended(filtered_run, archive, tmp_path / "run"))
    images = added_images(run, run.recipe.methods["retrieval"])
    pool = make_pool(run.train, hard_rows(run), rows_of(images))
    assert pool.levels[pool.synthetic].tolist() == [100] * len(images)
    assert pool.real_counts.tolist() == run.train.class_counts.tolist()
    rows, first = draw_epoch(pool, [100], SamplingConfig(None, 1.0), 48, seed=0)
    assert first.synthetic == sum(HARD.values())
    assert {*pool.labels[rows[pool.synthetic[rows]]].tolist()} == {2}
    hats = np.flatnonzero(pool.labels == 3)
    assert (np.isin(rows, hats)).sum() == 2 * HARD[3]  # of 3 hats, each twice
    plain = added_images(run, run.recipe.methods["ce"])
    assert {*rows_of(plain)["level"]} == {0, 50}, "other methods have the spectrum"
    check_training(run)


def test_a_killed_search_continues(
    filtered_run: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of the cache are not embedded again, a broken one is, and the result is the same."""
    whole = chosen(amended(filtered_run, archive, tmp_path / "whole"))
    run, embed, seen = amended(filtered_run, archive, tmp_path / "run"), ClipScorer.embed, []

    def until(last: int) -> None:
        def killed(scorer: ClipScorer, images: list[Image.Image]) -> np.ndarray:
            if len(seen) == last:
                raise KeyboardInterrupt
            seen.append(len(images))
            return embed(scorer, images)

        monkeypatch.setattr(ClipScorer, "embed", killed)

    monkeypatch.setattr(retrieve_stage, "PART", 16)
    until(6)  # three parts of train, one of validation, one of test, one of the archive
    with pytest.raises(KeyboardInterrupt):
        retrieve_stage.retrieve(run)
    assert not run.path("retrieved.parquet").exists()
    until(7)
    assert chosen(run) == whole and len(seen) == 7
    run.path("retrieved.parquet").unlink()
    next((run.folder / "cache" / "embeddings").iterdir()).write_bytes(b"PAR1")
    until(8)
    assert chosen(run) == whole and len(seen) == 8
    assert chosen(run) == whole, "nothing to do"


def test_training_and_report_tell_retrieved_images(
    filtered_run: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = amended(filtered_run, archive, tmp_path / "run", per_image=2)
    page = run_until(run, "report").read_text()
    history = (run.folder / "train/retrieval/history.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in history]
    assert all(record["levels"] == [100] and record["synthetic_share"] > 0 for record in records)
    assert {"ce", "ce+la", "retrieval"} <= {*json.loads(run.path("results.json").read_text())}
    assert "real images of …/archive, in 2 classes" in page and "samples retrieved" in page
    assert "Same mixture without synthetic images: ce for retrieval" in page
    before = run.path("train/retrieval/model.safetensors").stat().st_mtime_ns
    run_until(run, "train")
    assert run.path("train/retrieval/model.safetensors").stat().st_mtime_ns == before


def test_an_archive_that_has_changed_is_told(
    filtered_run: Path, archive: Path, tmp_path: Path
) -> None:
    run = amended(filtered_run, archive, tmp_path / "run")
    name = chosen(run)[0]["id"]
    paint(0, 99).save(archive / name)
    with pytest.raises(RunError, match=f"'{name}' is no longer .*Delete"):
        retrieve_stage.retrieved_images(run)
    (archive / name).unlink()
    with pytest.raises(RunError, match="no longer those"):
        retrieve_stage.retrieved_images(amended(filtered_run, archive, tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"threshold": 1}, "none of 32 images .* below clip_similarity 1"),
        ({"copy_cosine": 0.01}, "32 near copies of images of the data set"),
    ],
)
def test_nothing_that_can_be_used(
    filtered_run: Path, archive: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    run = amended(filtered_run, archive, tmp_path / "run", **changes)
    with pytest.raises(DataError, match=told) as caught:
        retrieve_stage.retrieve(run)
    assert caught.value.argument == "retrieval.archive"
    assert not run.path("retrieved.parquet").exists()


def test_less_than_wanted_is_told(
    filtered_run: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = chosen(amended(filtered_run, archive, tmp_path / "run", per_image=10))
    counts = [sum(row["label"] == label for row in rows) for label in HARD]
    told = capsys.readouterr().err
    assert f"coat {counts[0]} of 50, hat {counts[1]} of 30" in told


@pytest.mark.parametrize(("name", "told"), [("none", "does not exist"), ("empty", "no image")])
def test_a_bad_archive_is_told_before_anything_is_made(
    filtered_run: Path, tmp_path: Path, name: str, told: str
) -> None:
    (tmp_path / "empty").mkdir()
    tree = yaml.safe_load((filtered_run / "recipe.yaml").read_text())
    tree |= {"retrieval": {"archive": str(tmp_path / name)}, "methods": {"retrieval": ROW}}
    run = open_run(load_recipe(tree), tmp_path / "run")
    with pytest.raises(DataError, match=told) as caught:
        run_until(run, "train")
    assert caught.value.argument == "retrieval.archive"
    assert not run.path("data.parquet").exists()


def test_an_archive_of_broken_images(filtered_run: Path, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "a.png").write_bytes(b"no image")
    run = amended(filtered_run, tmp_path / "archive", tmp_path / "run")
    with pytest.raises(DataError, match=r"no image of the archive can be read:\n  .*a\.png"):
        retrieve_stage.retrieve(run)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods.retrieval": ROW}, r"methods\.retrieval .*retrieval: {archive: FOLDER}"),
        ({"methods.row": ROW | {"strategy": "text-only"}}, "images: retrieved are real"),
        ({"methods.row": {"images": "other"}}, r"methods\.row\.images"),
        ({"retrieval": {}}, r"retrieval\.archive"),
        ({"retrieval": {"archive": "a", "copy_cosine": 2}}, r"retrieval\.copy_cosine"),
        ({"retrieval": {"archive": "a", "columns": {"label": "b"}}}, r"retrieval\.columns"),
    ],
)
def test_a_recipe_that_cannot_be_meant(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe("fashion-lt", changes)


def test_a_recipe_without_an_archive_is_as_before() -> None:
    """Its methods have the ids that they had; the row of an archive needs one key."""
    recipe = load_recipe("fashion-lt")
    assert "images" not in recipe.methods["discl"].model_dump(mode="json")
    both = load_recipe(recipe, {"retrieval": {"archive": "a"}, "methods.row": ROW})
    assert (both.methods["row"].strategy, both.methods["row"].level) == ("fixed", 100)
    assert load_recipe(both.plain()) == both and issubclass(DataError, DisclError)
