"""Methods are checked before any is trained; what a classifier depends on."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import discl
from discl.data.table import make_table
from discl.errors import TrainingError
from discl.models.classifier import load_classifier
from discl.recipe import Train
from discl.run_folder.run import Run
from discl.stages import evaluate as evaluate_stage
from discl.stages import method_plan, tune
from discl.stages import train as train_stage
from discl.stages import trained as trained_stage
from discl.stages.plan import make_plan
from discl.stages.sample_pool import kept_images, made_aspects
from discl.training.checkpoint import write_history
from discl.training.distributed import Processes
from discl.training.image_cache import ImageCache
from discl.training.inference import predict_logits
from helpers.commands import Command

SMALL = {
    "train.batch_size": 8,
    "train.steps_per_epoch": 4,
    "train.image_size": 16,
    "train.model": {"architecture": "resnet10", "width": 4, "stem": "3x3"},
    "runtime.threads": 1,
}
REAL_ONLY = {"first": {"strategy": "real-only"}}


@pytest.fixture
def folder(filtered_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has come as far as the filter, in which training any method fails."""

    def trained(*_: Any) -> None:
        raise AssertionError("a method was trained")

    monkeypatch.setattr(train_stage, "_train_method", trained)
    return shutil.copytree(filtered_run, tmp_path / "run")


def with_methods(folder: Path, methods: dict[str, Any], **values: Any) -> Run:
    return Run(
        discl.load_recipe(
            folder / "recipe.yaml", {**SMALL, "methods": REAL_ONLY | methods, **values}
        ),
        folder,
    )


def drop_class(folder: Path, label: int, level: int) -> None:
    """Takes the images of a class at a level out of what the filter kept."""
    verdicts = pq.read_table(folder / "filter.parquet")
    dropped = pc.and_(pc.equal(verdicts["label"], label), pc.equal(verdicts["level"], level))
    kept = pc.and_(verdicts["keep"], pc.invert(dropped))
    place = verdicts.schema.get_field_index("keep")
    pq.write_table(
        verdicts.set_column(
            place, "keep", kept.combine_chunks() if isinstance(kept, pa.ChunkedArray) else kept
        ),
        folder / "filter.parquet",
    )


@pytest.mark.parametrize(
    "strategy", ["diverse-to-specific", "adaptive", "adaptive-per-class", "bandit"]
)
def test_a_class_without_images_at_a_later_level_stops_before_any_training(
    folder: Path, strategy: str
) -> None:
    drop_class(folder, 3, 50)
    with pytest.raises(
        TrainingError,
        match=r"^methods\.late\.missing: .* 1 class .*: 'hat' at 50 %\. .* Nothing was trained",
    ):
        train_stage.train(
            with_methods(folder, {"late": {"strategy": strategy, "guidance_images": 2}})
        )
    assert not (folder / "train").exists()


def test_what_v_takes_from_training_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_stage, "_train_method", lambda *_: None)
    methods = {"asked": {"strategy": "bandit", "guidance_images": 7}, "own": {"strategy": "bandit"}}
    train_stage.train(with_methods(folder, methods))
    told = " ".join(capsys.readouterr().err.split())
    assert "train asked: progress is measured on 3 hard images" in told and "not 7: no more" in told
    assert "3 of 8 hard images are held out of training" in told
    assert "train own: progress is measured on 1 hard image," in told  # a fifth of eight


@pytest.mark.parametrize(
    "method",
    [
        {"strategy": "all-levels"},
        {"strategy": "text-only"},
        {"strategy": "diverse-to-specific", "missing": "nearest"},
    ],
)
def test_a_level_that_is_not_come_to_alone_stops_nothing(
    folder: Path, method: dict[str, Any]
) -> None:
    drop_class(folder, 3, 50)
    with pytest.raises(AssertionError, match="a method was trained"):
        train_stage.train(with_methods(folder, {"late": method}))


def test_rows_probe_and_processes_are_checked_before_any_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {"second": {"train": {"batch_size": 64}}}
    with pytest.raises(
        TrainingError, match=r"methods\.second: train\.batch_size: 64 exceeds the 40 real images"
    ):
        train_stage.train(with_methods(folder, wide))
    long = {"second": {"strategy": "adaptive", "guidance_images": 2, "probe_samples": 32}}
    with pytest.raises(
        TrainingError,
        match=r"methods\.second\.probe_samples: a probe of 32 samples takes 4 of",
    ):
        train_stage.train(with_methods(folder, long))
    monkeypatch.setattr(method_plan, "current_processes", lambda: Processes(0, 3))
    with pytest.raises(
        TrainingError,
        match=r"methods\.first: train\.batch_size: 8 cannot be divided evenly into 3 parts",
    ):
        train_stage.train(with_methods(folder, {}))
    assert not (folder / "train").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"train.batch_size": 41},
            r"methods\.late: train\.batch_size: 41 exceeds the 40 real images",
        ),
        (
            {"train.steps_per_epoch": 1},
            r"methods\.late\.probe_samples: a probe of 2 samples takes 1 of",
        ),
    ],
)
def test_what_the_data_alone_do_not_allow_is_told_before_the_plan(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    for name in ("plan.parquet", "filter.parquet"):
        (folder / name).unlink()
    shutil.rmtree(folder / "spectrum")
    run = with_methods(
        folder, {"late": {"strategy": "adaptive"}}, **{"train.curriculum_epochs": 2, **values}
    )
    run = replace(
        run, recipe=run.recipe.model_copy(update={"methods": {"late": run.recipe.methods["late"]}})
    )
    with pytest.raises(TrainingError, match=message):
        make_plan(run)
    assert not run.path("plan.parquet").exists()
    make_plan(run, for_training=False)


def test_a_piece_of_your_own_that_was_edited_is_another_method(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a method whose pieces ship is known by what it was known by before."""
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for factor in (1, 2, 2):
        (tmp_path / "loss_of_mine.py").write_text(
            f"def loss(logits, labels, class_counts):\n    return {factor} * logits.mean()\n"
        )
        sys.modules.pop("loss_of_mine", None)
        importlib.invalidate_caches()
        run = replace(
            with_methods(folder, {"mine": {"objective": "loss_of_mine:loss"}}), allow_plugins=True
        )
        kept = kept_images(run)
        found.append(
            {
                name: trained_stage.fingerprint(run, name, method, kept)
                for name, method in run.recipe.methods.items()
            }
        )
    assert found[0]["mine"] != found[1]["mine"] == found[2]["mine"]
    assert found[0]["first"] == found[1]["first"]
    with monkeypatch.context() as patched:
        patched.setattr(trained_stage, "_own_sources", lambda method, allow_plugins: [])
        assert (
            trained_stage.fingerprint(run, "first", run.recipe.methods["first"], kept)
            == found[0]["first"]
        )


def test_figures_come_from_logits_in_float32(filtered_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(filtered_run, tmp_path / "run")
    run = with_methods(
        folder,
        {},
        **{"train.precision": "bfloat16", "train.epochs": 1, "train.curriculum_epochs": 1},
    )
    train_stage.train(run)
    evaluate_stage.measure_classifiers(run)
    stored = load_file(folder / "train" / "first" / "logits.safetensors")["test"]
    model, config = load_classifier(folder / "train" / "first")
    pixels = ImageCache([run.tables["test"]], config.resize)
    rows = np.arange(len(pixels))
    assert torch.equal(stored, predict_logits(model, pixels, rows, config))
    assert not torch.equal(stored, predict_logits(model, pixels, rows, config, torch.bfloat16))


def test_tau_is_chosen_on_validation_and_kept_by_a_search(
    filtered_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(filtered_run, tmp_path / "run")
    taus = [0.0, 0.5, 2.0]
    run = with_methods(
        folder,
        {},
        **{
            "train.epochs": 1,
            "train.curriculum_epochs": 1,
            "evaluate.tau_normalisation": taus,
        },
    )
    train_stage.train(run)
    evaluate_stage.evaluate(run)
    rows = json.loads((folder / "results.json").read_text())
    stored = load_file(folder / "train" / "first" / "logits.safetensors")
    head: Any = load_classifier(folder / "train" / "first")[0].head
    lengths = head.weight.detach().norm(dim=1)
    found = {}
    for tau in taus:
        for split, logits in stored.items():
            labels = torch.from_numpy(run.tables[split].labels)
            hits = ((logits - head.bias.detach()) / lengths**tau).argmax(1) == labels
            found[split, tau] = np.mean(
                [hits[labels == label].double().mean() for label in labels.unique()]
            )
    best = max(taus, key=lambda tau: found["validation", tau])
    row = rows["first+tau"]
    assert {split: each["tau_normalisation"] for split, each in row.items()} == dict.fromkeys(
        row, best
    )
    for split in stored:
        mean = np.mean(list(row[split]["per_class"].values()))
        assert mean == pytest.approx(found[split, best])
    kept = tune.adjustment_of(rows, "first")
    assert kept["tau_normalisation"] == best and "adjustment.tau" in kept


def test_the_prior_is_what_the_last_layer_saw(filtered_run: Path, tmp_path: Path) -> None:
    """With equally many samples of each class at the end, the effective prior shifts nothing."""
    run = with_methods(
        shutil.copytree(filtered_run, tmp_path / "run"), {}, **{"evaluate.logit_adjustment": [1.0]}
    )
    folder, classes = tmp_path / "run" / "train" / "first", len(run.train.class_names)
    folder.mkdir(parents=True)
    epochs: list[dict[str, Any]] = [
        {"epoch": 0, "class_samples": [8, *[1] * (classes - 1)]},
        {"epoch": 1, "class_samples": [8, *[1] * (classes - 1)]},
    ]
    logits = {"test": torch.randn(6, classes, generator=torch.Generator().manual_seed(0))}
    shifts = []
    for last in ({}, {"last_layer_samples": [5] * classes}):
        write_history([epochs[0], epochs[1] | last], folder / "history.jsonl")
        adjusted, chosen = evaluate_stage._rows_of(
            run, "first", run.recipe.methods["first"], logits, {}
        )["first+la"]
        assert chosen == {"prior": "effective", "tau": 1.0}
        shifts.append((logits["test"] - adjusted["test"])[0])
    counts = torch.tensor([16.0, *[2.0] * (classes - 1)])
    torch.testing.assert_close(shifts[0] - shifts[0][0], counts.log() - counts.log()[0])
    torch.testing.assert_close(shifts[1] - shifts[1][0], torch.zeros(classes))


def test_trials_are_of_one_length_and_keep_what_they_do_not_name(filtered_run: Path) -> None:
    methods = REAL_ONLY | {"long": {"train": {"epochs": 40, "optimizer": {"weight_decay": 0.25}}}}
    optimizer = {"name": "sgd", "lr": 0.1, "momentum": 0.8}
    recipe = discl.load_recipe(
        filtered_run / "recipe.yaml", {**SMALL, "methods": methods, "train.optimizer": optimizer}
    )
    short = tune.with_methods(
        recipe,
        {name: (name, {}) for name in methods},
        {"epochs": 2, "curriculum_epochs": 1, "optimizer": {"warm_up_epochs": 0}},
    )
    for name, decay in (("first", recipe.train.optimizer.weight_decay), ("long", 0.25)):
        train = short.training(name)
        assert (
            train.epochs,
            train.optimizer.name,
            train.optimizer.momentum,
            train.optimizer.warm_up_epochs,
        ) == (2, "sgd", 0.8, 0)
        assert train.optimizer.weight_decay == decay


def test_what_draws_other_samples_than_before_is_trained_again(
    filtered_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprints() -> dict[str, str]:
        names = ["diverse-to-specific", "all-levels", "random", "adaptive", "bandit"]
        run = with_methods(filtered_run, {name: {"strategy": name} for name in names})
        kept = kept_images(run)
        return {
            name: trained_stage.fingerprint(run, name, run.recipe.methods[name], kept)
            for name in names
        }

    now = fingerprints()
    monkeypatch.setattr(trained_stage, "REDEFINED", {})
    before = fingerprints()
    changed = {name for name in now if now[name] != before[name]}
    assert changed == {"random", "adaptive", "bandit"}


def test_whole_pictures_are_trained_on(filtered_run: Path, tmp_path: Path) -> None:
    """The key at its default leaves a classifier's fingerprint as it was."""
    folder = shutil.copytree(filtered_run, tmp_path / "run")
    whole = {"train": {"resize_mode": "whole", "epochs": 2, "curriculum_epochs": 2}}
    methods = {"whole": {"strategy": "all-levels", **whole}}
    run = with_methods(folder, methods, **{"train.epochs": 2, "train.curriculum_epochs": 2})
    kept = kept_images(run)
    assert made_aspects(run, kept["source_id"][:]).tolist() == [1.0] * len(kept)
    train_stage.train(run)
    assert (folder / "train" / "whole" / "model.safetensors").exists()
    assert "resize_mode" not in run.recipe.training("first").model_dump(mode="json")
    assert "resize_mode" in run.recipe.training("whole").model_dump(mode="json")
    with pytest.raises(discl.RecipeError, match=r"resize_mode = whole .* \['flip'\] has none"):
        with_methods(folder, {}, **{"train.resize_mode": "whole", "train.augment": ["flip"]})


def test_hard_images_are_judged_after_crops_of_whole_pictures_too() -> None:
    """Something lies beside the centre square."""
    images, labels = [], []
    for row in range(48):
        picture = np.random.default_rng(row).integers(0, 256, (8, 24, 3)).astype(np.uint8)
        picture[:, [slice(0, 8), slice(16, 24)][row % 2]] = 255
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
        labels.append(row % 2)
    columns = {"id": [str(row) for row in range(48)], "image": images, "label": labels}
    table = make_table(columns, ("left", "right"))
    section = {
        name.removeprefix("train."): value
        for name, value in SMALL.items()
        if name.startswith("train.")
    }
    whole_pictures = {"resize_mode": "whole", "augment": ["random-resized-crop"]}
    train = Train.model_validate({**section, **whole_pictures, "steps_per_epoch": 8})
    arguments = table, list(range(40)), list(range(40, 48)), train
    settings = {"epochs": 3, "device": torch.device("cpu")}
    whole, again, centres = (
        train_stage.fit_classifier(*arguments, **settings, aspects=aspects)
        for aspects in (np.full(48, 3.0), np.full(48, 3.0), None)
    )
    assert whole.shape == (8, 2) and np.array_equal(whole, again)
    assert not np.allclose(whole, centres, atol=1e-3)


def test_names_for_prompts_make_another_clip_but_no_other_network(
    filtered_run: Path, tiny_clip: Path
) -> None:
    def fingerprints(**values: Any) -> list[str]:
        clip = {"architecture": "clip", "checkpoint": str(tiny_clip)}
        run = Run(
            discl.load_recipe(
                filtered_run / "recipe.yaml",
                {"methods": REAL_ONLY | {"clip": {"train": {"model": clip}}}, **values},
            ),
            filtered_run,
        )
        kept = kept_images(run)
        return [
            trained_stage.fingerprint(run, name, method, kept)
            for name, method in run.recipe.methods.items()
        ]

    plain, named = fingerprints(), fingerprints(**{"prompts.names": {"coat": "warm winter coat"}})
    assert plain[0] == named[0] and plain[1] != named[1]
    assert np.unique([*plain, *named]).size == 3


def test_a_classifier_goes_by_its_checkpoints_content_not_its_place(
    filtered_run: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    def fingerprints(checkpoint: Path) -> list[str]:
        clip = {"architecture": "clip", "checkpoint": str(checkpoint)}
        methods = {"own": {"strategy": "real-only", "train": {"model": clip}}}
        run = Run(
            discl.load_recipe(filtered_run / "recipe.yaml", {"methods": methods, "baseline": None}),
            filtered_run,
        )
        return [
            trained_stage.fingerprint(run, name, method, kept_images(run))
            for name, method in run.recipe.methods.items()
        ]

    moved, other = (shutil.copytree(tiny_clip, tmp_path / name) for name in ("moved", "other"))
    weights = load_file(other / "model.safetensors")
    save_file(
        {name: tensor + 1 if name == "logit_scale" else tensor for name, tensor in weights.items()},
        other / "model.safetensors",
    )
    assert fingerprints(moved) == fingerprints(tiny_clip) != fingerprints(other)


@pytest.mark.slow
def test_two_processes_compare_where_the_first_alone_finds_the_hard_images(
    filtered_run: Path, tmp_path: Path
) -> None:
    """As torchrun starts them: what rank 0 does alone makes no other process wait for ever."""
    recipe = discl.load_recipe(
        filtered_run / "recipe.yaml",
        {**SMALL, "methods": REAL_ONLY | {"other": {"strategy": "all-levels"}}},
    )
    changes = {
        "hard": {"rule": "probability", "below": 1.0, "epochs": 1},
        "train.epochs": 1,
        "train.curriculum_epochs": 1,
    }
    recipe = discl.load_recipe(
        recipe, {**changes, "spectrum.seeds": 1, "spectrum.levels": [0], "compare.tune.trials": 2}
    )
    (tmp_path / "two.yaml").write_text(recipe.to_yaml())
    asked = ["compare", "two.yaml", "--out", "run", "--seeds", "0,1", "--tune"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    commands = []
    for rank in ("0", "1"):
        environment = {**common, "RANK": rank, "LOCAL_RANK": rank}
        commands.append(Command(asked, tmp_path / rank, environment, tmp_path))
    assert [each.wait(400) for each in commands] == [0, 0], [each.errors for each in commands]
    told = "".join(each.output for each in commands)
    assert told.count("| first |") == 1, "the first process speaks for all"
    rows = json.loads((tmp_path / "run" / "tuned" / "comparison.json").read_text())["rows"]
    assert {"first", "other"} <= set(rows) and all(
        len(row["figures"]["all"]) == 2 for row in rows.values()
    )
    assert (tmp_path / "run" / "tuned" / "comparison.html").exists()
