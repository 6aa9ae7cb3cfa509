"""What users do, from beginning to end, and the examples of the docstrings."""

from __future__ import annotations

import csv
import inspect
import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import discl
from public.test_api import examples

pytestmark = pytest.mark.slow
"""All share one run of the demo, which takes half a minute."""

RUN = Path("runs/fashion-lt")
NOT_RUN = {"run": "takes minutes", "convert_checkpoint": "needs a pickled checkpoint"}
"""Examples that are compiled only; other tests run these functions."""


def test_the_demo_by_the_command_line(inside: Path) -> None:
    """In a folder that was empty before: results of all methods, and a report.

    Python goes on where the command ended.
    """
    results = json.loads((RUN / "results.json").read_text())
    figures = json.dumps(results)
    assert '"ce"' in figures and '"discl"' in figures and '"accuracy"' in figures
    report = (RUN / "report.html").read_text()
    assert "<html" in report and "fashion-lt" in report
    assert "ce-undersampled for discl; ce-balanced for discl-balanced" in report
    before = {path: path.stat().st_mtime_ns for path in RUN.glob("train/*/model.safetensors")}
    assert len(before) == 5
    discl.run_until(discl.open_run(RUN / "recipe.yaml", RUN), "train")
    assert before == {path: path.stat().st_mtime_ns for path in before}, "trained twice"


def test_own_photos_from_a_recipe_to_a_report(inside: Path) -> None:
    tables = discl.read_tables("photos")
    assert tables["train"].class_names == ("Bag", "Trouser")
    assert tables["train"].class_counts.tolist() == [8, 30]
    recipe = discl.load_recipe(
        {
            "name": "photos",
            "data": {"root": "photos"},
            "hard": {"fewer_than": 10},
            "spectrum": {
                "checkpoint": "embedded:fashion-mnist/diffusion",
                "levels": [0, 50],
                "seeds": 1,
                "num_inference_steps": 2,
            },
            "filter": {"checkpoint": "embedded:fashion-mnist/clip", "threshold": -1},
            "train": {
                "epochs": 2,
                "curriculum_epochs": 2,
                "batch_size": 8,
                "image_size": 32,
                "model": {"architecture": "resnet10", "stem": "3x3", "width": 4},
            },
            "methods": {"discl": {"strategy": "diverse-to-specific"}},
        }
    )
    assert isinstance(recipe, discl.Recipe)
    report = discl.run(recipe, "runs/photos")
    assert report == Path("runs/photos/report.html") and report.is_file()
    run = discl.open_run(recipe, "runs/photos")
    hard = int((run.train.labels == 0).sum())
    assert 0 < hard < 8 and len(run.spectrum.ids()) == 2 * hard
    with pytest.raises(discl.RunError, match=r"train\.epochs"):
        discl.run(recipe, "runs/photos", overrides={"train.epochs": 3})


def test_a_spectrum_of_one_photo(inside: Path) -> None:
    model = discl.load_generator("embedded:fashion-mnist/diffusion")
    engine = discl.Engine(model, num_inference_steps=10, guidance_scale=3.0, slots=4)
    levels = [0, 30, 60, 90]
    requests = [discl.Request.of("a photo of a bag", level, "000.png", 32) for level in levels]
    photo = discl.to_square(Image.open("photos/Bag/000.png").convert("RGB"), 32)
    made = {
        request.level: pixels for request, pixels in engine.generate(requests, lambda name: photo)
    }
    assert sorted(made) == levels
    real = photo.astype(float)
    distances = [np.abs(made[level] - real).mean() for level in levels]
    assert distances[-1] == min(distances), "90 % is nearest to the photo"


def test_a_curriculum_in_a_plain_loop(inside: Path) -> None:
    torch.manual_seed(0)
    dataset = discl.SpectrumDataset.of_run(RUN, size=32)

    def make() -> discl.Curriculum:
        return discl.Curriculum(
            dataset, "adaptive", curriculum_epochs=4, probe_every=2, samples=64, guidance_images=1
        )

    curriculum = make()
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, len(dataset.class_names)))
    optimizer = torch.optim.Adam(model.parameters())
    loader = DataLoader(dataset, 16, sampler=curriculum)
    drawn = []
    for epoch in range(5):
        curriculum.begin(epoch, model)
        for images, labels, levels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            drawn.append((epoch, set(levels.tolist())))
        curriculum.end(model)
    seen = [set().union(*(levels for at, levels in drawn if at == epoch)) for epoch in range(5)]
    assert seen[0] == seen[2] == seen[4] == {100}, "probes and the last epoch are real only"
    chosen = [record["levels"][0] for record in curriculum.history]
    assert [seen[1], seen[3]] == [{100, level} for level in chosen] and set(chosen) <= {0, 50}
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    assert resumed.epoch == 5 and resumed.history == curriculum.history


def test_predictions_for_new_images(inside: Path, tmp_path: Path) -> None:
    path = discl.predict(RUN, "photos", tmp_path / "predictions.csv", method="discl")
    with path.open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 38
    model, config = discl.load_classifier(RUN / "train" / "discl")
    assert not model.training
    for row in rows:
        probabilities = [float(row[name]) for name in config.class_names]
        assert sum(probabilities) == pytest.approx(1, abs=1e-3)
        assert row["prediction"] == config.class_names[int(np.argmax(probabilities))]


@pytest.mark.parametrize("name", sorted({*discl.__all__} - {*NOT_RUN}))
def test_an_example_runs(
    name: str, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(workspace, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    for number, block in enumerate(examples(inspect.getdoc(getattr(discl, name)) or "")):
        file = tmp_path / f"example_{number}.py"
        file.write_text(block)
        runpy.run_path(str(file), run_name="example")
