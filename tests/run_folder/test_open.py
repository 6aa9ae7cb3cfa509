"""Opening a run folder: new, with the same recipe, amended, or left by an earlier version."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from discl.errors import CheckpointError, RunError
from discl.recipe import load_recipe
from discl.run_folder import earlier, paths
from discl.run_folder import open as open_module
from discl.run_folder.earlier import restore_table
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
from discl.stages.prepare_data import key_of_hard
from discl.utils.stored import write_table, write_text
from helpers.runs import open_on

FILES = (paths.DATA, paths.HARD, paths.PLAN, paths.FILTER, paths.RESULTS, paths.REPORT)
IMAGES = {"id": ["a"], "digest": ["b"], "label": [0], "width": [4], "height": [4]}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fill(run: Run, text: str) -> dict[str, bytes]:
    """Files as a finished run has them, with contents that tell whose they are."""
    for name in FILES:
        write_text(run.path(name), f"{text} {name}")
    return {name: run.path(name).read_bytes() for name in FILES}


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of the present recipe."""
    return {name: data for name, data in contents(folder).items() if name in FILES}


def earlier_of(folder: Path) -> list[dict[str, bytes]]:
    return [contents(each) for each in sorted((folder / paths.EARLIER).glob("*"))]


def test_a_run_folder_holds_its_recipe_and_environment(tmp_path: Path) -> None:
    run = open_on(tmp_path)
    assert sorted(path.name for path in run.folder.iterdir()) == ["environment.json", "recipe.yaml"]
    assert load_recipe(run.path("recipe.yaml")) == run.recipe
    assert open_on(tmp_path).recipe == run.recipe


def test_a_folder_whose_recipe_names_a_file_beside_it_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As older versions kept it: relative, where it is absolute now."""
    (tmp_path / "settings").mkdir()
    monkeypatch.chdir(tmp_path)
    run = open_on(tmp_path, spectrum__config="settings")
    kept = run.path("recipe.yaml")
    kept.write_text(kept.read_text().replace(str(tmp_path / "settings"), "settings"))
    assert "config: settings" in kept.read_text()
    assert open_on(tmp_path, spectrum__config="settings").recipe == run.recipe


def test_the_folder_of_another_recipe_is_refused_with_the_differences(tmp_path: Path) -> None:
    open_on(tmp_path)
    with pytest.raises(RunError) as raised:
        open_on(
            tmp_path,
            train__epochs=70,
            hard__fewer_than=5,
            methods={"ce": {}, "la": {"undersample": True}},
        )
    folder, *changes, advice = str(raised.value).splitlines()
    assert str(tmp_path / "run") in folder
    assert changes[:2] == ["  hard.fewer_than: 20 -> 5", "  train.epochs: 65 -> 70"]
    assert len(changes) == 3 and changes[2].startswith("  methods.la: None -> {")
    assert "--out" in advice and "--amend" in advice
    assert open_on(tmp_path).recipe.train.epochs == 65


def test_runtime_may_always_differ(tmp_path: Path) -> None:
    open_on(tmp_path)
    assert open_on(tmp_path, runtime__slots=3, runtime__shard_rows=7).recipe.runtime.slots == 3


RESULTS = {paths.RESULTS, paths.REPORT}


@pytest.mark.parametrize(
    ("values", "moved"),
    [
        ({"train__epochs": 70}, set()),
        ({"filter__threshold": 0.2}, {paths.FILTER}),
        ({"spectrum__seeds": 2}, {paths.PLAN, paths.FILTER}),
        ({"prompts__negative": "blurred"}, {paths.PLAN, paths.FILTER}),
        ({"hard__fewer_than": 5}, {paths.HARD, paths.PLAN, paths.FILTER}),
        ({"hard__rule": "probability"}, {paths.HARD, paths.PLAN, paths.FILTER}),
        ({"data__unreadable": "skip"}, {*FILES}),
    ],
)
def test_an_amendment_moves_what_no_longer_fits(
    tmp_path: Path, values: dict[str, Any], moved: set[str]
) -> None:
    """Beside a copy of its recipe; nothing is deleted."""
    run = open_on(tmp_path)
    before, recipe = fill(run, "first"), run.path(paths.RECIPE).read_bytes()
    amended = open_on(tmp_path, amend=True, **values)
    moved = moved | RESULTS
    assert files_of(run.folder) == {
        name: data for name, data in before.items() if name not in moved
    }
    assert earlier_of(run.folder) == [
        {name: before[name] for name in moved} | {paths.RECIPE: recipe}
    ]
    assert load_recipe(run.path(paths.RECIPE)) == amended.recipe


@pytest.mark.parametrize(
    ("values", "stale"),
    [
        ({"train__optimizer__lr": 0.5}, True),
        ({"train__epochs": 70, "train__select": "validation"}, False),
    ],
)
def test_hard_images_by_probability_depend_on_how_their_classifiers_are_trained(
    tmp_path: Path, values: dict[str, Any], stale: bool
) -> None:
    run = open_on(tmp_path, hard__rule="probability")
    fill(run, "first")
    amended = open_on(tmp_path, amend=True, hard__rule="probability", **values)
    for name in (paths.HARD, paths.PLAN, paths.FILTER):
        assert run.path(name).exists() is not stale
    keys = {key_of_hard(each, pa.table(IMAGES)) for each in (run, amended)}
    assert len(keys) == 1 + stale


@pytest.mark.parametrize(
    ("rule", "values", "stale"),
    [
        ("alia", {"train__optimizer__lr": 0.5}, True),
        ("threshold", {"train__optimizer__lr": 0.5}, False),
    ],
)
def test_verdicts_by_a_classifier_depend_on_how_it_is_trained(
    tmp_path: Path, rule: str, values: dict[str, Any], stale: bool
) -> None:
    texts = {"filter__negatives": ["a picture"]} if rule == "alia" else {}
    run = open_on(tmp_path, filter__rule=rule, **texts)
    fill(run, "first")
    open_on(tmp_path, amend=True, filter__rule=rule, **texts, **values)
    assert run.path(paths.FILTER).exists() is not stale and run.path(paths.PLAN).exists()


def test_a_table_is_found_by_what_it_was_made_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its place, or with an earlier recipe, from where it moves back."""
    run = open_on(tmp_path)
    path = run.path(paths.HARD)
    assert not restore_table(path, "one", "it is made")
    for number, key in enumerate(("one", "two", "three")):
        write_table(pa.table({**IMAGES, "label": [number]}), path, key)
        assert restore_table(path, key, "it is made")
        open_on(tmp_path, amend=True, hard__fewer_than=5 + number)
        assert not path.exists()
    for number, key in enumerate(("one", "two", "three")):
        assert restore_table(path, key, "it is made")
        assert pq.read_table(path)["label"].to_pylist() == [number]
        kept = path.rename(path.with_suffix(".kept"))
        assert not restore_table(path, key, "it is made")  # a user who deletes it is rid of it
    kept.rename(path)
    assert not capsys.readouterr().err
    assert not restore_table(path, "four", "it is made again")
    assert f"{path} was made from something else. So it is made again" in capsys.readouterr().err
    assert len(earlier_of(run.folder)) == 3


def test_broken_tables_of_earlier_recipes_are_passed_over(tmp_path: Path) -> None:
    run = open_on(tmp_path)
    path = run.path(paths.HARD)
    write_table(pa.table(IMAGES), path, "one")
    open_on(tmp_path, amend=True, hard__fewer_than=5)
    (stored,) = run.folder.glob(f"{paths.EARLIER}/*/{paths.HARD}")
    whole = stored.read_bytes()
    unkeyed = run.folder / paths.EARLIER / "aa" / paths.HARD
    unkeyed.parent.mkdir()
    pq.write_table(pa.table(IMAGES), unkeyed)  # it does not say what it was made from
    stored.write_bytes(whole[: len(whole) // 2])
    assert not restore_table(path, "one", "it is made") and not path.exists()
    stored.write_bytes(whole)
    assert restore_table(path, "one", "it is made") and path.read_bytes() == whole


def test_an_amendment_whose_check_fails_changes_nothing(tmp_path: Path) -> None:
    run = open_on(tmp_path)
    fill(run, "first")
    before = contents(run.folder)
    other = load_recipe(run.recipe, {"hard.fewer_than": 5})

    def refuse(run: Run) -> None:
        raise CheckpointError(f"fewer than {run.recipe.hard.fewer_than}")

    with pytest.raises(CheckpointError, match="fewer than 5"):
        open_run(other, run.folder, True, refuse)
    assert contents(run.folder) == before
    open_run(run.recipe, run.folder, True, refuse)  # nothing is amended
    with pytest.raises(RunError, match="made with another recipe"):
        open_run(other, run.folder, False, refuse)


def test_the_recipe_before_an_amendment_needs_one_too(tmp_path: Path) -> None:
    run = open_on(tmp_path)
    open_on(tmp_path, amend=True, hard__fewer_than=5)
    with pytest.raises(RunError, match=r"hard\.fewer_than: 5 -> 20"):
        open_on(tmp_path)
    assert open_on(tmp_path, amend=True).recipe == run.recipe


@pytest.mark.parametrize("moves", range(len(FILES) + 1))
@pytest.mark.parametrize("done", [False, True])
def test_a_kill_leaves_no_table_beside_another_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int, done: bool
) -> None:
    """Killed before or after any step, either command goes on, and no file is lost."""
    steps = 0

    def dies(*given: Any) -> None:
        nonlocal steps
        steps += 1
        if steps <= moves:
            return move(*given)
        if done:
            move(*given)
        raise KeyboardInterrupt

    run = open_on(tmp_path)
    before = fill(run, "first")
    written = moves == len(FILES)
    name = "_write_kept" if written else "_move"
    module = open_module if written else earlier
    move = getattr(module, name)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, name, dies if not written else lambda *_: dies_at(move, done, _))
        open_on(tmp_path, amend=True, data__unreadable="skip")
    other = shutil.copytree(tmp_path / "run", tmp_path / "other" / "run")
    if written and done:
        with pytest.raises(RunError, match="made with another recipe"):
            open_on(tmp_path)
    else:
        assert open_on(tmp_path).recipe == run.recipe
    (kept,) = earlier_of(run.folder)
    kept.pop(paths.RECIPE)
    assert kept | files_of(run.folder) == before and not kept.keys() & files_of(run.folder).keys()
    shutil.rmtree(run.folder)
    shutil.move(other, run.folder)
    open_on(tmp_path, amend=True, data__unreadable="skip")
    assert files_of(run.folder) == {}
    (kept,) = earlier_of(run.folder)
    assert {name: kept[name] for name in FILES} == before


def dies_at(step: Any, done: bool, given: tuple[Any, ...]) -> None:
    if done:
        step(*given)
    raise KeyboardInterrupt


@pytest.mark.parametrize("twice", [False, True])
def test_what_an_earlier_version_set_aside_is_kept(tmp_path: Path, twice: bool) -> None:
    """That version kept the recipe, tables and results before an amendment in `former/`."""
    run = open_on(tmp_path)
    write_table(pa.table(IMAGES), run.path(paths.HARD), "one")
    first = {paths.HARD: run.path(paths.HARD).read_bytes(), paths.RESULTS: b"first"}
    run.path(paths.RESULTS).write_bytes(b"first")
    first[paths.RECIPE] = run.path(paths.RECIPE).read_bytes()
    amended = open_on(tmp_path, amend=True, hard__fewer_than=5)
    (kept,) = (run.folder / paths.EARLIER).iterdir()
    shutil.copytree(kept, run.folder / paths.FORMER)
    if not twice:
        shutil.rmtree(run.folder / paths.EARLIER)
    write_text(amended.path(paths.RESULTS), "second")
    assert open_on(tmp_path, hard__fewer_than=5).recipe == amended.recipe
    assert not (run.folder / paths.FORMER).exists() and earlier_of(run.folder) == [first]
    assert amended.path(paths.RESULTS).read_text() == "second"
    assert restore_table(run.path(paths.HARD), "one", "it is made")


def test_tables_of_an_earlier_version_are_taken_as_they_are(tmp_path: Path) -> None:
    """They lie where tables lie now; the very first ones do not say what they were made from."""
    run = open_on(tmp_path)
    pq.write_table(pa.table(IMAGES), run.path(paths.HARD))
    assert restore_table(open_on(tmp_path).path(paths.HARD), "any", "it is made")


def test_many_differences_are_counted(tmp_path: Path) -> None:
    open_on(tmp_path)
    with pytest.raises(RunError, match=r"… and 3 more"):
        open_on(tmp_path, methods={"ce": {}, **{f"method-{number}": {} for number in range(15)}})


def test_folders_that_are_no_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    open_on(tmp_path)  # an empty folder is taken
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    left = tmp_path / "run" / f".recipe.yaml.{'0' * 32}.new"
    left.write_text("half a rec")  # another process opens it now, or was killed while it did
    open_on(tmp_path)
    assert left.exists()
    os.utime(left, (0, 0))
    open_on(tmp_path)
    assert not left.exists() and (tmp_path / "run" / "recipe.yaml").exists()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(
        RunError,
        match=r"run is not empty and holds no recipe\.yaml, so it is no run folder; .*--out",
    ):
        open_on(tmp_path, amend=True)
    (tmp_path / "run" / "recipe.yaml").write_text("- flour\n- eggs\n")
    with pytest.raises(RunError, match=r"recipe\.yaml holds no recipe, so .* is no run folder"):
        open_on(tmp_path, amend=True)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match=r"run is a file; name a folder with --out"):
        open_on(tmp_path)
