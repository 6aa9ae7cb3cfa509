"""ALIA's filters on a run, and thresholds of single methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from discl.data import ImageTable, decode_image
from discl.errors import RecipeError
from discl.run_folder.images import stored_images
from discl.spectrum.clip_filter import ClipScorer
from discl.stages import alia
from discl.stages.filter import filter_spectrum
from discl.stages.sample_pool import kept_images
from discl.stages.train import train


@pytest.mark.slow
def test_semantic_and_confidence_filter(amended, monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier answers by the name of an image.

    It is surer of the edits at 50 % than of real images, and sure of the wrong class at 0 % where
    a source ends on 1.
    """
    asked_for: list[tuple[int, int]] = []

    def answers(
        table: ImageTable, fitted: list[int], judged: list[int], *_: Any, **__: Any
    ) -> np.ndarray:
        asked_for.append((len(fitted), len(judged)))
        found = np.full((len(judged), 4), 0.1)
        for place, row in enumerate(judged):
            edit = of_edit.get(table.ids[row])
            label = table.labels[row]
            wrong = edit is not None and edit["level"] == 0 and edit["source_id"].endswith("1.png")
            found[place, (label + 1) % 4 if wrong else label] = (
                0.6 if edit is None else 0.5 if edit["level"] == 0 and not wrong else 0.7
            )
        return found

    of_edit: dict[str, Any] = {
        row["id"]: row for row in pq.read_table(amended().path("filter.parquet")).to_pylist()
    }
    monkeypatch.setattr(alia, "fit_classifier", answers)
    run = amended()
    texts = {
        label: run.recipe.filter.template.replace("{class}", name)
        for label, name in enumerate(run.train.class_names)
    }
    scorer = ClipScorer(run.recipe.filter.checkpoint, texts)
    images = stored_images(run, list(of_edit))
    cosines = (
        scorer.embed([decode_image(images[place]["image"]) for place in range(len(of_edit))])
        @ scorer.text_embeddings.numpy().T
    )
    own = cosines[np.arange(len(of_edit)), [edit["label"] for edit in of_edit.values()]]
    negative = next(
        label for label in texts if 0 < (cosines[:, label] > own).sum() < len(of_edit)
    )  # some prefer it, some do not
    semantic = cosines[:, negative] > own
    run = amended(
        filter__rule="alia",
        filter__negatives=[texts[negative]],
        train__batch_size=16,
        train__model__width=4,
    )
    rows = pq.read_table(filter_spectrum(run)).to_pylist()
    assert [row["id"] for row in rows] == list(of_edit)
    assert [
        row["reason"] == "CLIP prefers a text that fits any picture" for row in rows
    ] == semantic.tolist()
    assert asked_for == [
        (40, 12 + 32)
    ]  # fitted on the training images, asked about validation and the edits
    for row, dropped in zip(rows, semantic, strict=True):
        easy, wrong = row["level"] == 50, row["source_id"].endswith("1.png")
        expected = (
            "too easy: the classifier is surer of it than of real images of its class"
            if easy
            else "looks mislabelled"
            if wrong
            else ""
        )
        assert dropped or row["reason"] == expected
    assert [row["keep"] for row in rows] == [not row["reason"] for row in rows] and {
        row["keep"] for row in rows
    } == {True, False}
    asked = run.path("alia.parquet").stat().st_mtime_ns
    filter_spectrum(run)
    assert run.path("alia.parquet").stat().st_mtime_ns == asked
    filter_spectrum(
        amended(
            filter__rule="alia",
            filter__negatives=["a"],
            train__batch_size=16,
            train__model__width=4,
        )
    )
    assert run.path("alia.parquet").stat().st_mtime_ns != asked


def test_one_positive_text_may_stand_for_all_classes(
    amended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        alia,
        "fit_classifier",
        lambda table, fitted, judged, *_, **__: np.full((len(judged), 4), 0.25),
    )
    values = {"filter__rule": "alia", "train__batch_size": 16, "train__model__width": 4}
    same = amended(**values, filter__positive="a wildlife photo", filter__negatives=["an image"])
    rows = pq.read_table(filter_spectrum(same)).to_pylist()
    texts = {0: "a wildlife photo", 1: "an image"}
    scorer = ClipScorer(same.recipe.filter.checkpoint, texts)
    images = stored_images(same, [row["id"] for row in rows])
    cosines = (
        scorer.embed([decode_image(images[place]["image"]) for place in range(len(rows))])
        @ scorer.text_embeddings.numpy().T
    )
    semantic = ["CLIP prefers" in row["reason"] for row in rows]
    assert semantic == (cosines[:, 1] > cosines[:, 0]).tolist()


def test_a_positive_text_is_for_alia_alone(amended) -> None:
    with pytest.raises(RecipeError, match=r"filter\.positive .*filter\.rule: alia"):
        amended(filter__positive="a wildlife photo")


def test_alia_does_not_go_with_further_tries(amended) -> None:
    with pytest.raises(RecipeError, match=r"spectrum\.tries .*set it to 1"):
        amended(filter__rule="alia", spectrum__tries=2)


def test_a_method_may_have_its_own_threshold(amended) -> None:
    scores = pq.read_table(amended().path("filter.parquet"))["clip_similarity"].to_numpy()
    middle = float(np.median(scores))
    discl = {"strategy": "all-levels", "missing": "nearest"}
    methods = {
        "discl": discl,
        "same": {**discl, "threshold": -1},
        "half": {**discl, "threshold": middle},
    }
    run = amended(
        methods=methods,
        baseline=None,
        train__batch_size=16,
        train__steps_per_epoch=2,
        train__model__width=4,
    )
    assert len(kept_images(run)) == len(kept_images(run, -1)) == len(scores)
    assert len(kept_images(run, middle)) == (scores >= middle).sum() < len(scores)
    train(run)
    marks = {
        name: yaml.safe_load((run.folder / "train" / name / "method.json").read_text())[
            "fingerprint"
        ]
        for name in methods
    }
    assert marks["discl"] == marks["same"] != marks["half"]  # a threshold counts by what it keeps
    weights = {
        name: (run.folder / "train" / name / "model.safetensors").read_bytes() for name in methods
    }
    assert weights["discl"] == weights["same"] != weights["half"]
