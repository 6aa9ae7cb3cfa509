"""Further tries until the filter keeps one: the same images after a kill and in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from discl.pipeline import run_until
from discl.recipe import validate
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
from discl.spectrum.draws import DrawRule, follow_draws
from discl.spectrum.plan import Request
from discl.spectrum.store import Shards
from discl.stages.pending import draws_so_far
from discl.stages.plan import describe_cost, estimate_cost

TRIES = 3


class Killed(Exception):
    """Stands for the end of a process."""


# ---------------------------------------------------------------- the rule


def request(name: str, attempt: int = 0) -> Request:
    return Request(f"{name}{attempt}", name, "", 0, 50, 0, attempt, "", "", 8, 8)


@pytest.mark.parametrize(
    ("cosines", "tried", "unscored"),
    [
        ({}, "a0 b0", "a0 b0"),
        ({"a0": 0.4, "b0": 0.2}, "a0 b0 b1", "b1"),
        ({"a0": 0.4, "b0": 0.2, "b1": 0.3}, "a0 b0 b1", ""),
        ({"a0": 0.1, "b0": 0.3}, "a0 a1 b0", "a1"),
        ({"a0": 0.1, "a1": 0.1, "a2": 0.1, "a3": 0.9, "b0": 0.3}, "a0 a1 a2 b0", ""),
        (
            {"a0": 0.4, "a1": 0.9, "b0": 0.3, "b1": 0.9},
            "a0 b0",
            "",
        ),  # further tries of a run that was stricter
        ({"a1": 0.9, "b0": float("nan"), "b1": 0.5}, "a0 b0 b1", "a0"),
    ],
)
def test_a_dropped_image_is_followed_by_its_next_try(
    cosines: dict[str, float], tried: str, unscored: str
) -> None:
    plan = [request("a"), request("b")]
    found = follow_draws(
        plan,
        lambda first, seed, attempt: request(first.source_id, attempt),
        cosines,
        lambda cosine: cosine >= 0.3,
        rule=DrawRule(TRIES),
    )
    assert [" ".join(each.id for each in part) for part in found] == [tried, unscored]


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def tree(
    tmp_path_factory: pytest.TempPathFactory, tiny_diffusion: Path, tiny_clip: Path
) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        for label, name in enumerate(("boot", "hat")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(3):
                noise = np.random.default_rng([label, index, len(split)]).integers(
                    256, size=(32, 32, 3), dtype=np.uint8
                )
                Image.fromarray(noise).save(folder / f"{index}.png")
    return {
        "name": "tries",
        "data": {"root": str(root)},
        "prompts": {"templates": ["a photo of {class}", "a drawing of {class}", "{class}"]},
        "spectrum": {
            "checkpoint": str(tiny_diffusion),
            "levels": [0, 50],
            "seeds": 2,
            "num_inference_steps": 2,
            "guidance_scale": 4,
            "tries": TRIES,
        },
        "filter": {"checkpoint": str(tiny_clip), "threshold": -1},
        "train": {"batch_size": 4},
        "methods": {"ce": {}},
        "runtime": {"device": "cpu", "slots": 2, "shard_rows": 5},
    }


def at(tree: dict[str, Any], threshold: float) -> Any:
    return validate(tree | {"filter": tree["filter"] | {"threshold": threshold}})


def verdicts(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "filter.parquet").to_pylist()


def pictures(folder: Path) -> dict[str, bytes]:
    rows = [
        row
        for shard in folder.glob("spectrum/part-*.parquet")
        for row in pq.read_table(shard).to_pylist()
    ]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row["image"]["bytes"] for row in rows}


@pytest.fixture(scope="module")
def thresholds(
    tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[float, float]:
    """Two thresholds: first tries pass one in about two of three cases, the other in one."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    run_until(open_run(at(tree, -1), folder), "filter")
    assert {row["attempt"] for row in verdicts(folder)} == {0}
    low, high = np.quantile([row["clip_similarity"] for row in verdicts(folder)], [0.35, 0.65])
    return float(low), float(high)


@pytest.fixture(scope="module")
def finished(
    tree: dict[str, Any], thresholds: tuple[float, float], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    run = open_run(at(tree, thresholds[1]), tmp_path_factory.mktemp("runs") / "finished")
    run_until(run, "filter")
    return run


def test_each_image_is_drawn_until_it_is_kept(
    finished: Run, thresholds: tuple[float, float]
) -> None:
    rows = verdicts(finished.folder)
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["source_id"], row["level"], row["seed"]), []).append(row)
    assert len(groups) == 6 * 2 * 2 == pq.read_metadata(finished.path("plan.parquet")).num_rows
    for tried in groups.values():
        assert [row["attempt"] for row in tried] == list(range(len(tried)))
        assert [row["keep"] for row in tried[:-1]] == [False] * (len(tried) - 1)
        assert tried[-1]["keep"] == (tried[-1]["clip_similarity"] >= np.float32(thresholds[1]))
        assert tried[-1]["keep"] or len(tried) == TRIES
    assert {len(tried) for tried in groups.values()} == {1, 2, 3}
    assert (
        set(pictures(finished.folder))
        == {row["id"] for row in rows}
        == {each.id for each in draws_so_far(finished)[0]}
    )
    stored = [
        row for shard in finished.spectrum.files() for row in pq.read_table(shard).to_pylist()
    ]
    later = {(row["source_id"], row["seed"], row["attempt"]): row["prompt"] for row in stored}
    assert any(prompt != later[source, seed, 0] for (source, seed, _), prompt in later.items())
    assert all(
        later[row["source_id"], row["seed"], row["attempt"]] == row["prompt"] for row in stored
    )  # shared by the levels


def test_the_first_tries_are_those_of_a_run_without_others(
    finished: Run, tree: dict[str, Any], tmp_path: Path
) -> None:
    once = validate(tree | {"spectrum": tree["spectrum"] | {"tries": 1}, "filter": tree["filter"]})
    run_until(open_run(once, tmp_path / "run"), "generate")
    made, all_tries = pictures(tmp_path / "run"), pictures(finished.folder)
    assert made.items() <= all_tries.items() and len(made) < len(all_tries)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stops",
    [
        pytest.param((1, 2, 3), marks=pytest.mark.slow),
        (4, 9),
        pytest.param((12, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_killed_run_comes_to_the_same_images(
    stops: tuple[int, ...],
    finished: Run,
    tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, append = tmp_path / "run", Shards.append
    for stop in stops:
        calls = iter(range(1, 10**6))

        def killed(shards: Shards, rows: Any, stop: int = stop, calls: Any = calls) -> None:
            if next(calls) == stop:
                raise Killed
            append(shards, rows)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(Shards, "append", killed)
            run_until(open_run(finished.recipe, folder), "filter")
    run_until(open_run(finished.recipe, folder), "filter")
    assert verdicts(folder) == verdicts(finished.folder)
    assert pictures(folder) == pictures(finished.folder)


@pytest.mark.slow
def test_another_threshold_draws_what_it_lacks_and_forgets_what_it_does_not_need(
    finished: Run, tree: dict[str, Any], thresholds: tuple[float, float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run_until(open_run(at(tree, thresholds[0]), folder), "filter")
    mild, before = verdicts(folder), pictures(folder)
    assert len(mild) < len(verdicts(finished.folder))
    run_until(open_run(finished.recipe, folder, amend=True), "filter")
    assert verdicts(folder) == verdicts(finished.folder)
    assert before.items() <= pictures(folder).items()
    run_until(open_run(at(tree, thresholds[0]), folder, amend=True), "filter")
    assert verdicts(folder) == mild


@pytest.mark.slow
def test_another_clip_text_is_scored_before_anything_is_drawn_again(
    finished: Run, tree: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run_until(open_run(validate(tree), folder), "filter")
    other = validate(
        tree | {"filter": tree["filter"] | {"template": "{class}, a thing", "threshold": 1}}
    )
    run_until(open_run(other, folder, amend=True), "filter")
    rows = verdicts(folder)
    assert len(rows) == 24 * TRIES and not any(row["keep"] for row in rows)


def test_the_estimate_names_what_may_come_on_top(
    tree: dict[str, Any], finished: Run, tmp_path: Path
) -> None:
    run = open_run(finished.recipe, tmp_path / "run")
    run_until(run, "plan")
    cost = estimate_cost(run)
    assert (cost["images"], cost["further_images"]) == (24, 24 * (TRIES - 1))
    assert cost["further_rows"] == (TRIES - 1) * cost["unet_rows"] == (TRIES - 1) * 12 * 2 * (2 + 1)
    assert "up to 48 further tries with 144 UNet rows" in describe_cost(cost)
    assert estimate_cost(finished)["images"] == estimate_cost(finished)["further_images"] == 0
