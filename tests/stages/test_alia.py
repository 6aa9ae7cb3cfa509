"""ALIA's filters on a run, and thresholds of single methods."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from discl.data import decode_image
from discl.errors import RecipeError
from discl.recipe import load_recipe
from discl.spectrum.filter import ClipScorer
from discl.stages.learning import train
from discl.stages.making import filter_spectrum
from discl.stages.samples import kept_images
from discl.workspace import Run, open_run, stored_images


@pytest.fixture
def amended(filtered_run: Path, tmp_path: Path):
    """A copy of the filtered run under a recipe with other values."""
    shutil.copytree(filtered_run, tmp_path / "run")

    def amend(**values: object) -> Run:
        tree = yaml.safe_load((filtered_run / "recipe.yaml").read_text())
        overrides = {key.replace("__", "."): value for key, value in values.items()}
        return open_run(load_recipe(tree, overrides), tmp_path / "run", amend=True)

    return amend


def test_semantic_and_confidence_filter(amended) -> None:
    run = amended(filter__rule="alia", filter__negatives=["bag bag", "a"], train__batch_size=16, train__model__width=4)
    rows = pq.read_table(filter_spectrum(run)).to_pylist()
    names = run.train.class_names
    template = run.recipe.filter.template
    texts = {label: template.replace("{class}", name) for label, name in enumerate(names)} | {4: "bag bag", 5: "a"}
    scorer = ClipScorer(run.recipe.filter.checkpoint, texts)
    images = stored_images(run, [row["id"] for row in rows])
    cosines = scorer.embed([decode_image(images[place]["image"]) for place in range(len(rows))]) @ scorer.text_embeddings.numpy().T
    semantic = cosines[:, 4:].max(1) > cosines[np.arange(len(rows)), [row["label"] for row in rows]]
    assert [row["reason"] == "CLIP prefers a text that fits any picture" for row in rows] == semantic.tolist()
    others = {row["reason"] for row, dropped in zip(rows, semantic, strict=True) if not dropped}
    assert others <= {"", "looks mislabelled", "too easy: the classifier is surer of it than of real images of its class"}
    assert [row["keep"] for row in rows] == [not row["reason"] for row in rows]
    asked = run.path("alia.parquet").stat().st_mtime_ns
    filter_spectrum(run)
    assert run.path("alia.parquet").stat().st_mtime_ns == asked
    filter_spectrum(amended(filter__rule="alia", filter__negatives=["a"], train__batch_size=16, train__model__width=4))
    assert run.path("alia.parquet").stat().st_mtime_ns != asked


def test_alia_does_not_go_with_further_tries(amended) -> None:
    with pytest.raises(RecipeError, match=r"which filter\.rule alia does not go by; set it to 1"):
        amended(filter__rule="alia", spectrum__tries=2)


def test_a_method_may_have_its_own_threshold(amended) -> None:
    scores = pq.read_table(amended().path("filter.parquet"))["clip_similarity"].to_numpy()
    middle = float(np.median(scores))
    discl = {"strategy": "all-levels", "missing": "nearest"}
    methods = {"discl": discl, "same": {**discl, "threshold": -1}, "half": {**discl, "threshold": middle}}
    run = amended(methods=methods, baseline=None, train__batch_size=16, train__steps_per_epoch=2, train__model__width=4)
    assert len(kept_images(run)) == len(kept_images(run, -1)) == len(scores)
    assert len(kept_images(run, middle)) == (scores >= middle).sum() < len(scores)
    train(run)
    marks = {name: yaml.safe_load((run.folder / "train" / name / "method.json").read_text())["fingerprint"] for name in methods}
    assert marks["discl"] == marks["same"] != marks["half"]  # a threshold counts by what it keeps
    weights = {name: (run.folder / "train" / name / "model.safetensors").read_bytes() for name in methods}
    assert weights["discl"] == weights["same"] != weights["half"]
