"""Several processes generate the images of one, whatever happens to the workers."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

import discl as package
from discl import pipeline
from discl.errors import RunError, StoreError
from discl.pipeline import run_until
from discl.recipe import validate
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
from discl.spectrum.plan import PlanShard, read_plan
from discl.spectrum.store import Shards
from discl.stages.generate import generate
from discl.stages.workers import local, ray
from discl.stages.workers.base import Assignment, Losses
from discl.stages.workers.dispatcher import Dispatcher
from discl.stages.workers.local import LocalWorkerPool, list_devices
from discl.stages.workers.ray import RayAssignment, RayWorkerPool
from helpers import workers as stand_ins
from helpers.commands import Command

PLANNED = 10 * 2 * 2
"""10 sources, 2 levels, 2 seeds."""


def start(small_tree: dict[str, Any], folder: Path, **runtime: Any) -> Run:
    """A run with its plan."""
    run = open_run(validate(small_tree | {"runtime": small_tree["runtime"] | runtime}), folder)
    run_until(run, "plan")
    return run


@pytest.fixture(scope="module")
def alone(
    small_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """What one process makes."""
    run = start(small_tree, tmp_path_factory.mktemp("runs") / "alone")
    generate(run)
    return pictures(run)


def pictures(run: Run) -> dict[str, np.ndarray]:
    """`{id: pixels}` of the whole store; fails where an id is stored or scored twice.

    A worker that is killed between a shard of images and that of their scores leaves the scores to
    the filter.
    """
    rows = run.spectrum.read(["id", "image"]).to_pylist()
    assert max(Counter(row["id"] for row in rows).values(), default=1) == 1
    scored = Counter(row["id"] for row in run.scores.read(["id"]).to_pylist())
    assert max(scored.values(), default=1) == 1 and set(scored) <= {row["id"] for row in rows}
    return {
        row["id"]: np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")).astype(
            int
        )
        for row in rows
    }


def assert_same(made: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> None:
    assert made.keys() == reference.keys()
    assert max(np.abs(made[name] - reference[name]).max() for name in reference) <= 1


def workers_of(process: psutil.Process, sign: str = "forkserver") -> list[psutil.Process]:
    """Processes with that sign; without the server of which workers on one machine are forks."""
    found = []
    for child in process.children(recursive=True):
        try:
            server = sign == "forkserver" and sign not in " ".join(child.parent().cmdline())
            if sign in " ".join(child.cmdline()) and not server:
                found.append(child)
        except (psutil.Error, AttributeError):  # it or its parent has ended
            continue
    return found


def kill_one(
    run: Run, find: Callable[[], list[psutil.Process]], killed: list[int]
) -> threading.Thread:
    """Kills a worker once there are images."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            if len(list((run.folder / "spectrum").glob("part-*"))) >= 2 and (found := find()):
                killed.append(found[0].pid)
                os.kill(found[0].pid, signal.SIGKILL)
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_two_processes_make_what_one_makes_though_one_is_killed(
    small_tree: dict[str, Any],
    alone: dict[str, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, killed = start(small_tree, tmp_path / "run", processes=2), []
    thread = kill_one(run, lambda: workers_of(psutil.Process()), killed)
    generate(run)
    thread.join()
    assert len(alone) == PLANNED
    assert_same(pictures(run), alone)
    told = capsys.readouterr().err
    assert (
        killed
        and "generate: 2 processes, on cpu" in told
        and "the worker on cpu ended with signal 9; other workers make the " in told
    )
    assert not workers_of(psutil.Process())


@pytest.mark.slow
def test_sigterm_to_all_of_them_ends_them_with_what_is_finished(
    small_tree: dict[str, Any], tmp_path: Path
) -> None:
    """A scheduler sends it to the command and to its workers at once; only the command acts."""
    many = small_tree | {"spectrum": small_tree["spectrum"] | {"seeds": 4}}
    recipe, run = tmp_path / "many.yaml", start(many, tmp_path / "run", processes=2)
    recipe.write_text(yaml.safe_dump(run.recipe.plain()))
    command = Command(["generate", recipe, "--out", run.folder], tmp_path / "streams")
    while not list((run.folder / "spectrum").glob("part-*")):
        assert command.poll() is None, command.errors
        time.sleep(0.005)
    workers = workers_of(psutil.Process(command.pid))
    os.killpg(command.pid, signal.SIGTERM)
    assert command.wait() not in {None, 0, -signal.SIGTERM}, command.errors
    assert "Traceback" not in command.errors, command.errors
    assert workers and not psutil.wait_procs(workers, timeout=10)[1]
    made = pictures(run)
    assert 0 < len(made) < 2 * PLANNED
    generate(run)
    whole = pictures(run)
    assert len(whole) == 2 * PLANNED and all((whole[name] == made[name]).all() for name in made)


@pytest.mark.slow
def test_an_error_of_a_worker_is_told_and_finished_work_is_kept(
    small_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One source has changed since the plan was made. The command can be run again.

    The worker begins anew, as on a GPU.
    """
    monkeypatch.setattr(local, "FORKS", local.SPAWN)
    run = start(small_tree, tmp_path / "run")
    changed = replace(run, overrides={"hard.parquet": other_digest(run, tmp_path / "hard.parquet")})
    with (
        pytest.raises(RunError, match=r"image '.*' has changed since it was checked"),
        LocalWorkerPool(changed, ["cpu"]) as pool,
    ):
        pool.make(read_plan(run.path("plan.parquet")), lambda count: None)
    assert not workers_of(psutil.Process(), "spawn_main")
    before = pictures(run)
    generate(run)
    assert len(pictures(run)) == PLANNED and len(before) > 0 and set(before) <= set(pictures(run))


def other_digest(run: Run, path: Path) -> Path:
    import pyarrow as pa

    rows = pq.read_table(run.path("hard.parquet")).to_pylist()
    rows[-1]["digest"] = "another"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_workers_that_always_die_end_the_command(
    small_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(small_tree, tmp_path / "run", processes=2)
    monkeypatch.setattr(LocalWorkerPool, "target", staticmethod(stand_ins.die))
    with pytest.raises(
        RunError,
        match=r"3 in a row: the worker on cpu ended with status 1\..* lower runtime\.slots",
    ):
        generate(run)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("status", [40, 50])
def test_libraries_are_loaded_once_for_all_workers(
    status: int, small_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the server that they are forks of; the environment is that of now."""
    run = start(small_tree, tmp_path / "run", processes=2)
    monkeypatch.setattr(LocalWorkerPool, "target", staticmethod(stand_ins.tell_what_is_loaded))
    monkeypatch.setenv("STATUS", str(status))
    with pytest.raises(RunError, match=f"ended with status {status + 1}"):
        generate(run)


@pytest.mark.timeout(120)
def test_a_store_that_cannot_be_read_when_a_worker_has_died(
    small_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever attends it finds that out, and whoever waits for the images is told."""
    run = start(small_tree, tmp_path / "run", processes=2)
    monkeypatch.setattr(LocalWorkerPool, "target", staticmethod(stand_ins.die))
    ids = Shards.ids

    def broken(self: Shards) -> set[str]:
        if threading.current_thread() is not threading.main_thread():
            raise StoreError("shard part-x cannot be read")
        return ids(self)

    monkeypatch.setattr(Shards, "ids", broken)
    with pytest.raises(StoreError, match="shard part-x cannot be read"):
        generate(run)


@pytest.mark.timeout(120)
def test_a_worker_that_cannot_be_started(
    small_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(process: object) -> None:
        raise OSError(errno.EAGAIN, "no more processes")

    run = start(small_tree, tmp_path / "run", processes=2)
    monkeypatch.setattr(local.FORKS.Process, "_Popen", staticmethod(refuse))
    with pytest.raises(RunError, match=r"on cpu cannot be started: .*no more.*runtime\.processes"):
        generate(run)


@pytest.mark.timeout(120)
def test_a_worker_that_sends_nonsense(
    small_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug, which is raised as it is, and the worker goes too, though it waits for an answer."""
    run = start(small_tree, tmp_path / "run", processes=2)
    monkeypatch.setattr(LocalWorkerPool, "target", staticmethod(stand_ins.send_nonsense))
    with LocalWorkerPool(run, ["cpu", "cpu"]) as pool, pytest.raises(ValueError, match="nonsense"):
        pool.make(read_plan(run.path("plan.parquet")), lambda count: None)
    assert not pool.server.is_alive() and not pool.running
    assert not workers_of(psutil.Process())


@pytest.mark.timeout(120)
def test_half_a_message_is_the_last_of_a_worker_that_was_killed(
    small_tree: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = start(small_tree, tmp_path / "run", processes=2)
    monkeypatch.setattr(LocalWorkerPool, "target", staticmethod(stand_ins.send_half))
    with pytest.raises(RunError, match="3 in a row: the worker on cpu ended with signal 9"):
        generate(run)
    assert "ended with signal 9; other workers make the 0 images" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_workers_that_die_before_they_write_end_the_command(
    small_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, started = start(small_tree, tmp_path / "run", processes=2), []
    begin = LocalWorkerPool._start_process
    monkeypatch.setattr(LocalWorkerPool, "target", staticmethod(stand_ins.denoise_only))

    def counted(pool: LocalWorkerPool, *which: int) -> None:
        started.append(which)
        assert len(started) < 20, "started again for ever"
        begin(pool, *which)

    monkeypatch.setattr(LocalWorkerPool, "_start_process", counted)
    with pytest.raises(RunError, match="3 in a row: the worker on cpu ended with signal 9"):
        generate(run)
    assert len(started) <= 5


def test_losses_in_a_row_are_counted_between_written_images() -> None:
    losses = Losses()
    assert [losses.count(written) for written in (0, 4, 4, 8, 12, 12, 12)] == [False] * 6 + [True]


SCRIPT = """
import sys
import yaml
from discl.recipe import validate
from discl.run_folder.open import open_run
from discl.stages.generate import generate
from discl.stages.workers.local import LocalWorkerPool
from helpers.workers import fall_silent
print("started", flush=True)
LocalWorkerPool.target = staticmethod(fall_silent)
generate(open_run(validate(yaml.safe_load(sys.argv[1])), sys.argv[2]))
"""
"""A script without `if __name__ == "__main__"` whose workers fall silent."""


def environment() -> dict[str, str]:
    """The environment of a process that imports the package and `helpers`."""
    folders = Path(package.__file__).parents[1], Path(__file__).parents[1]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}


@pytest.mark.slow
def test_workers_go_when_the_script_that_started_them_is_killed(
    small_tree: dict[str, Any], alone: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Even workers that ask nothing; the next run makes the rest, and no image twice.

    The script needs no guard, because workers do not run it again. Nor does a file beside the data
    stand in for a module of Python.
    """
    run = start(small_tree, tmp_path / "run", processes=2)
    script, folder = tmp_path / "script.py", tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "struct.py").write_text("raise SystemExit('a file of the data was imported')")
    script.write_text(SCRIPT)
    words = [sys.executable, "-P", str(script), yaml.safe_dump(run.recipe.plain()), str(run.folder)]
    told = tmp_path / "told"
    with told.open("wb") as stream:
        process = subprocess.Popen(words, env=environment(), cwd=folder, stdout=stream)
    workers: list[psutil.Process] = []
    try:
        while len(list((run.folder / "spectrum").glob("part-*"))) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        workers = workers_of(psutil.Process(process.pid))
        process.kill()
        process.wait()
        assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=20)[1]
    finally:
        for each in (process, *workers):
            with suppress(psutil.NoSuchProcess):
                each.kill()
    assert told.read_text() == "started\n"
    before = pictures(run)
    assert len(before) == 2 * 4
    run = start(small_tree, run.folder)
    generate(run)
    whole = pictures(run)
    assert_same(whole, alone)
    assert all((whole[name] == before[name]).all() for name in before)


def test_one_worker_per_device(
    small_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker for each visible GPU, unless the recipe names a device or a number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)

    def of(**runtime: Any) -> list[str]:
        return list_devices(Run(validate(small_tree | {"runtime": runtime}), tmp_path))

    assert of() == of(device="cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    assert of(device="cuda:1") == ["cuda:1"]
    assert of(device="cpu") == ["cpu"]
    assert of(processes=2) == ["cuda:0", "cuda:1"]
    assert of(processes=4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert of(device="cpu", processes=2) == ["cpu", "cpu"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine alone, without network."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        num_cpus=4,
        num_gpus=0,
        object_store_memory=80_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.ray
def test_two_workers_of_which_one_is_killed_make_what_one_process_makes(
    small_tree: dict[str, Any],
    alone: dict[str, np.ndarray],
    cluster: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, killed = start(small_tree, tmp_path / "run", processes=2), []
    thread = kill_one(run, lambda: workers_of(psutil.Process(), "ray::RayWorker.work"), killed)
    assert pipeline.generate(run, ray="auto") == tmp_path / "run" / "spectrum"
    thread.join()
    assert len(alone) == PLANNED
    assert_same(pictures(run), alone)
    told = capsys.readouterr().err
    assert (
        killed
        and "generate: 2 Ray workers on 1 machine\n" in told
        and " died; other workers make the " in told
    )
    assert not workers_of(psutil.Process(), "ray::RayWorker.work")


def test_ray_workers_that_die_before_they_write_end_the_command(
    small_tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dispatcher is in this process; of those that die, one had written all that it held."""
    requests = read_plan(start(small_tree, tmp_path / "run").path("plan.parquet"))
    written = set[str]()
    pool = object.__new__(RayWorkerPool)
    pool.run = SimpleNamespace(spectrum=SimpleNamespace(ids=lambda: set(written)))
    pool.dispatcher, pool.losses = Dispatcher(2), Losses()
    pool.dispatcher.plan(requests)

    def die(name: str, writes: bool = False) -> None:
        piece = pool.dispatcher.take(name, written=True)
        pool.dispatcher.advance(len(piece))
        if writes:
            written.update(request.id for request in piece)
            pool.dispatcher.take(name, written=True)
        pool._count_loss(name, f"{name} died", "killed")

    die("first")
    die("second")
    die("third", writes=True)
    die("fourth")
    with pytest.raises(RunError, match=r"3 in a row: fifth died\. killed"):
        die("fifth")
    assert capsys.readouterr().err.count("other workers make the ") == 4
    assert {request.id for piece in pool.dispatcher.waiting for request in piece} == {
        request.id for request in requests
    } - written


def test_a_share_of_a_cluster_is_refused(small_tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"--ray divides the work itself; leave out --shard"):
        pipeline.generate(start(small_tree, tmp_path / "run"), PlanShard(1, 2), "auto")


def test_a_machine_that_does_not_see_the_run_folder(
    small_tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It uses the tables that are sent along if images go to an address that all reach."""
    monkeypatch.chdir(tmp_path)
    run = start(small_tree, tmp_path / "run")
    tables = {name: run.path(name).read_bytes() for name in ray.TABLES}
    assignment = RayAssignment.of(run, "cpu", 1, 8, tables=tables, node="here")
    for node in ("here", "there"):
        with assignment.opened(node) as opened:
            assert opened.folder == run.folder
            assert opened.path("hard.parquet") == run.path("hard.parquet")
    shutil.rmtree(run.folder)
    with (
        pytest.raises(RunError, match=r"does not see the run folder .* set runtime\.store to"),
        assignment.opened("there"),
    ):
        pass
    with replace(assignment, store="s3://bucket/birds").opened("there") as lent:
        folder = lent.path("hard.parquet").parent
        assert len(lent.train) == 10
        assert lent.path("hard.parquet").read_bytes() == tables["hard.parquet"]
        assert folder not in {run.folder, lent.folder}
    assert not folder.exists()


def test_an_assignment_opens_the_same_run(small_tree: dict[str, Any], tmp_path: Path) -> None:
    run = start(small_tree, tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        opened = Assignment.of(run, "cpu", 1, 8).open()
    assert opened.folder == run.folder and opened.recipe.runtime.threads == 1
    assert opened.recipe.spectrum == run.recipe.spectrum
