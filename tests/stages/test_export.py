"""Exports read back: by `datasets`, by our readers; completely or not at all."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import c2pa
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from PIL import Image

from discl import cli, mark_synthetic
from discl.data import read_tables
from discl.errors import RecipeError, StoreError
from discl.export import FORMATS, MARKER, export_images
from discl.export.formats import safe_names, write_label_studio
from discl.pipeline import run_until
from discl.recipe import load_recipe
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
from discl.stages.export import export, open_signer
from helpers.certificates import make_certificate

CLASSES = ("T-shirt_top", "bag & more", "çapa 東京")


@pytest.fixture(scope="module")
def filtered(
    tmp_path_factory: pytest.TempPathFactory, tiny_diffusion: Path, tiny_clip: Path
) -> Run:
    """A run of two rare classes with odd names, of whose images the filter drops about half."""
    root = tmp_path_factory.mktemp("export")
    random = np.random.default_rng(0)
    for split, counts in (("train", (6, 3, 2)), ("test", (1, 1, 1))):
        for name, count in zip(CLASSES, counts, strict=True):
            (root / "data" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / "data" / split / name / f"{number}.png")
    tree = {
        "name": "odd",
        "data": {"root": str(root / "data")},
        "groups": {"many": 5, "few": 5},
        "hard": {"fewer_than": 5},
        "prompts": {"templates": ["a {class}", "one {class}"], "names": {"çapa 東京": "hoe"}},
        "spectrum": {
            "checkpoint": str(tiny_diffusion),
            "levels": [0, 50],
            "seeds": 2,
            "num_inference_steps": 2,
            "encoding": "png",
        },
        "filter": {"checkpoint": str(tiny_clip), "threshold": -1},
        "train": {"epochs": 1, "curriculum_epochs": 1, "image_size": 16, "batch_size": 4},
        "methods": {"discl": {"strategy": "all-levels"}},
        "runtime": {"device": "cpu", "slots": 4, "shard_rows": 7},
    }
    run = open_run(load_recipe(tree), root / "run")
    run_until(run, "filter")
    scores = pq.read_table(run.path("filter.parquet"))["clip_similarity"].to_numpy()
    middle = float(np.sort(scores)[len(scores) // 2])
    run = open_run(load_recipe(tree, {"filter.threshold": middle}), root / "run", amend=True)
    run_until(run, "filter")
    return run


def stored(run: Run, everything: bool = False) -> dict[str, dict]:
    """`{id: row of the store with its verdict}` of the kept images."""
    rows = {
        row["id"]: row for shard in run.spectrum.files() for row in pq.read_table(shard).to_pylist()
    }
    verdicts = {row["id"]: row for row in pq.read_table(run.path("filter.parquet")).to_pylist()}
    return {
        name: {**row, **verdicts[name]}
        for name, row in rows.items()
        if everything or verdicts[name]["keep"]
    }


def marked(row: dict) -> bytes:
    return mark_synthetic(row["image"]["bytes"], row["id"])


def card_of(out: Path) -> str:
    return (out / "README.md").read_text()


def test_some_are_kept_and_some_are_not(filtered: Run) -> None:
    assert 0 < len(stored(filtered)) < len(stored(filtered, everything=True)) == 5 * 2 * 2


def test_an_image_folder_is_read_by_datasets(filtered: Run, tmp_path: Path) -> None:
    out = export(filtered, "imagefolder", tmp_path / "out")
    read = load_dataset("imagefolder", data_dir=str(out), cache_dir=str(tmp_path / "cache"))[
        "train"
    ]
    expected = stored(filtered)
    assert set(read["id"]) == set(expected) and len(read) == len(expected)
    for row in read:
        mine = expected[row["id"]]
        assert (row["level"], row["prompt"], row["source_id"], row["seed"]) == tuple(
            mine[k] for k in ("level", "prompt", "source_id", "seed")
        )
        assert row["label"] == CLASSES[mine["label"]]
        assert row["keep"] is True
    listed = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    for row in listed:
        assert (out / row["file_name"]).read_bytes() == marked(expected[row["id"]])
        assert (
            row["file_name"]
            == f"{safe_names(CLASSES)[row['label_index']]}/{row['level']:03d}-{row['id']}.png"
        )


def test_web_dataset_shards_are_read_by_our_own_reader(filtered: Run, tmp_path: Path) -> None:
    out = export(filtered, "webdataset", tmp_path / "out")
    table = read_tables(str(out), "webdataset")["train"]
    expected = stored(filtered)
    assert {name.split("/")[-1] for name in table.ids} == set(expected)
    for row, name in enumerate(table.ids):
        mine = expected[name.split("/")[-1]]
        assert table.class_names[table.labels[row]] == CLASSES[mine["label"]]
    read = load_dataset(
        "webdataset", data_files=str(out / "*.tar"), cache_dir=str(tmp_path / "cache")
    )["train"]
    assert {row["json"]["id"]: row["json"]["level"] for row in read} == {
        name: row["level"] for name, row in expected.items()
    }


def test_a_folder_for_the_hub_is_read_as_parquet_and_by_its_card(
    filtered: Run, tmp_path: Path
) -> None:
    out = export(filtered, "hub-folder", tmp_path / "out")
    expected = stored(filtered)
    by_files = load_dataset(
        "parquet", data_files=str(out / "data/*.parquet"), cache_dir=str(tmp_path / "one")
    )["train"]
    by_card = load_dataset(str(out), cache_dir=str(tmp_path / "two"))["train"]
    for read in (by_files, by_card):
        assert set(read["id"]) == set(expected)
        assert read.features["label"].names == list(CLASSES)
        row = read[0]
        assert row["image"].size == (32, 32)
        assert row["prompt"] == expected[row["id"]]["prompt"]
        assert row["label"] == expected[row["id"]]["label"]
        assert row["clip_similarity"] == pytest.approx(expected[row["id"]]["clip_similarity"])
    raw = {
        row["id"]: row["image"]["bytes"]
        for file in (out / "data").glob("*.parquet")
        for row in pq.read_table(file).to_pylist()
    }
    assert raw == {name: marked(row) for name, row in expected.items()}


def test_the_mark_can_be_left_out(filtered: Run, tmp_path: Path) -> None:
    """A marked export is then another one, and is replaced."""
    out = export(filtered, "yolo", tmp_path / "out")
    assert all(b"trainedAlgorithmicMedia" in file.read_bytes() for file in out.rglob("*.png"))
    assert "| marks | the XMP of each image says that it is synthetic" in card_of(out)
    export(filtered, "yolo", out, marks=False)
    assert {file.stem.split("-", 1)[1]: file.read_bytes() for file in out.rglob("*.png")} == {
        name: row["image"]["bytes"] for name, row in stored(filtered).items()
    }
    assert "| marks | none" in card_of(out)


@pytest.mark.parametrize("kind", sorted({*FORMATS} - {"hub-folder"}))  # Parquet compresses
def test_every_format_has_the_mark_in_every_image(filtered: Run, tmp_path: Path, kind: str) -> None:
    out = export(filtered, kind, tmp_path / "out")
    content = b"".join(file.read_bytes() for file in out.rglob("*") if file.is_file())
    for name, row in stored(filtered).items():
        assert marked(row) in content, name
        assert row["image"]["bytes"] not in content, name


def test_a_folder_for_yolo_has_a_folder_per_class(filtered: Run, tmp_path: Path) -> None:
    out = export(filtered, "yolo", tmp_path / "out")
    table = read_tables(str(out), "imagefolder")["train"]
    expected = stored(filtered)
    assert {name.split("/")[-1].split(".")[0].split("-", 1)[1] for name in table.ids} == set(
        expected
    )
    listed = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert sorted(row["file_name"] for row in listed) == sorted(
        str(file.relative_to(out)) for file in out.glob("train/*/*.png")
    )


def test_coco_is_read_by_our_own_reader(filtered: Run, tmp_path: Path) -> None:
    out = export(filtered, "coco", tmp_path / "out")
    table = read_tables(str(out), "coco")["train"]
    expected = stored(filtered)
    assert table.class_names == CLASSES
    assert {name.split("/")[-1].removesuffix(".png") for name in table.ids} == set(expected)
    for row, name in enumerate(table.ids):
        mine = expected[name.split("/")[-1].removesuffix(".png")]
        assert table.labels[row] == mine["label"] and table.image(row).size == (32, 32)
    listed = json.loads((out / "annotations/instances_train.json").read_text())
    assert {each["request_id"] for each in listed["images"]} == set(expected)
    assert all(each["prompt"] for each in listed["images"])
    assert {tuple(each["bbox"]) for each in listed["annotations"]} == {(0, 0, 32, 32)}
    assert {each["id"] for each in listed["images"]} == {
        each["image_id"] for each in listed["annotations"]
    }


def test_fiftyone_has_a_file_and_a_label_for_each_image(filtered: Run, tmp_path: Path) -> None:
    out = export(filtered, "fiftyone", tmp_path / "out")
    listed = json.loads((out / "labels.json").read_text())
    assert listed["classes"] == list(CLASSES)
    assert set(listed["labels"]) == {file.stem for file in (out / "data").iterdir()}
    for name, row in stored(filtered).items():
        label = listed["labels"][name]
        assert label["label"] == row["label"]
        assert label["attributes"]["level"] == row["level"]


def test_label_studio_has_a_task_with_a_prediction_for_each_image(
    filtered: Run, tmp_path: Path
) -> None:
    out = export(filtered, "label-studio", tmp_path / "out")
    tasks = {each["data"]["id"]: each for each in json.loads((out / "tasks.json").read_text())}
    expected = stored(filtered)
    assert set(tasks) == set(expected)
    interface = ElementTree.parse(out / "labels.xml")
    assert [each.get("value") for each in interface.iter("Choice")] == list(CLASSES)
    image, choices = interface.find("Image"), interface.find("Choices")
    for name, row in expected.items():
        data, (prediction,) = tasks[name]["data"], tasks[name]["predictions"]
        root, _, path = data[image.get("value").removeprefix("$")].partition("?d=")
        assert root == "/data/local-files/" and (out / path).read_bytes() == marked(row)
        assert (data["level"], data["prompt"]) == (row["level"], row["prompt"])
        (result,) = prediction["result"]
        assert result["from_name"] == choices.get("name")
        assert result["to_name"] == choices.get("toName") == image.get("name")
        assert result["type"] == "choices"
        assert result["value"] == {"choices": [CLASSES[row["label"]]]}


def test_any_class_name_is_a_choice_of_label_studio(tmp_path: Path) -> None:
    write_label_studio(tmp_path, [], ['<"&>', "a\x1b[1m\n"])
    choices = ElementTree.parse(tmp_path / "labels.xml").iter("Choice")
    assert [each.get("value") for each in choices] == ['<"&>', "a\\x1b[1m\\n"]


def test_a_signed_export_is_another_one_and_names_who_signs(filtered: Run, tmp_path: Path) -> None:
    chain, key = make_certificate(tmp_path / "good")
    out = export(filtered, "imagefolder", tmp_path / "out")
    plain = {file.name: file.read_bytes() for file in out.rglob("*.png")}
    signer = open_signer(chain, key)
    for _ in range(2):  # the second time it is there already
        export(filtered, "imagefolder", out, signer=signer)
    files = list(out.rglob("*.png"))
    assert {file.name for file in files} == set(plain)
    for file in files:
        manifest = c2pa.Reader("image/png", io.BytesIO(file.read_bytes())).get_active_manifest()
        assert manifest["title"] == file.stem.split("-", 1)[1]
        assert np.array_equal(Image.open(file), Image.open(io.BytesIO(plain[file.name])))
    assert r"| signature | C2PA content credentials of A \| studio, SHA-256" in card_of(out)
    secret = key.read_bytes().splitlines()[1]
    for file in [*out.rglob("*"), *filtered.folder.rglob("*")]:
        assert not file.is_file() or secret not in file.read_bytes()


def test_a_certificate_that_cannot_sign_ends_an_export_before_it_begins(
    filtered: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, key = make_certificate(tmp_path / "expired", days=(-9, -1))
    command = ["discl", "export", str(filtered.folder / "recipe.yaml"), "--to", "yolo"]
    folders = ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*command, *folders, "--c2pa", str(chain), str(key)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_card_says_how_they_were_made(filtered: Run, tmp_path: Path, kind: str) -> None:
    out = export(filtered, kind, tmp_path / "out")
    text = (out / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    stated = yaml.safe_load(header)
    assert stated["license"] == "other" and stated["task_categories"] == ["image-classification"]
    kept, made = len(stored(filtered)), 20
    assert f"kept {kept} of {made} images ({kept / made:.1%})" in body
    for fact in (
        "diffusion (digest ",
        "0 %, 50 %",
        "2 per hard image",
        "| guidance scale | 10 ",
        "| source data set | data,",
        "2 inference",
    ):
        assert fact in body, fact
    assert f"clip_similarity ≥ {filtered.recipe.filter.threshold:g}".replace("-", "−") in body
    assert "| hard images | 5: all images of classes with fewer than 5 training images |" in body
    assert "The licences of both apply" in body
    assert str(filtered.folder.parent) not in text


def test_all_takes_the_dropped_ones_with_their_reason(filtered: Run, tmp_path: Path) -> None:
    out = export(filtered, "imagefolder", tmp_path / "out", everything=True)
    listed = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert len(listed) == 20
    assert {row["keep"] for row in listed} == {True, False}
    assert all(("clip_similarity" in row["reason"]) != row["keep"] for row in listed)


@pytest.mark.parametrize("kind", FORMATS)
def test_again_it_does_nothing_and_the_same_images_give_the_same_files(
    filtered: Run, tmp_path: Path, kind: str
) -> None:
    first, second = (
        export(filtered, kind, tmp_path / "one"),
        export(filtered, kind, tmp_path / "two"),
    )
    files = {
        file.relative_to(first): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in first.rglob("*")
        if file.is_file()
    }
    export(filtered, kind, first)
    assert {name: (first / name).stat().st_mtime_ns for name in files} == {
        name: when for name, (_, when) in files.items()
    }
    assert {name: (second / name).read_bytes() for name in files} == {
        name: data for name, (data, _) in files.items()
    }


def test_another_export_takes_the_place_of_an_older_one(filtered: Run, tmp_path: Path) -> None:
    out = export(filtered, "webdataset", tmp_path / "out")
    export(filtered, "imagefolder", out, everything=True)
    assert not list(out.glob("*.tar"))
    assert len((out / "metadata.jsonl").read_text().splitlines()) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_folder_that_holds_something_else_is_left_alone(filtered: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(
        StoreError, match=r"mine is not empty and holds no export of discl; name another folder"
    ):
        export(filtered, "imagefolder", tmp_path / "mine")
    with pytest.raises(StoreError, match="is a file; name a folder"):
        export(filtered, "imagefolder", tmp_path / "mine/notes.txt")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert (export(filtered, "imagefolder", tmp_path / "empty") / MARKER).exists()


def test_stopped_half_way_nothing_is_there_and_the_older_export_stays(
    filtered: Run, tmp_path: Path
) -> None:
    out = export(filtered, "imagefolder", tmp_path / "out")
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    def stops():
        picture = next(iter(stored(filtered).values()))["image"]["bytes"]
        yield {"id": "a", "bytes": picture, "label": 0, "level": 0}
        raise KeyboardInterrupt

    for folder in (out, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            export_images(
                folder,
                "imagefolder",
                stops(),
                class_names=CLASSES,
                card="card",
                fingerprint="other",
            )
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert not (tmp_path / "new").exists()
    export(filtered, "webdataset", out)
    export(filtered, "webdataset", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_disk_that_refuses_is_told(filtered: Run, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot write the export to"):
        export(filtered, "imagefolder", tmp_path / "closed/out")


def test_a_disk_that_is_full_leaves_nothing_behind(
    filtered: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(FORMATS, "imagefolder", full)
    with pytest.raises(StoreError, match="No space left on device"):
        export(filtered, "imagefolder", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_folder_that_one_is_in_is_filled(
    filtered: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--out .`: the same files, in the folder itself; an older export is replaced."""
    expected = export(filtered, "webdataset", tmp_path / "there")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for kind in ("imagefolder", "webdataset"):
        assert export(filtered, kind, Path()) == Path()
        assert Path.cwd() == here and here.samefile(".") and (here / MARKER).exists()
    assert {file.name: file.read_bytes() for file in here.iterdir()} == {
        file.name: file.read_bytes() for file in expected.iterdir()
    }
    when = (here / MARKER).stat().st_mtime_ns
    export(filtered, "webdataset", Path())
    assert (here / MARKER).stat().st_mtime_ns == when
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]


def test_a_link_to_a_folder_stays_a_link(filtered: Run, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    export(filtered, "webdataset", tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / MARKER).exists()


def test_where_nothing_was_kept_it_says_so(filtered: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(filtered.folder, tmp_path / "run")
    run = open_run(load_recipe(filtered.recipe, {"filter.threshold": 1.0}), folder, amend=True)
    run_until(run, "filter")
    with pytest.raises(
        StoreError,
        match=r"the filter kept none of the 20 images; lower filter\.threshold \(1\) or use --all",
    ):
        export(run, "imagefolder", tmp_path / "out")


def test_safe_names_are_different_and_lead_nowhere_else() -> None:
    names = [
        "T-shirt/top",
        "T-shirt top",
        "Ärger",
        "con",
        "NUL.txt",
        "..",
        "../../etc",
        "a" * 300,
        "東京 タワー",
        "CAT",
        "cat",
        "",
        " ",
        "-",
    ]
    safe = safe_names(names)
    assert safe[:4] == ["T-shirt_top", "T-shirt_top-efd671da", "Ärger", "class_con"]
    assert len({name.casefold() for name in safe}) == len(names)
    for name in safe:
        assert (
            name
            and len(name.encode()) <= 100
            and Path(name).name == name
            and name not in {".", ".."}
            and not name.startswith(".")
        )
    assert safe_names(CLASSES) == safe_names(CLASSES)


def test_the_command(
    filtered: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [
        "discl",
        "export",
        str(filtered.folder / "recipe.yaml"),
        "--run",
        str(filtered.folder),
        "--out",
        str(tmp_path / "out"),
        "--to",
    ]
    monkeypatch.setattr(sys, "argv", [*words, "webdatset"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert (
        "error: --to: unknown format 'webdatset'; known: coco, fiftyone, hub-folder, imagefolder, "
        "label-studio, webdataset, yolo. Did you mean 'webdataset'?" in capsys.readouterr().err
    )
    signing = ["--c2pa", *map(str, make_certificate(tmp_path / "good"))]
    monkeypatch.setattr(sys, "argv", [*words, "webdataset", *signing])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    shard = (tmp_path / "out/train-000000.tar").read_bytes()
    assert shard.count(b"c2pa.signature") >= len(stored(filtered)) > 0


def test_an_unknown_format_is_refused(filtered: Run, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown format 'zip'"):
        export(filtered, "zip", tmp_path / "out")
