"""The worker: what it stores, what it counts, and what is left when something stops it."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from discl.data import decode_image
from discl.errors import RunError, StoreError
from discl.spectrum import store as store_module
from discl.spectrum import worker as worker_module
from discl.spectrum.clip_filter import ClipScorer
from discl.spectrum.encoding import encode_image
from discl.spectrum.engine import Engine
from discl.spectrum.models import load_generator
from discl.spectrum.models.stable_diffusion import StableDiffusion
from discl.spectrum.plan import Request, Sampling, plan_requests, unet_rows
from discl.spectrum.store import Shards, score_shards, spectrum_shards
from discl.spectrum.worker import Worker

from .test_engine import PROMPTS, load_pixels

NAMES = ("shirt", "boot")
TEXTS = {0: "a photo of a shirt", 1: "a photo of a boot"}
LEVELS = (0, 50, 75)


def make_sampling(encoding: str = "webp-lossless") -> Sampling:
    return Sampling("model", "scheduler", 4, 4.0, 32, "float32", encoding)


def make_requests(sources: int, sampling: Sampling) -> list[Request]:
    rows = [
        {"id": f"image-{index}", "digest": f"digest-{index}", "label": index % 2}
        for index in range(sources)
    ]
    return plan_requests(rows, list(LEVELS), 1, PROMPTS, negative_prompt="", sampling=sampling)


def sizes_of(requests: Sequence[Request]) -> dict[str, tuple[int, int]]:
    return {request.source_id: (40, 36) for request in requests}


@pytest.fixture(scope="module")
def model(tiny_diffusion: Path) -> StableDiffusion:
    return load_generator(str(tiny_diffusion))


@pytest.fixture(scope="module")
def scorer(tiny_clip: Path) -> ClipScorer:
    return ClipScorer(str(tiny_clip), TEXTS, batch=4)


def make_worker(
    model: StableDiffusion,
    scorer: ClipScorer | None,
    folder: Path,
    sampling: Sampling,
    shard_rows: int = 8,
) -> Worker:
    engine = Engine(model, num_inference_steps=4, guidance_scale=4.0, slots=3)
    scores = score_shards(folder / "scores") if scorer else None
    return Worker(
        engine,
        spectrum_shards(folder / "spectrum", NAMES),
        sampling,
        scorer=scorer,
        scores=scores,
        shard_rows=shard_rows,
    )


def stored(shards: Shards) -> dict[str, dict[str, Any]]:
    rows = shards.read().to_pylist()
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


@pytest.mark.parametrize("encoding", ["webp-lossless", "jpeg"])
def test_what_is_stored_and_how_it_is_scored(
    encoding: str, model: StableDiffusion, scorer: ClipScorer, tmp_path: Path
) -> None:
    sampling = make_sampling(encoding)
    requests = make_requests(7, sampling)
    worker = make_worker(model, scorer, tmp_path, sampling)
    done: list[str] = []
    worker.make(requests, load_pixels, sizes_of(requests), lambda request: done.append(request.id))
    assert sorted(done) == sorted(request.id for request in requests)

    engine = Engine(model, num_inference_steps=4, guidance_scale=4.0, slots=3)
    plain = {
        request.id: encode_image(picture, encoding)
        for request, picture in engine.generate(requests, load_pixels)
    }
    rows, scores = stored(worker.images), stored(worker.scores)  # type: ignore[arg-type]
    assert {name: row["image"]["bytes"] for name, row in rows.items()} == plain
    assert {
        (row["source_width"], row["source_height"], row["width"], row["encoding"])
        for row in rows.values()
    } == {(40, 36, 32, encoding)}
    assert sorted(len(store_module.pq.read_table(file)) for file in worker.images.files()) == [
        5,
        8,
        8,
    ]

    order = sorted(rows)
    later = scorer(
        [decode_image(rows[name]["image"]) for name in order],
        [rows[name]["label"] for name in order],
    )
    assert {row["scorer"] for row in scores.values()} == {scorer.id}
    assert [np.float32(scores[name]["clip_similarity"]) for name in order] == list(later)

    work = worker.engine.work
    assert work.unet_rows == unet_rows(
        requests, 4, 4.0
    ) and work.vae_decodes == worker.scored == len(requests)
    assert work.vae_encodes == worker.sources_read == 7
    assert work.text_encodes == len({request.prompt for request in requests}) + 1


def test_more_sources_than_are_read_ahead_are_each_read_once(
    model: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "AHEAD", 5)
    sampling = make_sampling()
    requests = make_requests(30, sampling)
    worker = make_worker(model, None, tmp_path, sampling)
    worker.engine.lookahead = 8  # type: ignore[union-attr]
    worker.make(requests, load_pixels, sizes_of(requests))
    assert worker.sources_read == worker.engine.work.vae_encodes == 30
    assert set(stored(worker.images)) == {request.id for request in requests}


def test_a_source_that_cannot_be_read_is_told_and_finished_work_is_kept(
    model: StableDiffusion, scorer: ClipScorer, tmp_path: Path
) -> None:
    def load(source: str) -> np.ndarray:
        if source == "image-6":
            raise RunError("image 'image-6' has changed")
        return load_pixels(source)

    sampling = make_sampling()
    requests = make_requests(9, sampling)
    worker = make_worker(model, scorer, tmp_path, sampling)
    worker.engine.lookahead = 9  # type: ignore[union-attr]
    done: list[str] = []
    with pytest.raises(RunError, match="image-6"):
        worker.make(requests, load, sizes_of(requests), lambda request: done.append(request.id))
    assert 0 < len(done) < len(requests)
    assert set(stored(worker.images)) == set(stored(worker.scores)) == set(done)  # type: ignore[arg-type]
    worker.make(
        [request for request in requests if request.id not in done], load_pixels, sizes_of(requests)
    )
    assert set(stored(worker.images)) == {request.id for request in requests}


@pytest.mark.parametrize("which", ["spectrum", "scores"])
def test_a_full_disk_stops_it_and_a_second_run_completes_it(
    which: str,
    model: StableDiffusion,
    scorer: ClipScorer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = make_sampling()
    requests = make_requests(12, sampling)
    worker = make_worker(model, scorer, tmp_path, sampling)
    monkeypatch.setattr(worker_module, "WAITING", 4)
    write, calls = store_module.pq.write_table, []

    def full(table: Any, path: Path, **settings: Any) -> None:
        calls.append(path)
        if (
            Path(path).parent.name == which
            and sum(Path(path).parent == Path(each).parent for each in calls) > 1
        ):
            raise OSError(28, "No space left on device")
        write(table, path, **settings)

    threads = threading.active_count()
    with monkeypatch.context() as patched:
        patched.setattr(store_module.pq, "write_table", full)
        with pytest.raises(StoreError, match="No space left on device"):
            worker.make(requests, load_pixels, sizes_of(requests))
    assert threading.active_count() == threads
    present = set(stored(worker.images))
    assert len(present) == (8 if which == "spectrum" else 16) and len(stored(worker.scores)) == 8  # type: ignore[arg-type]
    worker.make(
        [request for request in requests if request.id not in present],
        load_pixels,
        sizes_of(requests),
    )
    assert set(stored(worker.images)) == {request.id for request in requests}


def test_what_waits_behind_the_engine_is_bounded(
    model: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "WAITING", 2)
    sampling = make_sampling()
    requests = make_requests(10, sampling)
    worker = make_worker(model, None, tmp_path, sampling, shard_rows=2)
    append, written, ahead = worker.images.append, [0], []

    def slow(rows: Sequence[dict[str, Any]]) -> None:
        time.sleep(0.05)
        append(rows)
        written[0] += len(rows)

    monkeypatch.setattr(worker.images, "append", slow)
    done: list[str] = []

    def finished(request: Request) -> None:
        done.append(request.id)
        ahead.append(len(done) - written[0])

    worker.make(requests, load_pixels, sizes_of(requests), finished)
    assert written == [30] and max(ahead) <= 2 + 2 + 1
    assert worker.waited > 0


def test_stored_pictures_are_those_of_the_engine(model: StableDiffusion, tmp_path: Path) -> None:
    sampling = make_sampling("png")
    requests = make_requests(1, sampling)
    worker = make_worker(model, None, tmp_path, sampling)
    worker.make(requests, load_pixels, sizes_of(requests))
    engine = Engine(model, num_inference_steps=4, guidance_scale=4.0, slots=3)
    rows = stored(worker.images)
    for request, picture in engine.generate(requests, load_pixels):
        assert np.array_equal(
            np.asarray(Image.open(io.BytesIO(rows[request.id]["image"]["bytes"]))), picture
        )


def test_a_picture_is_written_before_its_shard_is_full_where_the_next_ones_are_slow(
    model: StableDiffusion, scorer: ClipScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "PATIENCE", 0.2)
    sampling = make_sampling()
    requests = make_requests(2, sampling)
    worker = make_worker(model, scorer, tmp_path, sampling, shard_rows=512)
    first, seen = threading.Event(), []

    def finished(request: Request) -> None:
        if not first.is_set():
            first.set()
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and not seen:
                time.sleep(0.05)
                seen.extend(worker.scores.ids() & worker.images.ids() if worker.scores else ())

    worker.make(requests, load_pixels, sizes_of(requests), finished)
    assert len(seen) == 1
    assert (
        set(stored(worker.images))
        == set(stored(worker.scores))
        == {request.id for request in requests}
    )  # type: ignore[arg-type]


def test_pictures_are_written_though_the_scorer_fails(
    model: StableDiffusion, scorer: ClipScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that wait behind the one whose score fails too; their scores are made by the filter."""
    sampling = make_sampling()
    requests = make_requests(7, sampling)
    worker = make_worker(model, scorer, tmp_path, sampling)

    def broken(*_: Any) -> Any:
        raise RunError("no score")

    done: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(worker, "scorer", broken)
        broken.batch, broken.id = 4, "broken"  # type: ignore[attr-defined]
        with pytest.raises(RunError, match="no score"):
            worker.make(
                requests, load_pixels, sizes_of(requests), lambda request: done.append(request.id)
            )
    assert set(stored(worker.images)) >= set(done) and len(done) >= 4 and not stored(worker.scores)  # type: ignore[arg-type]


def test_what_was_denoised_before_a_failure_is_written(
    model: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = make_sampling()
    requests = make_requests(6, sampling)
    worker = make_worker(model, None, tmp_path, sampling)
    engine = worker.engine
    assert isinstance(engine, Engine)
    denoise = engine.denoise

    def failing(*arguments: Any) -> Any:
        for number, item in enumerate(denoise(*arguments)):
            if number == 2:
                raise RunError("it fails")
            yield item

    monkeypatch.setattr(engine, "denoise", failing)
    with pytest.raises(RunError, match="it fails"):
        worker.make(requests, load_pixels, sizes_of(requests))
    assert len(stored(worker.images)) == 2
