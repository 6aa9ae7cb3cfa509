"""`discl levels` on the embedded generator: figures against independent ones, resuming, page."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from discl import cli
from discl.assets import embedded
from discl.errors import CheckpointError, RecipeError
from discl.pipeline import levels, run_until
from discl.recipe import load_recipe, validate
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
from discl.stages import engine as engine_stage
from discl.stages import levels as levels_stage
from discl.stages import trial as trial_stage

SMALL = {
    "data.long_tail": None,
    "hard.fewer_than": 6,
    "spectrum.num_inference_steps": 5,
    "runtime.threads": 1,
    "runtime.slots": 8,
    "runtime.shard_rows": 4,
    "runtime.device": "cpu",
}
COUNTS = {"train": [12] * 7 + [5] * 3, "test": [2] * 10}
GRID = [0, 40, 80]


def few_clothes(folder: Path) -> Path:
    """A hundred of the embedded images, three classes of them rare."""
    folder.mkdir()
    for split, counts in COUNTS.items():
        table = pq.read_table(embedded("embedded:fashion-mnist/data") / f"{split}.parquet")
        labels = table["label"].to_numpy()
        rows = np.concatenate(
            [np.flatnonzero(labels == label)[:count] for label, count in enumerate(counts)]
        )
        pq.write_table(table.take(rows), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("survey")
    run = open_run(
        load_recipe("fashion-lt", {**SMALL, "data.root": str(few_clothes(folder / "clothes"))}),
        folder / "run",
    )
    levels(run, sources=5, grid=GRID)
    return run


def found_in(run: Run) -> dict:
    return json.loads((run.folder / "levels/levels.json").read_text())


def test_a_spectrum_over_the_grid_is_made_beside_the_run(surveyed: Run) -> None:
    found = found_in(surveyed)
    assert [row["level"] for row in found["levels"]] == [0, 40, 80]
    assert [row["steps"] for row in found["levels"]] == [5, 3, 1]
    assert [row["images"] for row in found["levels"]] == [5, 5, 5]
    assert not (surveyed.folder / "spectrum").exists()
    sample = pq.read_table(surveyed.folder / "levels/hard.parquet")
    assert sorted(set(sample["label"].to_pylist())) == [7, 8, 9]


def embed(pictures: list[Image.Image]) -> np.ndarray:
    """By transformers' own classes, picture by picture."""
    from transformers import AutoImageProcessor, CLIPModel

    folder = embedded("embedded:fashion-mnist/clip")
    model, processor = (
        CLIPModel.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    with torch.inference_mode():
        rows = [
            model.get_image_features(
                **processor(images=picture, return_tensors="pt")
            ).pooler_output[0]
            for picture in pictures
        ]
    return torch.nn.functional.normalize(torch.stack(rows), dim=1).numpy()


def test_similarities_are_those_of_transformers(surveyed: Run) -> None:
    stored = [
        row
        for shard in (surveyed.folder / "pilot/spectrum").glob("part-*")
        for row in pq.read_table(shard).to_pylist()
    ]
    places = {name: row for row, name in enumerate(surveyed.train.ids)}
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in stored]
    own = embed(pictures)
    sources = embed([surveyed.train.image(places[row["source_id"]]) for row in stored])
    cosines = (own * sources).sum(1)
    for row in found_in(surveyed)["levels"]:
        here = np.array([each["level"] == row["level"] for each in stored])
        assert row["image_similarity"]["mean"] == pytest.approx(cosines[here].mean(), abs=1e-4)
        scores = pq.read_table(surveyed.folder / "levels/filter.parquet").to_pylist()
        texts = np.array(
            [each["clip_similarity"] for each in scores if each["level"] == row["level"]]
        )
        assert row["text_similarity"]["median"] == pytest.approx(np.median(texts), abs=1e-6)
        assert row["kept"] == (texts >= 0.6).mean()
    means = [row["image_similarity"]["mean"] for row in found_in(surveyed)["levels"]]
    assert means == sorted(means)


def test_pairs_are_of_two_images_of_one_class(surveyed: Run) -> None:
    pair = found_in(surveyed)["real"]["pair_similarity"]
    assert 0.5 < pair < 1
    first = found_in(surveyed)["levels"][-1]
    assert first["image_similarity"]["mean"] > pair


@pytest.mark.slow
def test_again_it_makes_nothing_and_more_only_adds(
    surveyed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(surveyed.folder, tmp_path / "run")
    run = open_run(surveyed.recipe, folder)
    monkeypatch.setattr(
        engine_stage, "load_generator", lambda *_: pytest.fail("nothing was to be generated")
    )
    monkeypatch.setattr(
        trial_stage, "stored_images", lambda *_: pytest.fail("nothing was to be embedded")
    )
    levels(run, sources=5, grid=GRID)
    assert found_in(run) == found_in(surveyed)
    levels(run, sources=3, grid=GRID[1:])
    assert [row["images"] for row in found_in(run)["levels"]] == [3, 3]
    monkeypatch.undo()
    before = len(list((folder / "pilot/spectrum").glob("part-*")))
    levels(run, sources=6, grid=GRID)
    rows = [
        row
        for shard in (folder / "pilot/spectrum").glob("part-*")
        for row in pq.read_table(shard, columns=["id"]).to_pylist()
    ]
    assert len(rows) == len({row["id"] for row in rows}) == 18
    assert len(list((folder / "pilot/spectrum").glob("part-*"))) == before + 1


def test_tables_say_the_same(surveyed: Run) -> None:
    folder, found = surveyed.folder / "levels", found_in(surveyed)
    rows = list(csv.DictReader((folder / "levels.csv").open()))
    assert [int(row["level"]) for row in rows] == [0, 40, 80, 100]
    assert float(rows[0]["image_similarity"]) == pytest.approx(
        found["levels"][0]["image_similarity"]["mean"], abs=1e-4
    )
    text = (folder / "levels.md").read_text()
    pasted = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert pasted == {
        "spectrum": {"levels": found["proposal"]["levels"]},
        "filter": {"threshold": found["proposal"]["threshold"]},
    }
    overrides = {
        "spectrum.levels": pasted["spectrum"]["levels"],
        "filter.threshold": pasted["filter"]["threshold"],
    }
    assert (
        load_recipe(surveyed.recipe, overrides).filter.threshold == found["proposal"]["threshold"]
    )
    assert all(f"- {reason}" in text for reason in found["proposal"]["reasons"])


def test_the_page_needs_no_network_and_draws_every_level(surveyed: Run) -> None:
    page = (surveyed.folder / "levels/levels.html").read_text()
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert "<script" not in page
    lines = re.findall(r'<path class="line" d="([^"]+)"', page)
    assert [line.count("L") for line in lines] == [2, 2, 2, 2]
    assert page.count("data:image/webp;base64,") >= 5
    for reason in found_in(surveyed)["proposal"]["reasons"]:
        assert reason.split(":")[0].replace("–", "–") in page.replace("&#39;", "'")


def test_the_sample_goes_through_the_classes_in_turns() -> None:
    ids, labels = [f"image {number}" for number in range(12)], [0] * 6 + [1] * 4 + [2] * 2
    taken = trial_stage.choose_sample(ids, labels, 7)
    assert sorted(labels[row] for row in taken) == [0, 0, 0, 1, 1, 2, 2] or sorted(
        labels[row] for row in taken
    ) == [0, 0, 1, 1, 1, 2, 2]
    assert set(trial_stage.choose_sample(ids, labels, 4)) < set(taken)
    assert trial_stage.choose_sample(ids, labels, 99) == list(range(12))


def test_the_default_grid_leaves_a_step() -> None:
    assert list(levels_stage.default_grid(50)) == list(range(0, 100, 10))
    assert list(levels_stage.default_grid(5)) == list(range(0, 90, 10))
    assert list(levels_stage.default_grid(1)) == [0]
    assert list(levels_stage.default_grid(100, fixed=True)) == list(range(0, 100, 10))
    assert list(levels_stage.default_grid(150, fixed=True)) == list(range(0, 90, 10))


@pytest.mark.slow
def test_a_survey_where_every_level_takes_all_steps(
    small_tree: dict[str, Any], tmp_path: Path
) -> None:
    spectrum = small_tree["spectrum"] | {"steps": "fixed", "levels": [0]}
    run = open_run(validate(small_tree | {"spectrum": spectrum}), tmp_path / "run")
    levels(run, sources=2)
    assert [(row["level"], row["steps"]) for row in found_in(run)["levels"]] == [
        (level, 4) for level in range(0, 100, 10)
    ]
    with pytest.raises(
        CheckpointError, match="level 99 % has fewer than 300 training steps of noise"
    ):
        levels_stage.survey_levels(
            replace(
                run,
                recipe=validate(small_tree | {"spectrum": spectrum | {"num_inference_steps": 300}}),
            ),
            grid=[99],
        )


def test_a_survey_leaves_the_plan_of_its_run_alone(surveyed: Run, tmp_path: Path) -> None:
    run = open_run(surveyed.recipe, shutil.copytree(surveyed.folder, tmp_path / "run"))
    run_until(run, "plan")
    before = run.path("plan.parquet").read_bytes()
    levels(run, sources=5, grid=GRID)
    assert run.path("plan.parquet").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["--grid", "0,ten"],
            "--grid takes whole numbers with commas between them, for example 0,20,40; got '0,ten'",
        ),
        (["--grid", "0,100"], "grid: level 100 is the real image and is never generated"),
        (
            ["--grid", "0,90"],
            "grid: level 90 % leaves t(λ) = 0 denoising steps at 5 inference steps",
        ),
        (["--grid", "-1"], "--grid: -1 is out of range; allowed: 0 to 100"),
    ],
)
def test_a_grid_that_is_none_is_refused(
    surveyed: Run,
    tmp_path: Path,
    words: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(surveyed.folder, tmp_path / "run")
    monkeypatch.setattr(
        sys, "argv", ["discl", "levels", str(folder / "recipe.yaml"), "--out", str(folder), *words]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert told in capsys.readouterr().err


def test_no_source_is_refused(surveyed: Run) -> None:
    with pytest.raises(RecipeError, match="at least one level, source and seed; got 3, 0 and 1"):
        levels(surveyed, sources=0, grid=GRID)
