"""The filter by difficulty on a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from discl.data import ImageTable
from discl.errors import RecipeError
from discl.run_folder.run import Run
from discl.stages import difficulty
from discl.stages.filter import filter_spectrum
from discl.stages.provenance import describe_making


def test_the_filter_keeps_what_is_neither_too_hard_nor_too_easy(
    amended: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classifier answers by the level of an image; its training has not seen the source."""
    rows = pq.read_table(amended().path("filter.parquet")).to_pylist()
    edits: dict[str, Any] = {row["id"]: row for row in rows}
    middle = float(np.median([row["clip_similarity"] for row in rows]))
    scored: list[str] = []

    def answers(
        table: ImageTable, fitted: list[int], judged: list[int], *_: Any, **__: Any
    ) -> np.ndarray:
        """In proportion to the counts, so that the even probability is as written here."""
        seen = {table.ids[row] for row in fitted}
        counts = np.bincount(table.labels[fitted], minlength=len(table.class_names))
        result = []
        for row in judged:
            edit = edits[table.ids[row]]
            assert edit["source_id"] not in seen and not seen & edits.keys()
            assert table.labels[row] == edit["label"]
            scored.append(edit["id"])
            even = np.full(4, (1 - (own := chosen[edit["level"]])) / 3)
            even[edit["label"]] = own
            result.append(even * counts / (even * counts).sum())
        return np.array(result)

    chosen = {0: 0.03, 50: 0.6}
    monkeypatch.setattr(difficulty, "fit_classifier", answers)
    values: dict[str, Any] = {"filter__rule": "difficulty", "filter__threshold": middle}
    run = amended(**values)
    verdicts = pq.read_table(filter_spectrum(run)).to_pylist()
    passed = {row["id"] for row in rows if row["clip_similarity"] >= middle}
    assert sorted(scored) == sorted(passed) and 0 < len(passed) < len(rows)
    for row in verdicts:
        if row["id"] not in passed:
            assert row["reason"].startswith("clip_similarity")
        elif row["level"] == 0:
            assert row["reason"] == "too hard: probability 0.030 of its class < 0.05"
        else:
            assert row["keep"]
    assert "from 0.05 to 0.95" in str(describe_making(run.recipe, run.generator, run.size))

    scored.clear()
    verdicts = pq.read_table(
        filter_spectrum(amended(**values, filter__band=[0.0, 0.5]))
    ).to_pylist()
    assert not scored  # another band needs no other classifier
    assert {row["reason"] for row in verdicts if row["id"] in passed and row["level"] == 50} == {
        "too easy: probability 0.600 of its class > 0.5"
    }
    filter_spectrum(amended(**values, train__batch_size=16))
    assert sorted(scored) == sorted(passed)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"filter__band": [0.1, 0.9]}, r"filter\.band = \[0\.1, 0\.9\] needs .*rule: difficulty"),
        (
            {"filter__band": [0.9, 0.1], "filter__rule": "difficulty"},
            r"filter\.band = \[0\.9, 0\.1\] keeps nothing",
        ),
        ({"filter__band": [0.1, 1.5], "filter__rule": "difficulty"}, r"filter\.band"),
        ({"spectrum__tries": 2, "filter__rule": "difficulty"}, r"spectrum\.tries .*set it to 1"),
    ],
)
def test_bands_that_cannot_be(
    amended: Callable[..., Run], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        amended(**values)
