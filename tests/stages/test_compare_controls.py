"""Differences from controls, on predictions written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from discl.evaluation.comparison import Entry, as_cells
from discl.recipe import Recipe, load_recipe
from discl.run_folder import paths
from discl.stages.compare import add_controls, control_columns
from discl.utils.stored import save_tensors

LABELS = np.repeat([0, 1], 4)
RIGHT = {"ce": 8, "ce+la": 6, "under": 4, "discl": 5, "discl+la": 7}
"""Of the first images of LABELS, so many are predicted right."""
PLAIN = [("test", "few", "few"), ("test", "accuracy", "all")]
OOD = [
    ("test", "macro_f1", "ID macro F1"),
    ("test-ood", "macro_f1", "OOD macro F1"),
    ("test", "accuracy", "ID top-1"),
]
METHODS = {
    "ce": {"strategy": "real-only"},
    "under": {"strategy": "real-only", "undersample": True},
    "discl": {"strategy": "diverse-to-specific"},
}


def make_recipe(methods: dict[str, Any]) -> Recipe:
    return load_recipe(
        {
            "name": "small",
            "data": {"root": "images"},
            "spectrum": {"checkpoint": "sd", "levels": [0]},
            "filter": {"checkpoint": "clip", "threshold": 0.2},
            "methods": methods,
        }
    )


def make_run(folder: Path, scores: dict[str, float], splits: tuple[str, ...]) -> Any:
    """What `add_controls` reads of a run; every metric of a row is its score on validation."""
    folder.mkdir()
    results: dict[str, Any] = {}
    predictions: dict[str, torch.Tensor] = {}
    for row, right in RIGHT.items():
        hit = np.arange(8) < right
        shown = {"accuracy": right / 8, "few": hit[LABELS == 1].mean(), "macro_f1": right / 8}
        chosen = dict.fromkeys(shown, scores[row]) if row in scores else shown
        results[row] = {split: chosen if "validation" in split else shown for split in splits}
        for split in splits:
            predictions[f"{row}/{split}"] = torch.from_numpy(np.where(hit, LABELS, 1 - LABELS))
    (folder / paths.RESULTS).write_text(json.dumps(results))
    save_tensors(predictions, folder / paths.PREDICTIONS)
    return SimpleNamespace(
        path=lambda name: folder / name,
        tables={split: SimpleNamespace(labels=LABELS) for split in splits},
        groups={"few": [1]},
    )


ENTRIES = [Entry(row, {"few": [0.5], "all": [0.5]}) for row in RIGHT]
SCORES = {"ce": 0.1, "ce+la": 0.9, "under": 0.2, "discl": 1.0, "discl+la": 1.0}


def test_few_and_overall_by_hand(tmp_path: Path) -> None:
    """Few: 1 of 4 for discl, 0 of 4 for the same mixture. Overall: 5 of 8 less 6 of 8."""
    run = make_run(tmp_path / "run", SCORES, ("validation", "test"))
    entries, controls = add_controls(ENTRIES, make_recipe(METHODS), [run], PLAIN)
    few, overall = entries[3].controls.values()
    assert few is not None and overall is not None and controls is not None
    assert (few.difference, overall.difference) == pytest.approx((25, -12.5))
    assert few.low <= 25 <= few.high and overall.low <= -12.5 <= overall.high
    assert controls.best == "ce+la"
    adjusted = list(entries[4].controls.values())  # the recipe's control has no adjusted row
    assert adjusted[0] is None and adjusted[1] is not None
    heading, rows = as_cells(entries, ["few", "all"])
    assert heading[3:] == [
        "few − same mixture without synthetic images [95 %]",
        "overall − best row without synthetic images [95 %]",
    ]
    assert [row[3:] for row in rows[:3]] == [["–", "–"]] * 3 and rows[4][3] == "–"


def test_the_best_row_is_chosen_on_test_without_validation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SCORES, ("test",))
    _, controls = add_controls(ENTRIES, make_recipe(METHODS), [run], PLAIN)
    assert controls is not None and controls.best == "ce"


def test_ood_tables_compare_by_ood_macro_f1(tmp_path: Path) -> None:
    splits = ("validation", "validation-ood", "test", "test-ood")
    run = make_run(tmp_path / "run", SCORES, splits)
    entries, controls = add_controls(ENTRIES, make_recipe(METHODS), [run], OOD)
    assert list(entries[3].controls) == [
        "OOD macro F1 − same mixture without synthetic images",
        "OOD macro F1 − best row without synthetic images",
    ]
    assert controls is not None and "OOD macro F1 on validation-ood." in controls.notes[-1]
    assert all(each is not None for each in entries[3].controls.values())


def test_columns_of_the_controls() -> None:
    assert control_columns(PLAIN) == tuple(PLAIN)
    assert control_columns(OOD) == (OOD[1], OOD[1])
    assert control_columns(PLAIN[1:]) == (PLAIN[1], PLAIN[1])


def test_real_images_alone_change_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SCORES, ("test",))
    recipe = make_recipe({name: METHODS[name] for name in ("ce", "under")})
    entries, controls = add_controls(ENTRIES[:3], recipe, [run], PLAIN)
    assert controls is None and entries == ENTRIES[:3]
