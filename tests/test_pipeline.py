"""All stages on tiny real data: from drawings to a report, killed and resumed, and amended."""

from __future__ import annotations

import io
import json
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image, ImageDraw
from safetensors.torch import load_file

import discl
from discl import pipeline
from discl.errors import DataError, DisclError, RecipeError, RunError, TrainingError
from discl.models.classifier import load_classifier
from discl.pipeline import STAGES, results_table, run_until
from discl.recipe import validate
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
from discl.spectrum.models.stable_diffusion import StableDiffusion
from discl.spectrum.store import Shards
from discl.stages import compare, sample_pool
from discl.stages import engine as engine_stage
from discl.stages import evaluate as evaluate_stage
from discl.stages import hard as hard_stage
from discl.stages import pending as pending_stage
from discl.stages import plan as plan_stage
from discl.stages import prepare_data as prepare_data_stage
from discl.stages import train as train_stage
from discl.stages import trained as trained_stage
from discl.training import loop
from discl.training.checkpoint import read_history
from helpers.commands import Command

CLASSES = ("bag", "boot", "coat", "hat")
COUNTS = {"train": (20, 12, 5, 3), "validation": (4, 4, 4, 4), "test": (3, 3, 3, 3)}
HARD = 5 + 3
METHODS = ("ce", "balanced", "discl")
ROWS = {"ce", "ce+la", "balanced", "discl", "discl+la"}

Tree = dict[str, Any]


class Killed(Exception):
    """Stands for the end of a process."""


def draw_picture(label: int, split: str, index: int) -> Image.Image:
    """A 32×32 drawing: the shape shows the class, the noise makes every picture differ."""
    generator = np.random.default_rng([label, len(split), index])
    image = Image.fromarray(generator.integers(0, 120, (32, 32, 3)).astype(np.uint8))
    left, top = generator.integers(2, 10, 2).tolist()
    box, colour = (left, top, left + 18, top + 18), tuple(generator.integers(150, 256, 3).tolist())
    pen = ImageDraw.Draw(image)
    if label == 3:
        pen.arc(box, 0, 200, fill=colour)
    else:
        [pen.rectangle, pen.ellipse, pen.line][label](box, fill=colour)
    return image


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, tiny_diffusion: Path, tiny_clip: Path) -> Tree:
    """A recipe for 40 training images; 8 coats and hats are rare, and the filter keeps all."""
    root = tmp_path_factory.mktemp("data")
    for split, counts in COUNTS.items():
        for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                draw_picture(label, split, index).save(folder / f"{index:02d}.png")
    return {
        "name": "tiny",
        "data": {"root": str(root)},
        "groups": {"many": 15, "few": 6},
        "hard": {"fewer_than": 6},
        "spectrum": {
            "checkpoint": str(tiny_diffusion),
            "levels": [0, 50],
            "seeds": 2,
            "num_inference_steps": 4,
        },
        "filter": {"checkpoint": str(tiny_clip), "threshold": -1},
        "train": {
            "epochs": 3,
            "curriculum_epochs": 2,
            "batch_size": 8,
            "steps_per_epoch": 4,
            "image_size": 16,
            "resize": 18,
            "augment": ["random-crop", "flip"],
            "model": {"architecture": "resnet10", "width": 8, "stem": "3x3"},
            "precision": "float32",
        },
        "methods": {
            "ce": {"strategy": "real-only"},
            "balanced": {"strategy": "real-only", "objective": "balanced-softmax"},
            "discl": {"strategy": "diverse-to-specific"},
        },
        "evaluate": {"logit_adjustment": [0.25, 1.0, 2.0], "worst_k": [1, 2]},
        "runtime": {"device": "cpu", "threads": 1, "slots": 2, "shard_rows": 12},
    }


@pytest.fixture(scope="module")
def finished(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped. Tests that change a run work on a copy."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert discl.run(tree, folder) == folder / "report.html"
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def changed(tree: Tree, **values: Any) -> Tree:
    """A recipe in which the values of dotted keys, with `__` for the dot, are replaced."""
    result = json.loads(json.dumps(tree))
    for key, value in values.items():
        *above, last = key.split("__")
        branch = result
        for name in above:
            branch = branch[name]
        branch[last] = value
    return result


def images(folder: Path) -> dict[str, bytes]:
    """`{id: encoded picture}`; fails where one lies in the store twice."""
    rows = [
        row
        for shard in sorted(folder.glob("spectrum/part-*.parquet"))
        for row in pq.read_table(shard).to_pylist()
    ]
    assert not [name for name, count in Counter(row["id"] for row in rows).items() if count > 1]
    return {row["id"]: row["image"]["bytes"] for row in rows}


def scores(folder: Path) -> dict[str, float]:
    rows = [
        row
        for shard in sorted(folder.glob("scores/part-*.parquet"))
        for row in pq.read_table(shard).to_pylist()
    ]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["clip_similarity"] for row in rows}


def stamps(folder: Path, *patterns: str) -> dict[str, tuple[int, bytes]]:
    """`{file: (when it was written, its bytes)}`."""
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.read_bytes())
        for path in found
    }


def assert_same_run(folder: Path, reference: Path) -> None:
    """Same plan, images, verdicts, weights and figures, bit for bit; scores up to rounding."""
    for name in ("data.parquet", "hard.parquet", "plan.parquet", "results.json", "recipe.yaml"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    assert images(folder) == images(reference)
    assert scores(folder) == pytest.approx(scores(reference), abs=1e-6)
    verdicts = [
        pq.read_table(each / "filter.parquet", columns=["id", "keep"]).to_pylist()
        for each in (folder, reference)
    ]
    assert verdicts[0] == verdicts[1]
    for method in METHODS:
        for name in ("model.safetensors", "config.json", "logits.safetensors", "method.json"):
            assert (folder / "train" / method / name).read_bytes() == (
                reference / "train" / method / name
            ).read_bytes(), (method, name)
        histories = [
            read_history(each / "train" / method / "history.jsonl") for each in (folder, reference)
        ]
        clocks = {"seconds": 0, "processor_seconds": 0}
        assert [record | clocks for record in histories[0]] == [
            record | clocks for record in histories[1]
        ]
    assert not [
        path
        for path in folder.rglob("*")
        if path.name.startswith(".part-") or path.suffix == ".new"
    ]


@pytest.fixture
def no_phase_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a generator nor a CLIP may be loaded."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing was to be generated or scored")

    monkeypatch.setattr(engine_stage, "load_generator", refuse)
    monkeypatch.setattr(pending_stage, "ClipScorer", refuse)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods that are trained while a test runs."""
    names: list[str] = []
    train = train_stage._train_method
    monkeypatch.setattr(
        train_stage,
        "_train_method",
        lambda run, name, *rest: (names.append(name), train(run, name, *rest)),
    )
    return names


def test_every_stage_leaves_its_file(finished: Path) -> None:
    tables = {"data.parquet", "hard.parquet", "plan.parquet", "filter.parquet"}
    expected = tables | {
        "recipe.yaml",
        "environment.json",
        "results.json",
        "predictions.safetensors",
        "report.html",
    }
    expected |= {
        f"train/{method}/{name}"
        for method in METHODS
        for name in (
            "model.safetensors",
            "config.json",
            "history.jsonl",
            "method.json",
            "logits.safetensors",
        )
    }
    found = {
        path.relative_to(finished).as_posix() for path in finished.rglob("*") if path.is_file()
    }
    shards = {name for name in found if name.startswith(("spectrum/part-", "scores/part-"))}
    assert {name.split("/")[0] for name in shards} == {"spectrum", "scores"}
    assert {name for name in found - shards if not name.startswith("cache/")} == expected
    assert (finished / "report.html").stat().st_size > 0


def test_what_was_asked_for_was_made(finished: Path) -> None:
    """8 rare images × 2 seeds × 2 levels, 32×32 each; pictures differ between levels."""
    hard = pq.read_table(finished / "hard.parquet").to_pylist()
    assert Counter(row["id"].split("/")[1] for row in hard) == {"coat": 5, "hat": 3}
    plan = pq.read_table(finished / "plan.parquet").to_pylist()
    assert len(plan) == HARD * 2 * 2
    stored = images(finished)
    assert set(stored) == {row["id"] for row in plan}
    assert all(Image.open(io.BytesIO(data)).size == (32, 32) for data in stored.values())
    assert len(set(stored.values())) == len(stored)
    verdicts = pq.read_table(finished / "filter.parquet").to_pylist()
    assert [row["id"] for row in verdicts] == [row["id"] for row in plan]
    assert all(row["keep"] and -1 <= row["clip_similarity"] <= 1 for row in verdicts)


def test_the_curriculum_was_followed(finished: Path) -> None:
    """One epoch at 0 %, one at 50 %, then real images only."""
    levels = {
        method: [
            record["levels"]
            for record in read_history(finished / "train" / method / "history.jsonl")
        ]
        for method in METHODS
    }
    assert levels == {"ce": [[], [], []], "balanced": [[], [], []], "discl": [[0], [50], []]}
    ce, discl_ = (
        read_history(finished / "train" / method / "history.jsonl") for method in ("ce", "discl")
    )
    assert all(record["synthetic_share"] == 0 for record in ce)
    assert [record["synthetic_share"] > 0 for record in discl_] == [True, True, False]
    assert [record["effective_scale"] for record in discl_] == [
        2,
        2,
        0,
    ]  # both kept images of every source, of the 3 asked for
    assert {record["samples"] for record in ce + discl_} == {32}


def test_results_hold_every_method_and_split(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert set(results) == ROWS
    for name, splits in results.items():
        assert set(splits) == {"validation", "test"}
        for split, figures in splits.items():
            expected = {
                "images",
                "accuracy",
                "macro_f1",
                "calibration_error",
                "many",
                "medium",
                "few",
                "worst_1",
                "worst_2",
                "per_class",
            }
            assert set(figures) == expected | ({"prior", "tau"} if name.endswith("+la") else set())
            assert figures["images"] == sum(COUNTS[split])
            assert set(figures["per_class"]) == set(CLASSES)
            assert figures["accuracy"] == pytest.approx(
                np.mean(list(figures["per_class"].values()))
            )
            assert figures["few"] == pytest.approx(
                np.mean([figures["per_class"]["coat"], figures["per_class"]["hat"]])
            )


def test_logit_adjustment_is_chosen_on_validation(finished: Path, tree: Tree) -> None:
    """By hand: the τ and prior most accurate on validation, the first of equals, on test."""
    results = json.loads((finished / "results.json").read_text())
    for method in ("ce", "discl"):
        history = read_history(finished / "train" / method / "history.jsonl")
        drawn = np.maximum(np.sum([record["class_samples"] for record in history], 0), 1)
        logits = {
            split: tensor.numpy()
            for split, tensor in load_file(
                finished / "train" / method / "logits.safetensors"
            ).items()
        }
        labels = {split: np.repeat(range(4), COUNTS[split]) for split in logits}
        best: tuple[float, str, float] = (-1.0, "", 0.0)
        for prior, counts in (("real", np.array(COUNTS["train"])), ("effective", drawn)):
            for tau in tree["evaluate"]["logit_adjustment"]:
                shift = tau * np.log(counts / counts.sum())
                accuracy = {
                    split: ((rows - shift).argmax(1) == labels[split]).mean()
                    for split, rows in logits.items()
                }
                if accuracy["validation"] > best[0]:
                    best, expected = (accuracy["validation"], prior, tau), accuracy
        for split, figures in results[f"{method}+la"].items():
            assert (figures["prior"], figures["tau"]) == best[1:]
            assert figures["accuracy"] == pytest.approx(expected[split])


def test_logits_are_those_of_the_stored_classifier(finished: Path, tree: Tree) -> None:
    logits = load_file(finished / "train" / "discl" / "logits.safetensors")["test"]
    model, config = load_classifier(finished / "train" / "discl")
    assert config.class_names == CLASSES
    table = open_run(validate(tree), finished).tables["test"]
    for row in (0, 7):
        square = (
            np.asarray(
                table.image(row).resize((18, 18), Image.Resampling.LANCZOS), np.float32
            ).transpose(2, 0, 1)[:, 1:17, 1:17]
            / 255
        )
        mean, std = (
            np.array(values, np.float32)[:, None, None] for values in (config.mean, config.std)
        )
        with torch.inference_mode():
            expected = model(torch.from_numpy((square - mean) / std)[None])
        torch.testing.assert_close(logits[row : row + 1], expected, atol=1e-4, rtol=1e-4)


def test_results_as_a_table(finished: Path, tree: Tree) -> None:
    table = results_table(open_run(validate(tree), finished)).splitlines()
    assert table[0].split() == ["on", "test,", "%", "all", "many", "medium", "few", "F1", "ECE"]
    assert {line.split()[0] for line in table[1:]} == ROWS
    assert all(len(line.split()) == 7 for line in table[1:])


def test_a_second_call_does_nothing_anew(
    copied: Path,
    tree: Tree,
    no_phase_one: None,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(StableDiffusion, "predict", lambda *_: pytest.fail("a UNet call"))
    monkeypatch.setattr(
        train_stage,
        "predict_logits",
        lambda *_, **__: pytest.fail("a classifier was measured again"),
    )
    kept = stamps(copied, "data.parquet", "hard.parquet", "spectrum/*", "scores/*", "train/*/*")
    everything = {
        name: data
        for name, (_, data) in stamps(copied, "*", "spectrum/*", "scores/*", "train/*/*").items()
    }
    discl.run(tree, copied)
    assert (
        stamps(copied, "data.parquet", "hard.parquet", "spectrum/*", "scores/*", "train/*/*")
        == kept
    )
    after = {
        name: data
        for name, (_, data) in stamps(copied, "*", "spectrum/*", "scores/*", "train/*/*").items()
    }
    assert {name for name in everything if after[name] != everything[name]} <= {"report.html"}
    assert set(after) == set(everything)
    assert trained == []


def test_runtime_may_differ_without_amend(
    copied: Path, tree: Tree, no_phase_one: None, trained: list[str]
) -> None:
    discl.run(changed(tree, runtime__slots=7, runtime__shard_rows=3), copied)
    assert trained == []


def test_a_checkpoint_may_have_been_copied_elsewhere(
    copied: Path,
    tree: Tree,
    tiny_diffusion: Path,
    tiny_clip: Path,
    tmp_path: Path,
    no_phase_one: None,
    trained: list[str],
) -> None:
    kept = ("data.parquet", "hard.parquet", "spectrum/*", "scores/*", "train/*/*")
    before = stamps(copied, *kept)
    places = {"spectrum__checkpoint": tiny_diffusion, "filter__checkpoint": tiny_clip}
    moved = {
        key: str(shutil.copytree(folder, tmp_path / folder.name, symlinks=True))
        for key, folder in places.items()
    }
    discl.run(changed(tree, **moved), copied)
    assert stamps(copied, *kept) == before and trained == []
    other = shutil.copytree(tiny_clip, tmp_path / "other", symlinks=True)
    (other / "another.json").write_text("{}")
    with pytest.raises(RunError, match=r"made with another recipe:\n  filter\.checkpoint: "):
        discl.run(changed(tree, filter__checkpoint=str(other)), copied)


def test_another_recipe_is_refused_with_what_differs(copied: Path, tree: Tree) -> None:
    before = stamps(copied, "*", "spectrum/*", "train/*/*")
    with pytest.raises(
        RunError, match=r"made with another recipe:\n  filter\.threshold: -1\.0 -> 0\.3\n"
    ) as raised:
        discl.run(changed(tree, filter__threshold=0.3), copied)
    assert "--amend" in str(raised.value)
    assert stamps(copied, "*", "spectrum/*", "train/*/*") == before


def test_another_threshold_rewrites_no_image_and_no_score(
    copied: Path, tree: Tree, no_phase_one: None, trained: list[str]
) -> None:
    """Only the method that uses synthetic images is trained anew, on those that are still kept."""
    verdicts = pq.read_table(copied / "filter.parquet").to_pylist()
    cells = {(row["label"], row["level"]) for row in verdicts}
    best = [
        max(row["clip_similarity"] for row in verdicts if (row["label"], row["level"]) == cell)
        for cell in cells
    ]
    threshold = min(best) - 1e-4  # every class keeps an image at every level
    patterns = ("spectrum/*", "scores/*", "train/ce/*", "train/balanced/*")
    before, plan = stamps(copied, *patterns), (copied / "plan.parquet").read_bytes()
    discl_before = (copied / "train" / "discl" / "model.safetensors").read_bytes()
    discl.run(changed(tree, filter__threshold=threshold), copied, amend=True)
    assert stamps(copied, *patterns) == before
    assert (copied / "plan.parquet").read_bytes() == plan
    after = pq.read_table(copied / "filter.parquet").to_pylist()
    assert 0 < sum(row["keep"] for row in after) < len(after)
    assert [row["keep"] for row in after] == [
        row["clip_similarity"] >= threshold for row in verdicts
    ]
    assert all(row["keep"] == (row["reason"] == "") for row in after)
    assert trained == ["discl"]
    assert (copied / "train" / "discl" / "model.safetensors").read_bytes() != discl_before


def test_a_threshold_that_keeps_nothing_of_a_class_is_explained(
    copied: Path, tree: Tree, no_phase_one: None
) -> None:
    with pytest.raises(
        TrainingError,
        match=r"methods\.discl\.missing: .*'coat' at 0 % and at 50 %; 'hat' at 0 % and at 50 %",
    ):
        discl.run(changed(tree, filter__threshold=1.0), copied, amend=True)


@pytest.mark.parametrize(
    ("values", "error", "at_once"),
    [
        ({"spectrum__checkpoint": "embedded:fashion-mnist/difusion"}, DisclError, True),
        ({"hard__fewer_than": 2}, DataError, False),
        ({"train__batch_size": 64}, TrainingError, False),
        ({"filter__threshold": 1.0}, TrainingError, False),
    ],
)
def test_after_an_amendment_that_fails_the_recipe_before_finds_everything(
    copied: Path,
    finished: Path,
    tree: Tree,
    no_phase_one: None,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    values: Tree,
    error: type[Exception],
    at_once: bool,
) -> None:
    """No file is lost, no image is checked again, and nothing is trained or made again."""
    shutil.rmtree(copied / "cache")
    everything = stamps(copied, "**/*")
    with pytest.raises(error):
        discl.run(changed(tree, **values), copied, amend=True)
    now = stamps(copied, "**/*")
    assert (now == everything) is at_once
    contents = {(Path(name).name, data) for name, (_, data) in now.items()}
    assert {(Path(name).name, data) for name, (_, data) in everything.items()} <= contents
    monkeypatch.setattr(prepare_data_stage, "_inspect", lambda *_: pytest.fail("checked again"))
    monkeypatch.setattr(hard_stage, "tail_rows", lambda *_: pytest.fail("found again"))
    discl.run(tree, copied, amend=True)
    assert trained == []
    assert_same_run(copied, finished)


def test_another_level_only_adds_images(
    copied: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, kept = (
        images(copied),
        stamps(copied, "spectrum/*", "scores/*", "hard.parquet", "data.parquet"),
    )
    rows: list[int] = []
    predict = StableDiffusion.predict

    def counted(self: StableDiffusion, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.append(len(latents))
        return predict(self, latents, *rest)

    monkeypatch.setattr(StableDiffusion, "predict", counted)
    discl.run(
        changed(tree, spectrum__levels=[0, 25, 50], train__curriculum_epochs=3), copied, amend=True
    )
    after, now = (
        images(copied),
        stamps(copied, "spectrum/*", "scores/*", "hard.parquet", "data.parquet"),
    )
    assert {name: after[name] for name in before} == before
    assert kept.items() <= now.items()
    assert len(after) == len(before) + HARD * 2
    assert sum(rows) == 2 * 3 * HARD * 2  # two rows a step, three steps of four at 25 %
    assert set(scores(copied)) == set(after)
    assert [
        record["levels"] for record in read_history(copied / "train" / "discl" / "history.jsonl")
    ] == [[0], [25], [50]]


def test_a_crop_larger_than_the_image_is_refused(tree: Tree) -> None:
    with pytest.raises(
        RecipeError, match=r"train\.resize = 12 is smaller than train\.image_size = 16"
    ):
        validate(changed(tree, train__resize=12))


def test_a_level_more_is_another_curriculum_even_if_nothing_of_it_was_kept(
    copied: Path, tree: Tree
) -> None:
    run = open_run(validate(tree), copied)
    kept = sample_pool.kept_images(run)
    before = {
        name: trained_stage.fingerprint(run, name, method, kept)
        for name, method in run.recipe.methods.items()
    }
    more = Run(
        validate(changed(tree, spectrum__levels=[0, 25, 50], train__curriculum_epochs=3)), copied
    )
    more = replace(more, recipe=more.recipe.model_copy(update={"train": run.recipe.train}))
    after = {
        name: trained_stage.fingerprint(more, name, method, kept)
        for name, method in run.recipe.methods.items()
    }
    assert {name for name in METHODS if before[name] != after[name]} == {"discl"}


def test_a_changed_method_is_trained_anew_and_the_others_are_left(
    copied: Path, tree: Tree, no_phase_one: None, trained: list[str]
) -> None:
    patterns = ("train/ce/*", "train/discl/*", "spectrum/*", "scores/*")
    before, balanced = (
        stamps(copied, *patterns),
        (copied / "train" / "balanced" / "model.safetensors").read_bytes(),
    )
    fixed = {"strategy": "fixed", "level": 50, "objective": "balanced-softmax"}
    methods = {**tree["methods"], "balanced": fixed, "more": {"undersample": True}}
    discl.run(changed(tree, methods=methods), copied, amend=True)
    assert trained == ["balanced", "more"]
    assert stamps(copied, *patterns) == before
    assert (copied / "train" / "balanced" / "model.safetensors").read_bytes() != balanced
    assert set(json.loads((copied / "results.json").read_text())) == ROWS | {"more", "more+la"}


@pytest.mark.slow
def test_amended_there_and_back_is_the_run_it_was(
    copied: Path, finished: Path, tree: Tree, no_phase_one: None
) -> None:
    discl.run(changed(tree, train__seed=1), copied, amend=True)
    models = [
        (folder / "train" / "ce" / "model.safetensors").read_bytes()
        for folder in (copied, finished)
    ]
    assert models[0] != models[1]
    discl.run(tree, copied, amend=True)
    assert_same_run(copied, finished)


def test_methods_that_follow_progress(copied: Path, tree: Tree, no_phase_one: None) -> None:
    """They hold images out for V, choose among the levels, and a second call trains nothing."""
    methods = {
        "ce": {},
        **{
            name: {"strategy": name, "guidance_images": 2}
            for name in ("adaptive", "adaptive-per-class", "bandit")
        },
    }
    opened = open_run(changed(tree, methods=methods, spectrum__seeds=2), copied, amend=True)
    run_until(opened, "evaluate")
    for name in methods:
        history = read_history(copied / "train" / name / "history.jsonl")
        assert [len(record.get("progress", {}).get("gain", {})) for record in history] == (
            [0, 0, 0] if name == "ce" else [2, 2, 0]
        )
    assert {"adaptive", "adaptive+la", "bandit", "adaptive-per-class"} < set(
        json.loads((copied / "results.json").read_text())
    )


@pytest.mark.slow
def test_methods_and_seeds_in_one_table(
    copied: Path,
    finished: Path,
    tree: Tree,
    no_phase_one: None,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each method once a seed; a second call trains nothing, and a killed one goes on."""
    opened = open_run(
        changed(
            tree, compare={"published": "cifar100-lt-ir100-resnet10", "rows": {"discl": "ce-discl"}}
        ),
        copied,
        amend=True,
    )
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(compare, "train", kill_at(2, compare.train))
        pipeline.compare(opened, [0, 1])
    asked: list[Run] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            compare,
            "draws_so_far",
            lambda run: asked.append(run) or pending_stage.draws_so_far(run),
        )
        path = pipeline.compare(opened, [0, 1])
    assert len(asked) == 1  # plan and scores are read once, however many rows the table has
    results = [
        json.loads((folder / "results.json").read_text()) for folder in (copied, copied / "seeds/1")
    ]
    assert results[0] == json.loads((finished / "results.json").read_text())
    assert not (copied / "seeds/0").exists(), "seed 0 is the recipe's own, which was trained"
    assert not list(copied.glob("seeds/*/spectrum")) and not list(
        copied.glob("seeds/*/data.parquet")
    )
    table = json.loads((copied / "comparison.json").read_text())["rows"]
    assert list(table) == list(results[0])
    for row, stated in table.items():
        assert stated["figures"]["all"] == [result[row]["test"]["accuracy"] for result in results]
    few = np.mean(
        [100 * (result["discl"]["test"]["few"] - result["ce"]["test"]["few"]) for result in results]
    )
    assert table["discl"]["intervals"]["few"][0] == pytest.approx(few)
    assert table["discl"]["intervals"]["few"][1] <= few <= table["discl"]["intervals"]["few"][2]
    assert "few" in table["discl+la"]["intervals"] and not table["ce"]["intervals"]
    assert (table["ce"]["costs"]["UNet rows"], table["discl"]["costs"]["UNet rows"]) == (
        0,
        8 * 2 * 2 * (4 + 2),
    )
    assert table["discl"]["published"]["few"] == 10.65
    lines = path.read_text().splitlines()
    assert sum(line.startswith("|") for line in lines) == len(table) + 2
    controls = json.loads((copied / "comparison.json").read_text())["controls"]
    assert yaml.safe_load(controls["lines"]) == {
        "same-mixture": {"strategy": "real-only", "mixture": "undersampled"}
    }
    chosen_on = "validation" if "validation" in results[0]["ce"] else "test"
    best = max(
        (row for row in table if not row.startswith("discl")),
        key=lambda row: np.mean([result[row][chosen_on]["accuracy"] for result in results]),
    )
    assert f"{best}, chosen by top-1 on {chosen_on}" in controls["notes"][-1]
    few, overall = table["discl"]["controls"].values()
    gains = [
        result["discl"]["test"]["accuracy"] - result[best]["test"]["accuracy"] for result in results
    ]
    assert few is None and overall[0] == pytest.approx(100 * np.mean(gains))
    assert overall[1] <= overall[0] <= overall[2] and "controls" not in table["ce"]
    assert "  same-mixture: {strategy: real-only, mixture: undersampled}" in lines
    trained.clear()
    pipeline.compare(opened, [0, 1])
    assert trained == []


@pytest.mark.slow
def test_every_method_has_the_same_number_of_trials(
    copied: Path, tree: Tree, no_phase_one: None, trained: list[str]
) -> None:
    """No image is trained on and measured on, no test image is listed, the best trial wins."""
    space = {"train.optimizer.lr": [1e-9, 3e-3]}
    asked = {
        "trials": 2,
        "space": space,
        "methods": {"discl": {"synthetic_scale": [2.0]}},
        "hold_out": 0.3,
        "train": {"epochs": 2},
    }
    opened = open_run(
        changed(tree, compare={"tune": asked}, train__optimizer={"lr": 3e-3}), copied, amend=True
    )
    path = pipeline.compare(opened, [0], tune=True)
    found = json.loads((copied / "tuned" / "trials.json").read_text())
    listed = pq.read_table(copied / "tuned" / "trials" / "data.parquet").to_pylist()
    held = {row["id"] for row in listed if row["split"] == "validation"}
    assert {row["split"] for row in listed} == {"train", "validation"} and {
        row["source_split"] for row in listed
    } == {"train"}
    assert found["judged_on"] == f"{len(held)} of the 40 training images, held out"
    for name, column in (("hard", "id"), ("plan", "source_id"), ("filter", "source_id")):
        rows = set(
            pq.read_table(copied / "tuned" / "trials" / f"{name}.parquet")[column].to_pylist()
        )
        assert rows and not rows & held
    results = json.loads((copied / "tuned" / "trials" / "results.json").read_text())
    assert {"ce.0", "ce.1", "discl.0", "discl.1"} <= set(results)
    tuned = {}
    for name, each in found["methods"].items():
        assert [trial["figure"] for trial in each["trials"]] == [
            np.mean(list(results[f"{name}.{number}"]["validation"]["per_class"].values()))
            for number in range(2)
        ]
        best = max(each["trials"], key=lambda trial: trial["figure"])
        assert each["chosen"] == best["settings"]
        tuned[name] = json.loads((copied / "tuned" / "train" / name / "method.json").read_text())[
            "train"
        ]
    assert found["methods"]["ce"]["trials"][1]["settings"] == {"train.optimizer.lr": 1e-9}
    assert set(found["methods"]["discl"]["trials"][1]["settings"]) == {
        "train.optimizer.lr",
        "synthetic_scale",
    }
    assert {name: each.get("optimizer", {}).get("lr") for name, each in tuned.items()} == {
        name: each["chosen"].get("train.optimizer.lr") for name, each in found["methods"].items()
    }
    assert "never on test images" in path.read_text() and path.parent == copied / "tuned"
    assert len(trained) == 6 + 3
    trained.clear()
    pipeline.compare(opened, [0], tune=True)
    assert trained == []


def test_a_search_that_cannot_be_is_told_before_anything_is_trained(
    copied: Path, tree: Tree
) -> None:
    with pytest.raises(RecipeError, match=r"method in compare.tune.methods 'dicsl'.*discl"):
        validate(changed(tree, compare={"tune": {"methods": {"dicsl": {"synthetic_scale": [1]}}}}))
    opened = open_run(
        changed(tree, compare={"tune": {"space": {"train.optimiser.lr": [1e-3]}}}),
        copied,
        amend=True,
    )
    with pytest.raises(RecipeError, match=r"optimiser"):
        pipeline.compare(opened, [0], tune=True)


def kill_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, until it is called for the `call`-th time (from 1)."""
    calls = iter(range(1, 10**6))

    def until(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return function(*arguments, **named)

    return until


def half_written(content: Any, path: Path, *_: Any) -> None:
    """Stands for any of the writers: it is killed in the middle of its file."""
    Path(path).write_bytes(b"half of a file")
    raise Killed


def half_table(name: str, function: Callable[..., None] = pq.write_table) -> Callable[..., None]:
    """The writer of Parquet files, which is killed in the middle of the table of this name."""

    def write(table: Any, path: Path, **named: Any) -> None:
        (half_written if name in Path(path).name else partial(function, **named))(table, path)

    return write


@pytest.mark.slow
def test_interrupted_in_every_stage(
    tree: Tree, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One folder, called again after each stop: 32 images in shards of 3, then 3 × 3 epochs.

    Scores that lack because the process was killed between the two shards are given by the filter.
    """
    folder, small = tmp_path / "run", changed(tree, runtime__shard_rows=3)
    points: list[tuple[Any, str, Callable[..., Any]]] = [
        (pq, "write_table", half_table("data.parquet")),
        (plan_stage, "write_plan", half_written),
        (Shards, "append", kill_at(4, Shards.append)),
        (Shards, "append", kill_at(2, Shards.append)),
        (Shards, "append", kill_at(8, Shards.append)),
        (pq, "write_table", half_table("filter.parquet")),
        (loop._Epochs, "train", kill_at(5, loop._Epochs.train)),
        (loop.shutil, "rmtree", kill_at(1, loop.shutil.rmtree)),
        (evaluate_stage, "save_tensors", half_written),
    ]
    made = []
    for place, name, replacement in points:
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(place, name, replacement)
            discl.run(small, folder)
        made.append((len(images(folder)), len(scores(folder))))
    assert made == [(0, 0)] * 2 + [(6, 3), (9, 3), (21, 12)] + [(32, 32)] * 4
    discl.run(tree, folder)
    assert_same_run(folder, finished)


def test_a_deletion_that_was_killed_leaves_no_classifier_behind(
    copied: Path, finished: Path, tree: Tree, trained: list[str]
) -> None:
    """The rest of a method's folder is not taken for the classifier of the recipe."""
    (copied / "train" / "ce" / "method.json").unlink()
    shutil.copy(
        copied / "train" / "balanced" / "model.safetensors",
        copied / "train" / "ce" / "model.safetensors",
    )
    discl.run(tree, copied)
    assert trained == ["ce"]
    assert_same_run(copied, finished)


def run_and_kill(recipe: Path, folder: Path, ready: Callable[[], bool]) -> None:
    """`discl run` in a process of its own, killed as soon as the run has come so far."""
    command = Command(["run", recipe, "--out", folder], folder.parent / "streams")
    while not ready():
        assert command.poll() is None, command.errors
        time.sleep(0.002)
    command.kill()
    assert command.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_killed_while_generating_and_while_training(
    tree: Tree, finished: Path, tmp_path: Path
) -> None:
    recipe, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(changed(tree, runtime__shard_rows=2)))
    run_and_kill(recipe, folder, lambda: len(list(folder.glob("spectrum/part-*"))) >= 3)
    assert 6 <= len(images(folder)) < 32
    first = images(folder)
    run_and_kill(recipe, folder, (folder / "train" / "ce" / "model.safetensors").exists)
    assert not (folder / "train" / "discl" / "model.safetensors").exists()
    assert images(folder).items() >= first.items()
    discl.run(tree, folder)
    for left in folder.glob(
        "s*/.part-*"
    ):  # half a shard stays for an hour, for another process might be writing it
        left.unlink()
    assert_same_run(folder, finished)


@pytest.mark.slow
def test_stages_one_by_one_are_the_whole_chain(tree: Tree, finished: Path, tmp_path: Path) -> None:
    for stage in STAGES:
        path = run_until(open_run(validate(tree), tmp_path / "run"), stage)
        assert path.exists()
    assert_same_run(tmp_path / "run", finished)


def test_validation_selection_needs_a_validation_split(tree: Tree, copied: Path) -> None:
    """With one each method keeps its best epoch; without one the run stops before any work."""
    discl.run(changed(tree, train__select="validation"), copied, amend=True)
    for method in METHODS:
        figures = [
            record["validation_accuracy"]
            for record in read_history(copied / "train" / method / "history.jsonl")
        ]
        measured = json.loads((copied / "results.json").read_text())[method]["validation"][
            "accuracy"
        ]
        assert measured == pytest.approx(max(figures))
        assert not (copied / "train" / method / "best").exists()
    shutil.copytree(tree["data"]["root"], copied.with_name("data"))
    shutil.rmtree(copied.with_name("data") / "validation")
    unsplit = {"root": str(copied.with_name("data")), "own_split": {"validation": 0}}
    last = METHODS[-1]
    of_one = {**tree["methods"], last: {**tree["methods"][last], "train": {"select": "validation"}}}
    for alone, named in (
        (changed(tree, train__select="validation", data=unsplit), ", ".join(METHODS)),
        (changed(tree, methods=of_one, data=unsplit), last),
    ):
        with pytest.raises(
            DataError,
            match=rf"\(of {named}\), .* no validation split; .*select: last .*data\.own_split",
        ):
            discl.run(alone, copied.with_name("without"), amend=True)
    assert not (copied.with_name("without") / "plan.parquet").exists()


@pytest.mark.slow
def test_a_clip_beside_the_others_in_a_run(
    copied: Path, tree: Tree, tiny_clip: Path, no_phase_one: None, trained: list[str]
) -> None:
    """Zero-shot, probed and tuned; the tuned one gets a row of interpolated weights too."""
    model = {"architecture": "clip", "checkpoint": str(tiny_clip), "stem": "7x7", "width": None}
    own = {
        "image_size": 32,
        "resize": None,
        "augment": [],
        "model": model,
        "optimizer": {"name": "adamw", "lr": 1e-4},
    }
    methods = {
        **tree["methods"],
        "zero-shot": {"fine_tune": "zero-shot", "train": own},
        "probe": {"fine_tune": "linear-probe", "train": own},
        "flyp": {
            "objective": "flyp",
            "strategy": "all-levels",
            "train": {**own, "optimizer": {"name": "adamw", "lr": 1e-3}},
        },
    }
    methods["light"] = {
        "objective": "logit-adjusted",
        "fine_tune": "light",
        "train": {**own, "optimizer": {"name": "sgd", "lr": 0.1}},
    }
    recipe = changed(tree, methods=methods, evaluate__weight_ensembling=[0.0, 0.5, 1.0])
    discl.run(recipe, copied, amend=True)
    assert trained == ["zero-shot", "probe", "flyp", "light"]
    results = json.loads((copied / "results.json").read_text())
    rows = {"zero-shot", "probe", "probe+la", "flyp", "flyp+la", "flyp+we", "light", "light+we"}
    assert set(results) == ROWS | rows
    alpha = results["flyp+we"]["test"]["alpha"]
    scores = json.loads((copied / "train/flyp/we/ensemble.json").read_text())["validation_macro_f1"]
    assert (
        scores[[0.0, 0.5, 1.0].index(alpha)]
        == max(scores)
        == pytest.approx(results["flyp+we"]["validation"]["macro_f1"])
    )
    assert scores[0] == pytest.approx(results["zero-shot"]["validation"]["macro_f1"])
    assert scores[2] == pytest.approx(results["flyp"]["validation"]["macro_f1"])
    assert "weight ensembling" in (copied / "report.html").read_text()
    discl.predict(
        copied / "train/flyp/we", Path(tree["data"]["root"]) / "test", copied / "predictions.csv"
    )
    assert len((copied / "predictions.csv").read_text().splitlines()) == 1 + sum(COUNTS["test"])
    for name in ("light", "light/we"):
        stored = load_file(copied / f"train/{name}/model.safetensors")
        assert not [each for each in stored if "mlp" in each]
    mark = json.loads((copied / "train/light/we/ensemble.json").read_text())
    assert mark["validation_macro_f1"][2] == pytest.approx(
        results["light"]["validation"]["macro_f1"]
    )
    assert " parameters (" in (copied / "report.html").read_text()
    before = load_file(copied / "train/light/logits.safetensors")["test"]
    discl.run(changed(recipe, evaluate__test_time_crops=5), copied, amend=True)
    assert trained == ["zero-shot", "probe", "flyp", "light"]
    after = load_file(copied / "train/light/logits.safetensors")["test"]
    assert after.shape == before.shape and not torch.equal(after, before)
    discl.predict(
        copied / "train/light/we",
        Path(tree["data"]["root"]) / "test",
        copied / "light.csv",
        base=tiny_clip,
        crops=5,
    )


def test_a_batch_larger_than_the_data_is_refused_and_nothing_is_lost(
    copied: Path, tree: Tree, no_phase_one: None
) -> None:
    with pytest.raises(TrainingError, match=r"train\.batch_size: 64 exceeds the 40"):
        discl.run(
            changed(tree, train__batch_size=64, methods={"ce": {"strategy": "real-only"}}),
            copied,
            amend=True,
        )
    assert len(images(copied)) == 32
