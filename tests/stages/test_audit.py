"""`discl audit`: planted copies, faults, and what the filter does about leakage."""

from __future__ import annotations

import errno
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image, ImageOps
from typer.testing import CliRunner

from discl import Run, load_recipe, open_run
from discl.audit.findings import KINDS, Finding
from discl.audit.table import read_findings
from discl.cli import app
from discl.errors import CheckpointError, StoreError
from discl.pipeline import audit, run_until
from discl.report import audit_rows
from discl.run_folder import paths
from discl.stages import audit as stage
from discl.stages.audit import describe_audit
from discl.stages.sample_pool import kept_images


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def scene(number: int) -> Image.Image:
    random = np.random.default_rng(number)
    image = Image.new("RGB", (64, 64), tuple(random.integers(30, 220, 3).tolist()))
    for _ in range(25):
        left, top, wide, high = (int(value) for value in random.integers(2, 40, 4))
        image.paste(
            tuple(random.integers(0, 256, 3).tolist()), (left, top, left + wide, top + high)
        )
    return image


def copy_of(folder: Path, target: Path) -> Run:
    """A copy of a filtered run whose real images are all different, and in colour."""
    shutil.copytree(folder, target / "run")
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    root = target / "pictures"
    shutil.copytree(tree["data"]["root"], root)
    for number, file in enumerate(sorted(root.rglob("*.png"))):
        scene(number).save(file)
    for name in (paths.DATA, paths.HARD):
        (target / "run" / name).unlink()
    shutil.rmtree(target / "run" / paths.SPECTRUM)
    run = open_run(load_recipe(tree, {"data.root": str(root)}), target / "run", amend=True)
    run_until(run, "filter")
    return run


def plant(run: Run, pictures: list[bytes]) -> list[str]:
    """Puts these pictures in the place of the first synthetic images; returns their ids.

    The next image becomes a copy of its source.
    """
    rows = [row for file in run.spectrum.files() for row in pq.read_table(file).to_pylist()]
    rows.sort(key=lambda row: row["id"])
    for file in run.spectrum.files():
        Path(str(file)).unlink()
    train = run.tables["train"]
    source = train.image(train.ids.index(rows[len(pictures)]["source_id"]))
    for row, picture in zip(rows, [*pictures, png(source)], strict=False):
        row["image"] = {"bytes": picture, "path": None}
    run.spectrum.append(rows)
    shutil.rmtree(run.path(paths.CACHE), ignore_errors=True)
    return [row["id"] for row in rows[: len(pictures) + 1]]


@pytest.fixture(scope="module")
def planted(filtered_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[str]]:
    """A run with a leak, copies of another image and of the source, and a broken picture."""
    run = copy_of(filtered_run, tmp_path_factory.mktemp("audit"))
    test, train = run.tables["test"].image(3), run.tables["train"].image(0)
    smaller = train.resize((64, 64), Image.Resampling.BICUBIC, (4, 2, 60, 58))
    pictures = [png(ImageOps.mirror(test)), png(smaller), b"\x89PNG no picture"]
    return run, plant(run, pictures)


def test_planted_images_are_found_and_leakage_is_dropped(
    planted: tuple[Run, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, (leak, copy, broken, own) = planted
    findings = read_findings(audit(run))
    about = {each.id: each for each in findings if each.id in {leak, copy, broken, own}}
    assert (about[leak].kind, about[leak].other_split) == ("leakage", "test")
    assert about[leak].other == run.tables["test"].ids[3] and about[leak].value > 0.95
    assert (about[copy].kind, about[copy].other) == ("copies-another", run.tables["train"].ids[0])
    assert about[broken].kind == "unreadable"
    assert (about[own].kind, about[own].other_split) == ("copies-source", "train")
    assert {each.kind for each in findings if each.split != "synthetic"} <= {"near-duplicate"}
    assert not any(
        each.kind.endswith("duplicate") and each.split != "synthetic" for each in findings
    )

    words = ["audit", str(run.folder / "recipe.yaml"), "--out", str(run.folder)]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 1 and "error: 1 kept synthetic image" in first.output
    assert "'" + leak + "'" in first.output and first.output.rstrip().endswith("audit.parquet")

    verdicts = pq.read_table(run_until(run, "filter")).to_pylist()
    reasons = {row["id"]: row["reason"] for row in verdicts if not row["keep"]}
    assert reasons == {leak: f"leakage: copies the test image '{run.tables['test'].ids[3]}'"}
    assert leak not in kept_images(run)["id"] and leak not in kept_images(run, -1.0)["id"]
    assert CliRunner().invoke(app, words).exit_code == 0

    keeping = open_run(load_recipe(run.recipe, {"audit.leakage": "keep"}), run.folder)
    assert all(pq.read_table(run_until(keeping, "filter"))["keep"].to_pylist())
    assert not describe_audit(keeping)[1]


def test_an_audit_of_other_data_drops_nothing_and_says_so(
    planted: tuple[Run, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, (leak, *_) = planted
    folder = shutil.copytree(run.folder, tmp_path / "run")
    audit(run)
    shutil.copyfile(run.path(paths.AUDIT), folder / paths.AUDIT)
    listed = pq.read_table(folder / paths.DATA)
    data = {"data.own_split": {"seed": 7}}
    other = open_run(load_recipe(run.recipe, data), folder, amend=True)
    test = Path(run.recipe.data.root) / "test" / "bag" / "00.png"
    before = test.read_bytes()
    scene(999).save(test)
    try:
        run_until(other, "filter")
    finally:
        test.write_bytes(before)
    assert pq.read_table(folder / paths.DATA)["digest"] != listed["digest"]
    verdicts = pq.read_table(folder / paths.FILTER).to_pylist()
    assert {row["id"]: row["keep"] for row in verdicts}[leak]
    assert "was made from something else" in capsys.readouterr().err


def test_a_killed_audit_continues_to_the_same_result(
    planted: tuple[Run, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = planted
    expected = audit(run).read_bytes()
    again = open_run(run.recipe, shutil.copytree(run.folder, tmp_path / "run"))
    shutil.rmtree(again.path(paths.AUDITED))
    again.path(paths.AUDIT).unlink()
    monkeypatch.setattr(stage, "AT_ONCE", 5)
    measured: list[int] = []
    measure = stage.measure_image

    def stops(image: Image.Image) -> Any:
        measured.append(1)
        if len(measured) == 50:  # the 40 training images are stored
            raise KeyboardInterrupt
        return measure(image)

    monkeypatch.setattr(stage, "measure_image", stops)
    with pytest.raises(KeyboardInterrupt):
        audit(again)
    monkeypatch.setattr(stage, "measure_image", measure)
    assert len(pq.read_table(again.path(paths.AUDITED) / paths.THUMBNAILS)) == 40
    assert not again.path(paths.AUDIT).exists()
    assert audit(again).read_bytes() == expected


def test_thumbnails_are_mapped_and_a_full_disk_is_told(
    planted: tuple[Run, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(planted[0].folder, tmp_path / "run")
    run = open_run(planted[0].recipe, tmp_path / "run")
    seen: list[Any] = []
    find = stage.find_poor
    monkeypatch.setattr(
        stage, "find_poor", lambda images, limits: seen.append(images) or find(images, limits)
    )
    audit(run)
    assert seen and all(isinstance(each.thumbnails, np.memmap) for each in seen)
    assert not [file for file in run.path(paths.AUDITED).rglob("*") if "tmp" in file.name]

    def refuse(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stage.tempfile, "TemporaryFile", refuse)
    with pytest.raises(StoreError, match="No space left on device; free space and run again"):
        audit(run)


@pytest.mark.parametrize("column", ["thumbnail", "content", "width", "dark"])
def test_a_measured_shard_with_a_null_is_named(
    planted: tuple[Run, list[str]], tmp_path: Path, column: str
) -> None:
    shutil.copytree(planted[0].folder, tmp_path / "run")
    run = open_run(planted[0].recipe, tmp_path / "run")
    audit(run)
    file = next((run.path(paths.AUDITED) / paths.THUMBNAILS).glob("part-*"))
    table = pq.read_table(file)
    rows = [{**row, column: None} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), file)
    with pytest.raises(StoreError, match=f"without '{column}'"):
        audit(run)


def test_without_synthetic_images_the_real_ones_are_audited(
    planted: tuple[Run, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = planted
    recipe = load_recipe(
        run.recipe, {"filter.checkpoint": "owner/none", "spectrum.checkpoint": "owner/none"}
    )
    root = Path(run.recipe.data.root)
    shutil.copytree(root, tmp_path / "pictures")
    train = sorted((tmp_path / "pictures/train/bag").glob("*.png"))
    Image.open(train[0]).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(
        tmp_path / "pictures/test/bag/00.png"
    )
    recipe = load_recipe(recipe, {"data.root": str(tmp_path / "pictures")})
    fresh = open_run(recipe, tmp_path / "run")
    findings = read_findings(audit(fresh))
    assert [(each.kind, each.split, each.other_split) for each in findings] == [
        ("near-duplicate", "test", "train")
    ]
    assert "only real images are audited" in capsys.readouterr().err
    assert describe_audit(fresh) == (
        "note: test against train: images that show the same picture as another "
        f"(mirrored, cropped, compressed or noisy): 1 (for example '{findings[0].id}' of "
        f"'{findings[0].other}')",
        False,
    )


def test_images_near_level_100_may_resemble_their_source(
    planted: tuple[Run, list[str]], tmp_path: Path
) -> None:
    run, (*_, own) = planted
    folder = shutil.copytree(run.folder, tmp_path / "run")
    allowed = open_run(load_recipe(run.recipe, {"audit.own_source": 0}), folder)
    assert own not in {each.id for each in read_findings(audit(allowed))}


def test_a_network_that_does_not_exist_is_an_error_before_any_work(
    planted: tuple[Run, list[str]],
) -> None:
    run, _ = planted
    wrong = open_run(load_recipe(run.recipe, {"audit.features": "/no/such/clip"}), run.folder)
    with pytest.raises(CheckpointError) as error:
        audit(wrong)
    assert error.value.argument == "audit.features" or "/no/such/clip" in str(error.value)


def test_the_report_shows_findings_with_both_pictures(planted: tuple[Run, list[str]]) -> None:
    run, (leak, *_) = planted
    findings = [each for each in read_findings(audit(run)) if each.id]
    drifted = [Finding("wandered", "synthetic", "", label, 50, label / 10) for label in range(3)]
    rows = {
        row.kind: row
        for row in audit_rows([*findings, *drifted], run.tables, run.location(paths.SPECTRUM))
    }
    assert list(rows) == [kind for kind in KINDS if kind in rows]
    assert rows["leakage"].counts == {"synthetic": 1}
    (picture,) = rows["leakage"].pictures
    assert leak in picture.caption and len(picture.uris) == 2
    assert all(uri.startswith("data:image/webp;base64,") for uri in picture.uris)
    assert rows["unreadable"].counts == {"synthetic": 1} and not rows["unreadable"].pictures
    names = run.train.class_names
    assert rows["wandered"].note.startswith(f"{names[0]} at 50 %: 0.00, {names[1]} at 50 %: 0.10")
