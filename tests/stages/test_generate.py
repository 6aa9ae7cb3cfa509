"""Phase 1 with its options, on pictures of several shapes: what is stored says how it was made."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from discl.errors import CheckpointError, DataError, RecipeError
from discl.pipeline import run_until
from discl.recipe import validate
from discl.run_folder.open import open_run
from discl.spectrum.store import score_shards
from discl.stages import filter as filter_stage
from discl.stages import generate as generate_stage
from discl.stages import pending as pending_stage
from discl.stages.budget import count_rows
from discl.stages.plan import estimate_cost

SHAPES = ((48, 32), (32, 48), (32, 32), (400, 20))


@pytest.fixture
def tree(tmp_path: Path, tiny_diffusion: Path, tiny_clip: Path) -> dict[str, Any]:
    for split in ("train", "test"):
        for label, name in enumerate(("boot", "hat")):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index, (width, height) in enumerate(SHAPES):
                noise = np.random.default_rng([label, index, len(split)]).integers(
                    256, size=(height, width, 3), dtype=np.uint8
                )
                Image.fromarray(noise).save(folder / f"{index}.png")
    return {
        "name": "shapes",
        "data": {"root": str(tmp_path / "data")},
        "spectrum": {
            "checkpoint": str(tiny_diffusion),
            "levels": [0, 50],
            "seeds": 1,
            "num_inference_steps": 4,
            "guidance_scale": 4,
        },
        "filter": {"checkpoint": str(tiny_clip), "threshold": -1},
        "train": {"batch_size": 4},
        "methods": {"ce": {}},
        "runtime": {"device": "cpu", "slots": 2},
    }


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        row
        for shard in sorted(folder.glob("spectrum/part-*.parquet"))
        for row in pq.read_table(shard).to_pylist()
    ]


def test_pictures_keep_their_aspect(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["spectrum"] |= {"resize": "keep-aspect"}
    run = open_run(validate(tree), tmp_path / "run")
    run_until(run, "generate")
    made = rows_of(run.folder)
    shapes = {
        ((row["source_width"], row["source_height"]), (row["width"], row["height"])) for row in made
    }
    assert shapes == {
        ((48, 32), (40, 28)),
        ((32, 48), (28, 40)),
        ((32, 32), (32, 32)),
        ((400, 20), (64, 16)),
    }
    assert all(
        Image.open(io.BytesIO(row["image"]["bytes"])).size == (row["width"], row["height"])
        for row in made
    )
    assert len(made) == 16 and {row["resize"] for row in made} == {"keep-aspect"}
    assert estimate_cost(run)["images"] == 0
    run_until(run, "filter")


def test_options_are_recorded_and_counted(tree: dict[str, Any], tmp_path: Path) -> None:
    plain = open_run(validate(tree), tmp_path / "plain")
    run_until(plain, "plan")
    before = pq.read_table(plain.path("plan.parquet")).to_pylist()
    tree["spectrum"] |= {"steps": "fixed", "guidance_interval": [0.4, 1]}
    run = open_run(validate(tree), tmp_path / "run")
    run_until(run, "generate")
    made = rows_of(run.folder)
    assert {(row["steps"], row["guidance_from"], row["guidance_to"]) for row in made} == {
        ("fixed", 0.4, 1.0)
    }
    assert not {row["id"] for row in made} & {row["id"] for row in before}
    from discl.spectrum.plan import read_plan

    # level 0 begins its steps at 1, 3/4, 1/2, 1/4 of the noise, level 50 at 1/2, 3/8, 1/4, 1/8
    assert count_rows(run, read_plan(run.path("plan.parquet"))) == 8 * (2 + 2 + 2 + 1) + 8 * (
        2 + 1 + 1 + 1
    )


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["dpm-solver++", "tcd"])
def test_a_sampler_is_recorded_and_what_is_lost_is_made_again(
    tree: dict[str, Any], tmp_path: Path, sampler: str
) -> None:
    tree["spectrum"] |= {"sampler": sampler, "timestep_spacing": "trailing"}
    tree["runtime"] |= {"shard_rows": 5}
    run = open_run(validate(tree), tmp_path / "run")
    run_until(run, "generate")
    made = {row["id"]: row for row in rows_of(run.folder)}
    assert {(row["sampler"], row["timestep_spacing"]) for row in made.values()} == {
        (sampler, "trailing")
    }
    lost, *_ = sorted(run.folder.glob("spectrum/part-*.parquet"))
    lost.unlink()
    run_until(open_run(validate(tree), tmp_path / "run"), "generate")
    assert {row["id"]: row for row in rows_of(run.folder)} == made
    from discl.stages.provenance import describe_making

    facts = describe_making(run.recipe, run.generator, run.size)
    assert facts["sampler"].startswith(f"{sampler} with trailing timesteps; 4 inference steps")


def test_a_run_from_before_a_key_was_there_is_the_same_run(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    kept = open_run(validate(tree), tmp_path / "run").folder / "recipe.yaml"
    older = yaml.safe_load(kept.read_text())
    assert not {"sampler", "timestep_spacing"} & set(older["spectrum"])
    for key in ("steps", "guidance_interval", "resize"):
        del older["spectrum"][key]
    kept.write_text(yaml.safe_dump(older))
    open_run(validate(tree), tmp_path / "run")


def test_bad_options_are_told(tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"guidance_interval = \[0.8, 0.2\] is empty"):
        validate(
            json.loads(json.dumps(tree))
            | {"spectrum": tree["spectrum"] | {"guidance_interval": [0.8, 0.2]}}
        )
    high = tree | {
        "spectrum": tree["spectrum"] | {"steps": "fixed", "num_inference_steps": 50, "levels": [97]}
    }
    with pytest.raises(CheckpointError, match="level 97 % has fewer than 50 training steps"):
        run_until(open_run(validate(high), tmp_path / "run"), "plan")


def test_scores_are_those_of_one_scorer(tmp_path: Path) -> None:
    scores = score_shards(tmp_path / "scores")
    assert pending_stage.scores_by(scores, "a") == {}
    for scorer, cosines in {"a": (0.25, -0.5), "b": (1.0, 0.0, 0.5)}.items():
        scores.append(
            [
                {"id": f"id-{row}", "scorer": scorer, "clip_similarity": cosine}
                for row, cosine in enumerate(cosines)
            ]
        )
    assert pending_stage.scores_by(scores, "a") == {"id-0": 0.25, "id-1": -0.5}
    assert pending_stage.scores_by(scores, "b") == {"id-0": 1.0, "id-1": 0.0, "id-2": 0.5}


def test_the_filter_reads_an_image_again_only_for_another_scorer(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    scored = filter_stage.score_missing

    def watched(run: Any, requests: Any) -> None:
        read.append(len(requests))
        scored(run, requests)

    monkeypatch.setattr(filter_stage, "score_missing", watched)
    run_until(open_run(validate(tree), tmp_path / "run"), "filter")
    assert read == []
    first = pq.read_table(tmp_path / "run" / "filter.parquet").to_pylist()
    other = validate(tree | {"filter": tree["filter"] | {"template": "a drawing of a {class}"}})
    run_until(open_run(other, tmp_path / "run", amend=True), "filter")
    assert read == [16]
    second = pq.read_table(tmp_path / "run" / "filter.parquet").to_pylist()
    assert [row["id"] for row in first] == [row["id"] for row in second]
    assert [row["clip_similarity"] for row in first] != [row["clip_similarity"] for row in second]
    for shard in (tmp_path / "run" / "scores").glob("part-*.parquet"):
        shard.unlink()
    run_until(open_run(validate(tree), tmp_path / "run", amend=True), "filter")
    assert read == [16, 16]
    assert pq.read_table(tmp_path / "run" / "filter.parquet").to_pylist() == first


def write_png(path: Path, width: int, height: int) -> None:
    """A black picture of one bit a pixel, in a file of a few kilobytes whatever its size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    packed, row = zlib.compressobj(1), bytes((width + 7) // 8 + 1)
    content = b"".join(packed.compress(row) for _ in range(height)) + packed.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", content)
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (0, 9, "no image"),
        (100_000, 1, "100000×1 pixels; at most 20000 a side"),
        (19_000, 19_000, "could be decompression bomb"),
    ],
)
def test_a_source_that_became_unreadable_is_named_and_finished_work_is_kept(
    width: int, height: int, message: str, tree: dict[str, Any], tmp_path: Path
) -> None:
    first = tree | {"spectrum": tree["spectrum"] | {"levels": [0]}}
    run_until(open_run(validate(first), tmp_path / "run"), "generate")
    before = {row["id"]: row["image"]["bytes"] for row in rows_of(tmp_path / "run")}
    write_png(tmp_path / "data" / "train" / "hat" / "2.png", width, height)
    with pytest.raises(DataError, match=rf"image 'train/hat/2.png'.* cannot be read: .*{message}"):
        run_until(open_run(validate(tree), tmp_path / "run", amend=True), "generate")
    assert (
        before.items()
        <= {row["id"]: row["image"]["bytes"] for row in rows_of(tmp_path / "run")}.items()
        and len(before) == 8
    )
    with pytest.raises(DataError, match=message):  # a new run finds it while the data are checked
        run_until(open_run(validate(tree), tmp_path / "other"), "data")


def test_a_negative_prompt_without_effect_is_told_once(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree["spectrum"] |= {"guidance_scale": 1, "levels": [50]}
    run_until(
        open_run(validate(tree | {"prompts": {"negative": "blurry"}}), tmp_path / "run"), "generate"
    )
    assert (
        capsys.readouterr().err.count(
            "prompts.negative has no effect, because spectrum.guidance_scale is 1"
        )
        == 1
    )
    generate_stage._warn_of_unused(open_run(validate(tree), tmp_path / "other"))
    assert "no effect" not in capsys.readouterr().err
