"""What a method cannot be trained on is said before any is trained; what a classifier depends on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

import discl
from discl.curriculum.processes import Processes
from discl.errors import TrainingError
from discl.stages import learning
from discl.stages.samples import kept_images
from discl.workspace import Run

SMALL = {
    "train.batch_size": 8, "train.steps_per_epoch": 4, "train.image_size": 16,
    "train.model": {"architecture": "resnet10", "width": 4, "stem": "3x3"}, "runtime.threads": 1,
}  # fmt: skip
REAL_ONLY = {"first": {"strategy": "real-only"}}


@pytest.fixture
def folder(filtered_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has come as far as the filter, in which training any method fails."""

    def trained(*_: Any) -> None:
        raise AssertionError("a method was trained")

    monkeypatch.setattr(learning, "_train_method", trained)
    return shutil.copytree(filtered_run, tmp_path / "run")


def with_methods(folder: Path, methods: dict[str, Any], **values: Any) -> Run:
    return Run(discl.load_recipe(folder / "recipe.yaml", {**SMALL, "methods": REAL_ONLY | methods, **values}), folder)


def drop_class(folder: Path, label: int, level: int) -> None:
    """Takes the images of a class at a level out of what the filter kept."""
    verdicts = pq.read_table(folder / "filter.parquet")
    dropped = pc.and_(pc.equal(verdicts["label"], label), pc.equal(verdicts["level"], level))
    kept = pc.and_(verdicts["keep"], pc.invert(dropped))
    place = verdicts.schema.get_field_index("keep")
    pq.write_table(
        verdicts.set_column(place, "keep", kept.combine_chunks() if isinstance(kept, pa.ChunkedArray) else kept), folder / "filter.parquet"
    )


@pytest.mark.parametrize("strategy", ["diverse-to-specific", "adaptive", "adaptive-per-class", "bandit"])
def test_a_class_without_images_at_a_later_level_stops_before_any_training(folder: Path, strategy: str) -> None:
    drop_class(folder, 3, 50)
    with pytest.raises(TrainingError, match=r"methods\.late: 1 class without .*: 'hat' at 50 %\. Lower .* Nothing was trained"):
        learning.train(with_methods(folder, {"late": {"strategy": strategy, "guidance_images": 4}}))
    assert not (folder / "train").exists()


@pytest.mark.parametrize(
    "method", [{"strategy": "all-levels"}, {"strategy": "text-only"}, {"strategy": "diverse-to-specific", "missing": "nearest"}]
)
def test_a_level_that_is_not_come_to_alone_stops_nothing(folder: Path, method: dict[str, Any]) -> None:
    drop_class(folder, 3, 50)
    with pytest.raises(AssertionError, match="a method was trained"):
        learning.train(with_methods(folder, {"late": method}))


def test_rows_probe_and_processes_are_checked_before_any_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {"second": {"train": {"batch_size": 64}}}
    with pytest.raises(TrainingError, match=r"methods\.second: train\.batch_size = 64 exceeds the 40 real images"):
        learning.train(with_methods(folder, wide))
    long = {"second": {"strategy": "adaptive", "guidance_images": 4, "probe_samples": 32}}
    with pytest.raises(TrainingError, match=r"methods\.second: the probe of 32 samples takes 4 of the epoch's 4 steps"):
        learning.train(with_methods(folder, long))
    monkeypatch.setattr(learning, "current_processes", lambda: Processes(0, 3))
    with pytest.raises(TrainingError, match=r"methods\.first: train\.batch_size = 8 cannot be divided evenly into 3 parts"):
        learning.train(with_methods(folder, {}))
    assert not (folder / "train").exists()


def test_names_for_prompts_make_another_clip_but_no_other_network(filtered_run: Path, tiny_clip: Path) -> None:
    def fingerprints(**values: Any) -> list[str]:
        clip = {"architecture": "clip", "checkpoint": str(tiny_clip)}
        run = Run(
            discl.load_recipe(filtered_run / "recipe.yaml", {"methods": REAL_ONLY | {"clip": {"train": {"model": clip}}}, **values}),
            filtered_run,
        )
        kept = kept_images(run)
        return [learning._fingerprint(run, name, method, kept) for name, method in run.recipe.methods.items()]

    plain, named = fingerprints(), fingerprints(**{"prompts.names": {"coat": "warm winter coat"}})
    assert plain[0] == named[0] and plain[1] != named[1]
    assert np.unique([*plain, *named]).size == 3


def test_a_classifier_goes_by_its_checkpoints_content_not_its_place(filtered_run: Path, tiny_clip: Path, tmp_path: Path) -> None:
    def fingerprints(checkpoint: Path) -> list[str]:
        clip = {"architecture": "clip", "checkpoint": str(checkpoint)}
        methods = {"own": {"strategy": "real-only", "train": {"model": clip}}}
        run = Run(discl.load_recipe(filtered_run / "recipe.yaml", {"methods": methods, "baseline": None}), filtered_run)
        return [learning._fingerprint(run, name, method, kept_images(run)) for name, method in run.recipe.methods.items()]

    moved, other = (shutil.copytree(tiny_clip, tmp_path / name) for name in ("moved", "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 if name == "logit_scale" else tensor for name, tensor in weights.items()}, other / "model.safetensors")
    assert fingerprints(moved) == fingerprints(tiny_clip) != fingerprints(other)
