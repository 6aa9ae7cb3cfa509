"""The plan: what is asked for, and ids that name exactly what determines the pixels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from discl.prompts import draw_prompt
from discl.spectrum.plan import Request, Sampling, plan_requests, read_plan, unet_rows, write_plan

SAMPLING = Sampling(
    model="m" * 32,
    scheduler="s" * 32,
    num_inference_steps=50,
    guidance_scale=10.0,
    size=64,
    dtype="float32",
    encoding="webp-lossless",
)
SOURCES = [
    {"id": "bag/1.png", "digest": "d1", "label": 3},
    {"id": "bag/2.png", "digest": "d2", "label": 3},
    {"id": "hat/1.png", "digest": "d3", "label": 4},
]
PROMPTS = {3: ["a photo of a bag", "a bag on a chair", "an old bag"], 4: ["a photo of a hat"]}
PERCENTS = (0, 10, 30, 50)

PRINT_IDS = """
import json
from discl.spectrum.plan import Sampling, plan_requests
sources, prompts, sampling, percents, seeds = json.loads(input())
levels = list(percents)
prompts = {int(label): texts for label, texts in prompts.items()}
sampling = Sampling(**sampling)
options = {"negative_prompt": "blurry", "sampling": sampling}
requests = plan_requests(sources, levels, seeds, prompts, **options)
print(json.dumps([request.id for request in requests]))
"""


def plan(
    percents: Sequence[int] = PERCENTS,
    seeds: int = 2,
    sources: Sequence[dict[str, Any]] = SOURCES,
    negative: str = "blurry",
    sampling: Sampling = SAMPLING,
    prompts: dict[int, list[str]] = PROMPTS,
) -> list[Request]:
    return plan_requests(
        sources,
        list(percents),
        seeds,
        prompts,
        negative_prompt=negative,
        sampling=sampling,
    )


def ids(requests: Sequence[Request]) -> set[str]:
    return {request.id for request in requests}


def test_every_source_seed_and_level_once() -> None:
    requests = plan()
    asked = [(request.source_id, request.seed, request.level) for request in requests]
    assert asked == [
        (source["id"], seed, percent)
        for source in SOURCES
        for seed in (0, 1)
        for percent in PERCENTS
    ]
    assert len(ids(requests)) == 3 * 2 * 4
    assert {(request.source_id, request.source_digest, request.label) for request in requests} == {
        ("bag/1.png", "d1", 3),
        ("bag/2.png", "d2", 3),
        ("hat/1.png", "d3", 4),
    }
    assert {(request.attempt, request.negative_prompt) for request in requests} == {(0, "blurry")}


def test_levels_of_a_spectrum_share_a_prompt_which_seeds_draw_anew() -> None:
    requests = plan(seeds=8)
    for source in SOURCES:
        of_source = [request for request in requests if request.source_id == source["id"]]
        for seed in range(8):
            assert {request.prompt for request in of_source if request.seed == seed} == {
                draw_prompt(PROMPTS[source["label"]], source["id"], seed, 0)
            }
        assert len({request.prompt for request in of_source}) >= min(
            2, len(PROMPTS[source["label"]])
        )


@pytest.mark.slow
def test_same_ids_in_another_process() -> None:
    """With another seed of the built-in hash, which must not play a part."""
    arguments = [
        SOURCES,
        PROMPTS,
        {field.name: getattr(SAMPLING, field.name) for field in fields(Sampling)},
        PERCENTS,
        2,
    ]
    done = subprocess.run(
        [sys.executable, "-c", PRINT_IDS],
        input=json.dumps(arguments),
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [request.id for request in plan()]


def test_ids_written_out() -> None:
    """Pinned: another digest would make every spectrum on every disk be generated again."""
    assert plan()[0].id == "e93950f3e31f68d70410556f133f11b0"
    assert plan()[-1].id == "6e5ca94a6d97d52ce7fe109eb4201877"


def test_order_of_sources_and_levels_does_not_matter() -> None:
    assert ids(plan(percents=PERCENTS[::-1], sources=SOURCES[::-1])) == ids(plan())
    assert [request.level for request in plan(percents=(50, 0, 30, 10))] == [
        request.level for request in plan()
    ]


def test_more_levels_seeds_or_sources_only_add() -> None:
    before = plan(percents=(0, 30), seeds=2, sources=SOURCES[:2])
    for more in (
        plan((0, 10, 30), 2, SOURCES[:2]),
        plan((0, 30), 5, SOURCES[:2]),
        plan((0, 30), 2, SOURCES),
    ):
        assert ids(before) < ids(more)
        assert set(before) < set(more)


def test_an_option_that_is_not_used_does_not_enter_the_ids() -> None:
    """Options came after the first spectra were made, whose ids they must not change."""
    assert set(SAMPLING.identity()) == {
        "model",
        "scheduler",
        "num_inference_steps",
        "guidance_scale",
        "size",
        "dtype",
        "encoding",
    }
    assert set(replace(SAMPLING, steps="fixed").identity()) - set(SAMPLING.identity()) == {"steps"}


@pytest.mark.parametrize("name", [field.name for field in fields(Sampling)])
def test_every_field_of_the_sampling_changes_every_id(name: str) -> None:
    value = getattr(SAMPLING, name)
    other = replace(SAMPLING, **{name: value + "x" if isinstance(value, str) else value + 1})
    assert not ids(plan(sampling=other)) & ids(plan())


def test_whatever_else_determines_the_pixels_changes_the_id() -> None:
    before = ids(plan())
    assert not ids(plan(negative="")) & before
    assert not ids(plan(prompts={3: ["a bag"], 4: ["a hat"]})) & before
    assert (
        not ids(plan(sources=[{**source, "digest": source["digest"] + "x"} for source in SOURCES]))
        & before
    )
    assert (
        not ids(plan(sources=[{**source, "id": source["id"] + "x"} for source in SOURCES])) & before
    )


def test_the_label_is_only_written_down() -> None:
    """The pixels come from the prompt: two labels with the same texts ask for the same images."""
    prompts = {3: ["a bag"], 4: ["a bag"]}
    relabelled = [{**source, "label": 4} for source in SOURCES]
    assert ids(plan(sources=relabelled, prompts=prompts)) == ids(plan(prompts=prompts))
    assert {request.label for request in plan(sources=relabelled, prompts=prompts)} == {4}


def test_unet_rows_are_twice_the_steps_of_all_requests() -> None:
    """At T = 50 the levels take 50, 45, 35 and 25 steps; 3 sources × 2 seeds, two rows a step."""
    assert [request.steps(50) for request in plan()[:4]] == [50, 45, 35, 25]
    assert unet_rows(plan(), 50, 10.0) == 2 * 6 * (50 + 45 + 35 + 25) == 1860
    assert unet_rows(plan(), 50, 1.0) == 930
    assert unet_rows(plan(), 4, 10.0) == 2 * 6 * (4 + 3 + 2 + 2)
    assert unet_rows([], 50, 10.0) == 0


def test_fixed_steps_are_all_of_them_at_every_level() -> None:
    assert unet_rows(plan(), 50, 10.0, fixed=True) == 2 * 6 * 4 * 50


def test_unguided_steps_take_one_row() -> None:
    """Guided above 0.4 of the noise at T = 50: all but the last 20 steps. Level 50 has 25 steps."""
    assert unet_rows(plan(), 50, 10.0, guidance_interval=(0.4, 1.0)) == 6 * (
        100 - 20 + 90 - 20 + 70 - 20 + 50 - 20
    )
    assert unet_rows(plan(), 50, 1.0, guidance_interval=(0.4, 1.0)) == 930
    fixed = unet_rows(plan(percents=(50,)), 50, 10.0, fixed=True, guidance_interval=(0.4, 1.0))
    assert fixed == 6 * (50 + 10)  # its noise falls from 0.5, and a fifth of that lies above 0.4
    assert unet_rows(plan(), 50, 10.0, guidance_interval=(0.0, 0.5)) == 6 * (
        4 * 25 + 50 + 45 + 35 + 25
    )


def test_sources_may_name_the_size_of_what_is_made() -> None:
    wide = plan(sources=[{**source, "width": 80, "height": 48} for source in SOURCES])
    assert {(request.width, request.height) for request in wide} == {(80, 48)} and ids(wide) == ids(
        plan()
    )
    assert {(request.width, request.height) for request in plan()} == {(64, 64)}


@pytest.mark.parametrize("seeds", [0, 2])
def test_to_disk_and_back(seeds: int, tmp_path: Path) -> None:
    requests = plan(seeds=seeds)
    write_plan(requests, tmp_path / "plan.parquet")
    assert read_plan(tmp_path / "plan.parquet") == requests
