"""Locks of a folder: one process at a time, and dead processes block nobody."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import quote

import filelock
import pytest
from filelock import SoftFileLease

from discl.errors import RunError
from discl.run_folder import locks
from discl.run_folder.locks import lock

SOURCE = Path(locks.__file__).parents[1]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PAUSE", 0.02)
    monkeypatch.setattr(locks, "BEAT", 0.05)


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that knows `lock` and the folder, its first argument."""
    head = """import sys, time, pathlib
from discl.run_folder import locks
locks.PAUSE = 0.01
folder = pathlib.Path(sys.argv[1])
"""
    words = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(
        words,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(ready: Path) -> None:
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_at_a_time(tmp_path: Path) -> None:
    """Three processes count in a file, read and written in two steps: none of 24 is lost."""
    code = """
for _ in range(8):
    with locks.lock(folder, "count"):
        count = int((folder / "count").read_text())
        time.sleep(0.001)
        (folder / "count").write_text(str(count + 1))
"""
    (tmp_path / "count").write_text("0")
    processes = [start(code, tmp_path) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0], [
        process.communicate() for process in processes
    ]
    assert (tmp_path / "count").read_text() == "24"
    assert not (tmp_path / "locks").exists()


def test_the_lock_of_a_killed_process_is_taken_over_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = 'with locks.lock(folder, "train"):\n    (folder / "ready").touch()\n    time.sleep(600)'
    with start(code, tmp_path) as process:
        wait_for(tmp_path / "ready")
        process.kill()
        process.wait()
        started = time.monotonic()
        with lock(tmp_path, "train"):
            pass
    assert time.monotonic() - started < 5
    told = capsys.readouterr().err
    assert (
        f"process {process.pid} on " in told
        and "('train', since 20" in told
        and "has ended without releasing its lock" in told
    )


def test_one_waits_for_the_living_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
with locks.lock(folder, "train"):
    (folder / "ready").touch()
    while not (folder / "enough").exists():
        time.sleep(0.01)
    (folder / "done").touch()
"""
    with start(code, tmp_path) as process:
        wait_for(tmp_path / "ready")
        threading.Timer(0.5, (tmp_path / "enough").touch).start()
        with lock(tmp_path, "filter"):
            assert (tmp_path / "done").exists()
    told = capsys.readouterr().err
    assert told.count("waiting for ") == 1 and f"waiting for process {process.pid} on " in told


def other_machine(folder: Path, what: str = "train") -> Path:
    """A lock as process 1 of the host node-7 takes it."""
    (folder / "locks").mkdir(exist_ok=True)
    name = f"{quote(what, safe='')}.1767268800.another.0123.lock"
    path = folder / "locks" / name
    record = ("filelock/2", "pid=1", "host=node-7", "mode=lease", "token=a", "duration=60.0")
    path.write_text("".join(f"{line}\n" for line in record))
    assert SoftFileLease(path, lease_duration=60).owner is not None
    return path


def test_another_machine_that_falls_silent_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What its clock says does not matter: only whether its file is touched while one looks."""
    monkeypatch.setattr(locks, "PATIENCE", 0.5)
    path = other_machine(tmp_path)
    os.utime(path, (0, 0))
    last = [0.0]

    def live() -> None:
        for tick in range(1, 9):
            time.sleep(0.1)
            os.utime(path, (tick, tick))
            last[0] = time.monotonic()

    heart = threading.Thread(target=live)
    heart.start()
    with lock(tmp_path, "train"):
        heart.join(timeout=0)
        assert not heart.is_alive()
        assert time.monotonic() - last[0] > 0.3
    assert re.search(
        r"process 1 on node-7 \('train', since 202[56]-.*\) has ended", capsys.readouterr().err
    )


def test_what_does_not_clash_is_left_alone(tmp_path: Path) -> None:
    path = other_machine(tmp_path, "generate 1/2")
    with (
        lock(tmp_path, "generate 2/2", lambda other: other != "generate 1/2"),
        lock(tmp_path, "train", lambda other: False),
    ):
        assert len(list((tmp_path / "locks").glob("*.lock"))) == 3
    assert [each.name for each in (tmp_path / "locks").iterdir()] == [path.name]


def test_what_one_holds_oneself_does_not_stand_in_the_way(tmp_path: Path) -> None:
    with lock(tmp_path, "compare"), lock(tmp_path, "train"):
        pass
    assert not (tmp_path / "locks").exists()


def test_one_that_was_taken_for_dead_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(
            RunError, match=r"another process has taken 'train' over .* run the command again"
        ),
        lock(tmp_path, "train"),
    ):
        next((tmp_path / "locks").glob("*.lock")).unlink()
    with pytest.raises(KeyError), lock(tmp_path, "train"):  # an error within is not hidden
        next((tmp_path / "locks").glob("*.lock")).unlink()
        raise KeyError


def test_it_shows_that_it_lives(tmp_path: Path) -> None:
    with lock(tmp_path, "train"):
        path = next((tmp_path / "locks").glob("*.lock"))
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lock_is_taken_over_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS and SMB, where filelock leaves the lease of a dead process in place."""
    monkeypatch.setattr(filelock._util, "_rename_call", lambda: (lambda *_: errno.EINVAL, 2))
    alone = SoftFileLease(tmp_path / "alone.lock", lease_duration=0.2, heartbeat_interval=0.1)
    path = other_machine(tmp_path)
    alone_path = Path(alone.lock_file)
    alone_path.write_text(path.read_text().replace("duration=60.0", "duration=0.2"))
    with pytest.raises(filelock.Timeout):
        alone.acquire(timeout=1, poll_interval=0.05)
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    with lock(tmp_path, "train"):
        assert not path.exists()


def test_files_of_nobody_do_not_stand_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "locks").mkdir()
    for name in ("left.json", "train.lock", "train.soon.here.lock", ".lock"):
        (tmp_path / "locks" / name).write_text("5")
    with lock(tmp_path, "train"):
        pass


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file is in the way")
    with pytest.raises(RunError, match=r"cannot write to .*run"), lock(tmp_path / "run", "train"):
        pass
