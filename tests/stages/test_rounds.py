"""A loop of rounds: the same images and classifier after a kill, errors before any work."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from discl import RecipeError
from discl.errors import BrokenFileError, RunError
from discl.pipeline import generate, run_until
from discl.recipe import validate
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
from discl.spectrum.plan import PlanShard
from discl.spectrum.store import Shards
from discl.stages.round_plan import describe_rounds, read_rounds
from discl.stages.sample_pool import kept_images
from discl.stages.train import train
from discl.training import loop as training_loop

ROWS = {0: 8, 50: 4}


@pytest.fixture(scope="module")
def tree(small_tree: dict[str, Any]) -> dict[str, Any]:
    """Two rounds over 10 hard images of two classes, at two levels with two seeds."""
    return small_tree | {
        "train": {
            "epochs": 5,
            "curriculum_epochs": 4,
            "batch_size": 4,
            "steps_per_epoch": 2,
            "image_size": 32,
            "model": {"stem": "3x3", "width": 4},
        },
        "methods": {
            "ce": {"strategy": "real-only"},
            "discl": {"strategy": "diverse-to-specific", "undersample": False},
        },
        "loop": {"rounds": 2, "policy": "uniform"},
    }


def made(tree: dict[str, Any], folder: Path, stage: str = "train", amend: bool = False) -> Run:
    run = open_run(validate(tree), folder, amend)
    run_until(run, stage)
    return run


def verdicts(run: Run) -> list[dict[str, Any]]:
    return pq.read_table(run.path("filter.parquet")).to_pylist()


def weights(run: Run, name: str = "discl") -> bytes:
    return (run.path("train") / name / "model.safetensors").read_bytes()


def records(run: Run) -> list[dict[str, Any]]:
    return json.loads((run.path("loop") / "rounds.json").read_text())["rounds"]


ENTROPY = {"rounds": 2, "policy": {"name": "entropy", "low": 0.0, "high": 1.0}}


@pytest.fixture(scope="module")
def finished(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "entropy"
    return made(tree | {"loop": ENTROPY}, folder, "report")


@pytest.fixture(scope="module")
def plain(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Run:
    without = {key: each for key, each in tree.items() if key != "loop"}
    return made(without, tmp_path_factory.mktemp("runs") / "plain")


@pytest.mark.slow
def test_each_round_makes_the_level_that_its_epochs_draw(
    tree: dict[str, Any], plain: Run, tmp_path: Path
) -> None:
    run = made(tree, tmp_path / "run", "filter")
    rows = verdicts(run)
    assert {(row["round"], row["level"]) for row in rows} == {(0, 0), (1, 50)}
    assert Counter((row["source_id"], row["level"]) for row in rows) == Counter(
        {(source, level): 2 for source in {row["source_id"] for row in rows} for level in ROWS}
    )
    assert {row["why"] for row in rows} == {"uniform"}
    assert [record["epochs"] for record in records(run)] == [[0, 2]]
    assert run.spectrum.ids() == plain.spectrum.ids()  # the same images, in another order


@pytest.mark.slow
def test_a_loop_of_one_round_is_a_run_without_a_loop(
    tree: dict[str, Any], plain: Run, tmp_path: Path
) -> None:
    one = made(tree | {"loop": {"rounds": 1, "policy": "entropy"}}, tmp_path / "one")
    for name in ("plan.parquet", "filter.parquet"):
        assert one.path(name).read_bytes() == plain.path(name).read_bytes()
    assert weights(one) == weights(plain)
    assert not one.path("loop").exists()
    notes = [
        json.loads((run.path("train") / "discl/method.json").read_text()) for run in (one, plain)
    ]
    assert notes[0] == notes[1]


@pytest.mark.slow
def test_a_measuring_policy_holds_hard_images_out_and_says_why(finished: Run) -> None:
    rows, (record,) = verdicts(finished), records(finished)
    assert {row["round"] for row in rows} == {0, 1}
    apart = {row["source_id"] for row in rows if row["why"].startswith("held out")}
    assert len(apart) == 2  # a fifth of each class
    assert {row["level"] for row in rows if row["source_id"] in apart} == {0, 50}
    measured = record["measured"]
    assert {level for each in measured.values() for level in each} == {"0", "50", "100"}
    assert all(
        0 <= value <= 1
        for each in measured.values()
        for images in each.values()
        for values in images.values()
        for value in values
    )
    assert any(row["why"].startswith("entropy 0.") for row in rows if row["round"] == 1)
    assert sum(ROWS[row["level"]] for row in rows) <= 10 * 2 * sum(ROWS.values())
    assert record["validation"]["accuracy"] >= 0


def test_the_report_shows_the_rounds(finished: Run) -> None:
    page = finished.path("report.html").read_text()
    assert "The rounds" in page and "by the policy entropy" in page
    rows = verdicts(finished)
    for number, epochs in ((0, "1 to 2"), (1, "3 to 5")):
        own = [row for row in rows if row["round"] == number]
        cost = sum(ROWS[row["level"]] for row in own)
        assert f"<td>{epochs}</td>" in page
        assert f"<td>{len(own)}</td><td>{len(own)}</td><td>{cost}</td>" in page


class Killed(Exception):
    """Stands for the end of a process."""


@pytest.mark.slow
def test_a_loop_that_is_killed_in_any_round_comes_to_the_same_result(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while it writes images, then in the first round's training, then in the second's."""
    append, validate_epoch = Shards.append, training_loop._validate
    for what, stop in (("images", 4), ("epoch", 1), ("images", 3), ("epoch", 4)):
        calls = iter(range(1, 10**6))

        def appended(shards: Shards, rows: Any, stop: int = stop, calls: Any = calls) -> None:
            if next(calls) == stop:
                raise Killed
            append(shards, rows)

        def validated(*values: Any, stop: int = stop, calls: Any = calls) -> None:
            if values[0].guidance is None and next(calls) == stop:
                raise Killed
            validate_epoch(*values)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            if what == "images":
                patched.setattr(Shards, "append", appended)
            else:
                patched.setattr(training_loop, "_validate", validated)
            made_again(finished, tmp_path)
    again = made_again(finished, tmp_path)
    assert verdicts(again) == verdicts(finished)
    assert records(again) == records(finished)
    assert weights(again) == weights(finished)


def made_again(run: Run, tmp_path: Path) -> Run:
    again = open_run(run.recipe, tmp_path / "run")
    run_until(again, "train")
    return again


def test_the_final_training_goes_on_from_the_rounds_or_goes_through_them_again(
    finished: Run, tmp_path: Path
) -> None:
    """The folder of another seed has no rounds; the result is the same."""
    shutil.copytree(finished.folder, tmp_path / "run")
    run = open_run(finished.recipe, tmp_path / "run")
    (run.path("loop") / "learner" / "checkpoint.safetensors").unlink()
    shutil.rmtree(run.path("train") / "discl")
    train(run)
    assert weights(run) == weights(finished)
    histories = [
        [
            {key: value for key, value in json.loads(line).items() if "seconds" not in key}
            for line in (each.path("train") / "discl" / "history.jsonl").read_text().splitlines()
        ]
        for each in (run, finished)
    ]
    assert histories[0] == histories[1] and len(histories[0]) == 5


def test_the_plan_says_how_far_the_loop_is(tree: dict[str, Any], tmp_path: Path) -> None:
    run = made(tree | {"loop": ENTROPY}, tmp_path / "run", "plan")
    assert describe_rounds(run).startswith("round 1 of 2 (entropy, learner discl)")
    assert "240 UNet rows at most" in describe_rounds(run)
    assert not run.path("spectrum").exists()
    with pytest.raises(RunError, match="--shard"):
        generate(run, PlanShard(1, 2))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"loop": {"rounds": 0}}, "loop.rounds"),
        ({"loop": {"rounds": 5}}, "4 curriculum epochs"),
        ({"loop": {"rounds": 2, "policy": "entropie"}}, "'entropie'"),
        ({"loop": {"rounds": 2, "policy": 3}}, "loop.policy"),
        ({"loop": {"rounds": 2, "policy": {"name": "deficit", "target": 0}}}, "target"),
        ({"loop": {"rounds": 2, "policy": {"name": "entropy", "rounds": 3}}}, "rounds"),
        ({"loop": {"rounds": 2, "policy": {"name": "entropy", "low": 0.9, "high": 0.1}}}, "low"),
        ({"loop": {"rounds": 2, "learner": "dicsl"}}, "dicsl"),
        ({"loop": {"rounds": 2, "learner": "ce"}}, "real-only"),
        ({"loop": {"rounds": 2, "hold_out": 0.9}}, "loop.hold_out"),
        ({"loop": {"rounds": 2}, "methods": {"ce": {"strategy": "real-only"}}}, "real-only"),
        ({"loop": {"rounds": 2}, "methods": {"a": {"strategy": "all-levels", "system": "docl"}}},
         "docl"),
        ({"loop": {"rounds": 2}, "methods": {"a": {"strategy": "all-levels", "prior": "effective",
                                                   "objective": "balanced-softmax"}}}, "effective"),
        ({"loop": {"rounds": 2}, "methods": {"a": {"strategy": "fixed", "level": 100}}}, "100"),
    ],
    ids=str,
)  # fmt: skip
def test_a_loop_that_cannot_go_on_is_an_error(
    values: dict[str, Any], named: str, tree: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError) as error:
        validate(tree | values)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("spectrum", {"tries": 2}),
        ("filter", {"rule": "alia"}),
    ],
)
def test_a_loop_asks_for_further_seeds_and_needs_verdicts_that_stay(
    key: str, change: dict[str, Any], tree: dict[str, Any]
) -> None:
    with pytest.raises(RecipeError, match=rf"loop\.rounds.*{key}"):
        validate(tree | {key: tree[key] | change})


def test_a_round_without_an_image_for_each_class_is_an_error_before_anything_is_made(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    small = tree | {"spectrum": tree["spectrum"] | {"budget": {"images": 3}}}
    with pytest.raises(RecipeError, match=r"loop\.rounds: round 1 of 2 may spend 1 image"):
        made(small, tmp_path / "run")
    assert not (tmp_path / "run" / "spectrum").exists()


def spoiled(text: str) -> list[str]:
    """Files of other people: cut off, of another kind, or with records that are none."""
    kept = json.loads(text)
    (record,) = kept["rounds"]
    wrong = [
        5,
        [3],
        [{}],
        [record | {"round": 1}],
        [record | {"epochs": "0"}],
        [record | {"asked": {"x": {"0": 1}}}],
        [record | {"kept": {"0": {"0": "many"}}}],
        [record | {"rows": [1]}],
        [record | {"measured": {"0": {"0": {"entropy": [0.1], "probability": []}}}}],
        [record | {"kept_digest": None}],
    ]
    return ["", text[:40], "[]", *(json.dumps(kept | {"rounds": each}) for each in wrong)]


def test_broken_records_start_the_rounds_again(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder, tmp_path / "run", ignore=shutil.ignore_patterns("train"))
    run = open_run(finished.recipe, tmp_path / "run")
    path = run.path("loop") / "rounds.json"
    text = path.read_text()
    assert read_rounds(run, "discl") == records(finished)
    for each in spoiled(text):
        path.write_text(each)
        assert read_rounds(run, "discl") == []
    path.write_text(text)
    other = validate(finished.recipe.plain() | {"loop": {"rounds": 2, "policy": "deficit"}})
    assert read_rounds(open_run(other, tmp_path / "run", amend=True), "discl") == []


@pytest.mark.slow
def test_a_table_of_another_run_is_no_table_of_rounds(
    finished: Run, plain: Run, tmp_path: Path
) -> None:
    shutil.copytree(finished.folder, tmp_path / "run", ignore=shutil.ignore_patterns("train"))
    run = open_run(finished.recipe, tmp_path / "run")
    shutil.copyfile(plain.path("filter.parquet"), run.path("filter.parquet"))
    with pytest.raises(BrokenFileError, match="'round'"):
        kept_images(run)
    table = pq.read_table(finished.path("filter.parquet"))
    late = table["round"].to_numpy() + 7
    pq.write_table(table.set_column(table.column_names.index("round"), "round", [late]),
                   run.path("filter.parquet"))  # fmt: skip
    with pytest.raises(BrokenFileError, match="0 to 1"):
        kept_images(run)


@pytest.mark.slow
def test_an_adaptive_learner_gets_images_of_its_level_only(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    method = {"strategy": "adaptive", "undersample": False, "guidance_images": 1}
    run = made(tree | {"methods": {"mine": method}}, tmp_path / "run")
    rows, (record,) = verdicts(run), records(run)
    assert {row["level"] for row in rows if row["round"] == 0} == {0, 50}
    gain = record["progress"]["gain"]
    best = int(min(gain, key=lambda level: (-gain[level], int(level))))
    assert {row["level"] for row in rows if row["round"] == 1} == {best}
    history = (run.path("train") / "mine" / "history.jsonl").read_text().splitlines()
    assert len(history) == 5
    before = weights(run, "mine")
    shutil.rmtree(run.path("train") / "mine")
    shutil.rmtree(run.path("loop") / "learner")
    train(run)
    assert weights(run, "mine") == before  # V is the same set in all rounds
