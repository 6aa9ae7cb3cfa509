"""`discl adapt` and `discl pilot` on a small run: what they write, what they refuse, what they
leave alone when called again."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from discl import open_run, run_until
from discl.checkpoints import weights_digest
from discl.errors import CheckpointError, DataError, RecipeError, RunError
from discl.pipeline import levels, pilot
from discl.report import write_pilot
from discl.spectrum.adaptation import train_adapter
from discl.spectrum.plan import read_plan
from helpers.captioners import save_blip

ADAPT = {"rank": 2, "steps": 3, "learning_rate": 1e-2, "batch_size": 2}


def draw(folder: Path, label: int, count: int) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        rng = np.random.default_rng([label, index, len(folder.parent.name)])
        pixels = rng.integers(0, 60, (32, 32, 3)) + 60 * label
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:02d}.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for split, counts in {"train": (12, 12, 4, 4), "validation": (4, 4, 4, 4)}.items():
        for label, (name, count) in enumerate(zip("abcd", counts, strict=True)):
            draw(root / split / name, label, count)
    return root


@pytest.fixture
def recipe(pictures, tiny_diffusion, tiny_clip) -> dict:
    return {
        "name": "small",
        "data": {"root": str(pictures)},
        "groups": {"many": 10, "few": 6},
        "hard": {"fewer_than": 6},
        "spectrum": {
            "checkpoint": str(tiny_diffusion),
            "levels": [0, 50],
            "seeds": 1,
            "num_inference_steps": 2,
        },
        "filter": {"checkpoint": str(tiny_clip), "threshold": -1},
        "train": {"epochs": 2, "curriculum_epochs": 2, "image_size": 32, "batch_size": 8},
        "methods": {"discl": {"strategy": "diverse-to-specific"}},
        "pilot": {"images": 32, "folds": 2},
        "runtime": {"device": "cpu"},
    }


@pytest.mark.slow
def test_an_image_is_learnt_with_its_own_caption(recipe, tmp_path, monkeypatch):
    """Generation knows captions of hard images alone; adaptation sees all training images."""
    templates = ["a {class}, {caption}", "{caption}: one {class}"]
    captions = {"checkpoint": str(save_blip(tmp_path / "blip")), "max_new_tokens": 4}
    recipe["prompts"] = {"templates": templates, "captions": captions}
    recipe["spectrum"]["adapt"] = ADAPT
    seen = []

    def spy(model, images, *rest, **words):
        seen.append(images)
        return train_adapter(model, images, *rest, **words)

    monkeypatch.setattr("discl.stages.adapt.train_adapter", spy)
    run = open_run(recipe, tmp_path / "run")
    run_until(run, "plan")
    rows = [
        row
        for shard in sorted(run.path("captions").glob("part-*.parquet"))
        for row in pq.read_table(shard).to_pylist()
    ]
    caption_of = {row["image"]: row["caption"] for row in rows}
    data = pq.read_table(run.path("data.parquet")).to_pylist()
    train = {row["id"]: row["digest"] for row in data if row["split"] == "train"}
    (images,) = seen
    assert len(images.texts) == len(train) == len(run.train.ids)
    for name, label, texts in zip(run.train.ids, images.labels, images.texts, strict=True):
        caption, spoken = caption_of[train[name]], "abcd"[label]
        assert texts == [f"a {spoken}, {caption}".strip(" ,"), f"{caption}: one {spoken}"]


@pytest.mark.slow
def test_an_adapted_generator_is_trained_once_and_changes_the_ids(recipe, tmp_path):
    plain = open_run(recipe, tmp_path / "plain")
    run_until(plain, "plan")
    recipe["spectrum"]["adapt"] = ADAPT
    run = open_run(recipe, tmp_path / "adapted")
    with pytest.raises(RunError, match="discl adapt"):
        _ = run.address
    run_until(run, "plan")
    ids = {request.id for request in read_plan(run.path("plan.parquet"))}
    assert not ids & {request.id for request in read_plan(plain.path("plan.parquet"))}
    (weights,) = run.path("adapted").glob("*.safetensors")
    written = weights.stat().st_mtime_ns
    again = open_run(recipe, tmp_path / "adapted")
    run_until(again, "filter")
    assert weights.stat().st_mtime_ns == written
    assert {request.id for request in read_plan(run.path("plan.parquet"))} == ids


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_class_tokens_change_the_images_and_no_text(recipe, tmp_path, rank):
    recipe["spectrum"]["adapt"] = ADAPT | {"rank": rank}
    plain = None
    if rank:
        plain = open_run(recipe, tmp_path / "plain")
        run_until(plain, "plan")
    recipe["spectrum"]["adapt"] |= {"class_tokens": 2}
    recipe["prompts"] = {"templates": ["a {class}"]}
    run = open_run(recipe, tmp_path / "run")
    run_until(run, "filter")
    files = sorted(run.path("adapted").glob("*.safetensors"))
    assert len(files) == (2 if rank else 1) and files[0].stem.endswith("-tokens")
    pointer = json.loads(run.path("adapter.json").read_text())
    assert list(pointer) == (["file", "tokens"] if rank else ["tokens"])
    requests = read_plan(run.path("plan.parquet"))
    assert {request.prompt for request in requests} == {"a c", "a d"}
    rows = run.spectrum.read().to_pylist()
    assert {row["class_tokens"] for row in rows} == {weights_digest(files[0])}
    assert {bool(row["loras"]) for row in rows} == {bool(rank)}
    if plain is not None:
        others = read_plan(plain.path("plan.parquet"))
        assert not {each.id for each in requests} & {each.id for each in others}
    written = {file: file.stat().st_mtime_ns for file in files}
    again = open_run(recipe, tmp_path / "run")
    run_until(again, "plan")
    assert {request.id for request in read_plan(again.path("plan.parquet"))} == {
        request.id for request in requests
    }
    assert {file: file.stat().st_mtime_ns for file in files} == written


def test_names_that_tokens_cannot_stand_for_are_told_first(recipe, tmp_path, monkeypatch, caplog):
    from discl.stages import adapt as stage

    recipe["spectrum"]["adapt"] = ADAPT | {"class_tokens": 1}
    recipe["prompts"] = {"names": {"b": " "}}
    run = open_run(recipe, tmp_path / "run")
    run_until(run, "prompts")
    monkeypatch.setattr(stage, "load_generator", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(DataError) as caught:
        stage.adapt(run)
    assert caught.value.argument == "prompts.names" and "'b'" in str(caught.value)
    labels = run.train.labels
    stage._warn_of_single(run, np.array([*labels[labels == 0], 2]))
    assert "1 class has one image" in caplog.text and "['c']" in caplog.text


def test_class_tokens_of_a_flow_are_told_before_any_image_is_read(recipe, tmp_path):
    from discl.stages.plan import check_models

    recipe["spectrum"]["adapt"] = ADAPT | {"class_tokens": 1}
    run = open_run(recipe, tmp_path / "run")
    flow = dataclasses.replace(run.generator, family="FLUX.1", takes_class_tokens=False)
    run.__dict__["generator"] = flow
    with pytest.raises(CheckpointError, match=r"FLUX\.1") as caught:
        check_models(run, "plan")
    assert caught.value.argument == "spectrum.adapt.class_tokens"
    assert not run.path("data.parquet").exists()


def test_settings_without_class_tokens_are_written_as_before() -> None:
    from discl.recipe import Adapt

    assert not {"class_tokens", "token_learning_rate"} & Adapt().model_dump().keys()
    assert Adapt(rank=0, class_tokens=2).model_dump()["class_tokens"] == 2
    with pytest.raises(ValueError, match="nothing would be trained"):
        Adapt(rank=0)


@pytest.mark.slow
def test_other_settings_train_other_weights_and_keep_the_first(recipe, tmp_path):
    recipe["spectrum"]["adapt"] = ADAPT
    run_until(open_run(recipe, tmp_path / "run"), "adapt")
    recipe["spectrum"]["adapt"] = ADAPT | {"rank": 1}
    run = open_run(recipe, tmp_path / "run", amend=True)
    run_until(run, "adapt")
    assert len(list(run.path("adapted").glob("*.safetensors"))) == 2


def test_validation_images_are_not_seen(recipe, tmp_path, monkeypatch):
    from discl.stages import adapt as stage

    recipe["spectrum"]["adapt"] = ADAPT
    run = open_run(recipe, tmp_path / "run")
    run_until(run, "prompts")
    seen = []
    known = stage.train_adapter

    def spy(model, images, *args, **kwargs):
        seen.extend(images.load(row).tobytes() for row in range(len(images.labels)))
        return known(model, images, *args, **kwargs)

    monkeypatch.setattr(stage, "train_adapter", spy)
    stage.adapt(run)
    held_out = run.tables["validation"]
    others = {np.asarray(held_out.image(row)).tobytes() for row in range(len(held_out))}
    assert len(seen) == len(run.train)
    assert not others & set(seen)


@pytest.mark.slow
def test_a_prior_of_the_generators_own_images(recipe, tmp_path):
    recipe["spectrum"]["adapt"] = ADAPT | {"prior_weight": 1.0, "prior_images": 4}
    run = open_run(recipe, tmp_path / "run")
    run_until(run, "adapt")
    assert json.loads(run.path("adapter.json").read_text())["file"].endswith(".safetensors")


@pytest.mark.slow
def test_a_pilot_measures_every_candidate_and_level_and_continues(recipe, tmp_path):
    recipe["pilot"]["mixture"] = ["all", "class-balanced"]
    recipe["pilot"]["candidates"] = {
        "as it is": {},
        "adapted": {"spectrum.adapt": ADAPT},
        "gone": {"spectrum.checkpoint": str(tmp_path / "nowhere")},
    }
    run = open_run(recipe, tmp_path / "run")
    page = pilot(run)
    table = page.with_suffix(".md")
    result = json.loads((page.parent / "pilot.json").read_text())
    rows = {(each["candidate"], each["level"]) for each in result["outcomes"]}
    assert rows == {(name, level) for name in ("as it is", "adapted") for level in (None, 0, 50)}
    assert list(result["failed"]) == ["gone"]
    assert all(each["worth"] is not None for each in result["outcomes"])
    assert result["advice"]["reasons"]
    assert {each["candidate"] for each in result["thresholds"]} == {"as it is", "adapted"}
    described = result["levels"]["adapted"]
    assert [row["level"] for row in described["levels"]] == [0, 50]
    assert described["sources"] == 6 and described["proposal"]["reasons"]
    assert "gone" in table.read_text() and "| class-balanced |" in table.read_text()
    assert [each["mixture"] for each in result["mixtures"]] == ["all", "class-balanced"]
    assert result["advice"]["mixture"] in ("all", "class-balanced")
    shards = {file: file.stat().st_mtime_ns for file in table.parent.rglob("part-*.parquet")}
    weights = list(run.path("adapted").glob("*.safetensors"))
    assert len(weights) == 2, "one for each half of the hard images"
    assert shards
    first, shown = table.read_text(), page.read_text()
    assert pilot(open_run(recipe, tmp_path / "run")).read_text() == shown
    assert table.read_text() == first
    assert {file: file.stat().st_mtime_ns for file in shards} == shards
    levels(run, sources=4, grid=[0, 50])
    assert set(table.parent.rglob("part-*.parquet")) == set(shards), "no image is made twice"
    found = json.loads((run.folder / "levels/levels.json").read_text())
    assert [row["images"] for row in found["levels"]] == [4, 4]


@pytest.mark.slow
def test_the_page_of_a_pilot_shows_its_images_at_the_chosen_threshold(recipe, tmp_path, caplog):
    recipe["pilot"] |= {
        "images": 8,
        "thresholds": [1],
        "candidates": {"as it is": {}, "<b>same</b>": {"prompts.names": {"a": "a"}}},
    }
    path = pilot(open_run(recipe, tmp_path / "run"))
    page, result = path.read_text(), json.loads(path.with_suffix(".json").read_text())
    assert path == tmp_path / "run/pilot/pilot.html"
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page) and "<script" not in page
    shown = re.findall(r'title="λ (\d+) %, seed 0, clip_similarity [^,]+, (kept|dropped)', page)
    assert Counter(shown) == {("0", "kept"): 8, ("50", "kept"): 8}, "4 sources of each candidate"
    assert "&lt;b&gt;same&lt;/b&gt;" in page and "<b>same" not in page
    assert "candidates 'as it is' and '<b>same</b>' have the same images" in caplog.text
    result["outcomes"] = [{**each, "threshold": 1.0} for each in result["outcomes"]]
    path.with_suffix(".json").write_text(json.dumps(result))
    run = open_run(recipe, tmp_path / "run")
    page = write_pilot(run.folder, run.train, run.folder / "pilot/spectrum").read_text()
    assert page.count(", dropped: clip_similarity") == 2 * 16 and ", kept" not in page


@pytest.mark.slow
def test_the_weights_that_make_an_image_have_not_seen_its_source(recipe, tmp_path, monkeypatch):
    from discl.stages import pilot as stage
    from discl.utils.stored import read_table

    recipe["pilot"]["candidates"] = {"adapted": {"spectrum.adapt": ADAPT}}
    known, seen = stage.ensure_adapter, []

    def spy(part, settings, rows):
        ids = set(read_table(part.path("hard.parquet"), ["id"])["id"].to_pylist())
        seen.append((ids, {part.train.ids[row] for row in rows.tolist()}))
        return known(part, settings, rows)

    monkeypatch.setattr(stage, "ensure_adapter", spy)
    pilot(open_run(recipe, tmp_path / "run"))
    assert len(seen) == 2
    assert all(sources and not sources & trained for sources, trained in seen)


@pytest.mark.slow
def test_a_pilot_may_judge_with_a_network(recipe, tmp_path, monkeypatch):
    """It is trained once for each set of images."""
    from discl.evaluation import proxy

    known, seen = proxy.fit_proxy, []

    def spy(pixels, labels, weights, *rest, **words):
        seen.append(len(labels))
        return known(pixels, labels, weights, *rest, **words)

    monkeypatch.setattr(proxy, "fit_proxy", spy)
    monkeypatch.setattr(proxy, "STEPS", 3)
    recipe["pilot"]["judge"] = "network"
    run = open_run(recipe, tmp_path / "run")
    first = pilot(run).with_suffix(".md").read_text()
    assert "by a small network, trained from scratch on 32 pixels; 95 % interval" in first
    assert len(seen) < 2 * 2 * (2 + 4), "the networks of real images are trained once for each fold"
    assert pilot(open_run(recipe, tmp_path / "run")).with_suffix(".md").read_text() == first
    del recipe["pilot"]["judge"]
    seen.clear()
    again = pilot(open_run(recipe, tmp_path / "run", amend=True))
    table = again.with_suffix(".md").read_text()
    assert "by a linear head on features of clip" in table and not seen


@pytest.mark.parametrize(("images", "told"), [(8, False), (7, True)])
def test_a_pilot_says_how_many_images_it_needs(recipe, tmp_path, images, told, caplog):
    from discl.stages import pilot as stage

    run = open_run(recipe, tmp_path / "run")
    run_until(run, "prompts")
    run.recipe.pilot.__dict__["images"] = images  # fewer than a recipe allows
    stage._warn_of_few_images(run, [run])
    assert ("pilot.images=8 is enough" in caplog.text) == told  # two classes, two levels


@pytest.mark.parametrize(
    ("candidate", "key"),
    [
        ({"train.epochs": 3}, "pilot.candidates.x"),
        ({"filter.threshold": 0.1}, "pilot.candidates.x"),
        ({"spectrum.levles": [0]}, "levles"),
        ({"spectrum.levels": [101]}, "101"),
    ],
)
def test_a_wrong_candidate_is_refused_before_anything_is_made(recipe, tmp_path, candidate, key):
    recipe["pilot"]["candidates"] = {"x": candidate}
    run = open_run(recipe, tmp_path / "run")
    with pytest.raises(RecipeError) as caught:
        pilot(run)
    assert key in str(caught.value)
    assert not list(run.folder.rglob("part-*.parquet"))


def test_no_candidate_that_loads_is_an_error(recipe, tmp_path):
    recipe["pilot"]["candidates"] = {
        "gone": {"spectrum.checkpoint": str(tmp_path / "nowhere")},
    }
    with pytest.raises(CheckpointError, match="nowhere"):
        pilot(open_run(recipe, tmp_path / "run"))


def test_nothing_to_hold_out_is_an_error_before_anything_is_made(recipe, tmp_path):
    root = tmp_path / "pictures"
    for label, (name, count) in enumerate({"a": 8, "b": 8, "c": 1, "d": 1}.items()):
        draw(root / "train" / name, label, count)
        draw(root / "test" / name, label, 2)
    recipe["data"]["root"] = str(root)
    run = open_run(recipe, tmp_path / "run")
    with pytest.raises(DataError, match=r"data\.splits"):
        pilot(run)
    assert not list(run.folder.rglob("part-*.parquet"))


def test_adaptation_with_one_image_is_refused_before_the_generator_is_loaded(
    recipe, tmp_path, monkeypatch
):
    from discl.stages import adapt as stage

    recipe["spectrum"]["adapt"] = ADAPT
    run = open_run(recipe, tmp_path / "run")
    run_until(run, "prompts")
    monkeypatch.setattr(stage, "load_generator", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(DataError, match="1 image"):
        stage.ensure_adapter(run, run.recipe.spectrum.adapt, np.array([0]))


def test_an_adaptation_says_beforehand_how_much_memory_it_takes(recipe, tmp_path, caplog):
    from discl.stages.adapt import describe_memory

    recipe["spectrum"]["adapt"] = ADAPT | {"prior_weight": 1.0, "prior_images": 2}
    run = open_run(recipe, tmp_path / "run")
    run_until(run, "prompts")
    before = describe_memory(run)
    assert "of device memory" in before and "4 × " in before, "two images and two of the prior"
    run_until(run, "adapt")
    assert f"adapt: {before}" in caplog.text


def test_a_pointer_names_a_file_of_its_folder(recipe, tmp_path):
    recipe["spectrum"]["adapt"] = ADAPT
    run = open_run(recipe, tmp_path / "run")
    run_until(run, "adapt")
    for name in ("../elsewhere.safetensors", "/etc/passwd", "..", ""):
        run.path("adapter.json").write_text(json.dumps({"file": name}))
        with pytest.raises(RunError, match=r"adapter\.json"):
            _ = run.address
    run_until(open_run(recipe, tmp_path / "run"), "plan")


def test_a_missing_package_is_found_before_any_image_is_read(recipe, tmp_path, monkeypatch):
    from discl.spectrum.models import loras

    monkeypatch.setattr(loras.importlib.util, "find_spec", lambda name: None)
    recipe["spectrum"]["adapt"] = ADAPT
    run = open_run(recipe, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"discl\[lora\]"):
        run_until(run, "plan")
    assert not run.path("data.parquet").exists()


@pytest.mark.slow
def test_a_candidate_may_have_levels_that_no_method_has(recipe, tmp_path):
    recipe["methods"] = {"fixed": {"strategy": "fixed", "level": 50}}
    recipe["pilot"]["candidates"] = {"text": {"spectrum.levels": [0]}}
    page = pilot(open_run(recipe, tmp_path / "run"))
    outcomes = json.loads((page.parent / "pilot.json").read_text())["outcomes"]
    assert [each["level"] for each in outcomes] == [None]


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_pilot_continues_to_the_same_files(recipe, tmp_path, monkeypatch):
    """Killed after the first images, within an adaptation, and among the embeddings."""
    from discl.spectrum import adaptation
    from discl.stages import trial

    monkeypatch.setattr(adaptation, "SAVE_EVERY", 2)
    adapted = {"spectrum.adapt": ADAPT | {"steps": 5}}
    recipe["pilot"] |= {"images": 8, "candidates": {"as it is": {}, "adapted": adapted}}
    whole, killed = open_run(recipe, tmp_path / "whole"), tmp_path / "killed"
    expected = pilot(whole).read_text()

    def kill_at(call: int, known):
        calls = []

        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == call:
                raise Killed
            return known(*args, **kwargs)

        return counted

    for place, name, call in (
        (trial, "filter_spectrum", 1),
        (adaptation, "_take_step", 9),  # in the second of two trainings
        (trial.Embedder, "_add", 2),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, kill_at(call, getattr(place, name)))
            with pytest.raises(Killed):
                pilot(open_run(recipe, killed))
    run = open_run(recipe, killed)
    assert pilot(run).read_text() == expected
    files = [
        {file.name: file.read_bytes() for file in each.path("adapted").glob("*.safetensors")}
        for each in (whole, run)
    ]
    assert files[0] == files[1] and len(files[0]) == 2
    stores = [each.folder / "pilot/spectrum" for each in (whole, run)]
    rows = [
        {
            row["id"]: row["image_digest"]
            for shard in folder.glob("*.parquet")
            for row in pq.read_table(shard, columns=["id", "image_digest"]).to_pylist()
        }
        for folder in stores
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_a_candidate_whose_adaptation_runs_out_of_memory_is_left_out(recipe, tmp_path, monkeypatch):
    from discl.spectrum import adaptation

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(adaptation, "adaptation_loss", full)
    recipe["spectrum"]["adapt"] = ADAPT
    page = pilot(open_run(recipe, tmp_path / "run"))
    result = json.loads((page.parent / "pilot.json").read_text())
    assert {each["candidate"] for each in result["outcomes"]} == {"not adapted"}
    assert "gradient_checkpointing" in result["failed"]["adapted"]


def test_a_generator_that_cannot_be_adapted_is_told_before_anything_is_made(recipe, tmp_path):
    from discl.stages.adapt import check_adaptable

    run = open_run(recipe, tmp_path / "run")
    check_adaptable(run)
    recipe["spectrum"]["adapt"] = ADAPT
    run = open_run(recipe, tmp_path / "adapted")
    run.__dict__["generator"] = dataclasses.replace(run.generator, plain=True, family="Kandinsky")
    with pytest.raises(CheckpointError, match="Kandinsky") as caught:
        check_adaptable(run)
    assert caught.value.argument == "spectrum.adapt"


def test_a_pilot_without_hard_images_is_an_error_before_anything_is_made(recipe, tmp_path):
    recipe["hard"]["fewer_than"] = 1
    run = open_run(recipe, tmp_path / "run")
    with pytest.raises(DataError, match=r"hard\.fewer_than"):
        pilot(run)
    assert not list(run.folder.rglob("part-*.parquet"))


@pytest.mark.slow
def test_one_image_a_class_is_measured_on_validation_images(recipe, tmp_path):
    root = tmp_path / "pictures"
    for label, (name, count) in enumerate({"a": 8, "b": 8, "c": 1, "d": 1}.items()):
        draw(root / "train" / name, label, count)
        draw(root / "validation" / name, label, 3)
    recipe["data"]["root"] = str(root)
    page = pilot(open_run(recipe, tmp_path / "run"))
    result = json.loads((page.parent / "pilot.json").read_text())
    assert result["outcomes"][0]["worth"]["overall"] is not None
    assert result["levels"]["as it is"]["real"]["pair_similarity"] is None
