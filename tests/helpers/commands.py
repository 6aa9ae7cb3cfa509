"""Commands of `discl` in processes of their own that have loaded all libraries already.

The imports of torch, diffusers and transformers take seven seconds of a processor, and a small
command one. A server of `multiprocessing` imports them once for each process of the tests, and
every command is a fork of it. It runs nothing else, so no thread is lost. Tests of the start of a
command use `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import discl as package
from discl.stages.workers import local

TESTS = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
LIBRARIES = ("helpers.libraries", *local.LIBRARIES)


class Command:
    """A command that is under way.

    - `words`: such as `["generate", "recipe.yaml"]`.
    - `folder`: where its output is kept.
    - `environment`: variables that it has besides those of the tests.
    - `place`: its working directory, by default that of the tests.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        place: Path | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._streams = folder / "output", folder / "errors"
        CONTEXT.set_forkserver_preload(list(LIBRARIES))
        folders = os.pathsep.join(map(str, (Path(package.__file__).parents[1], TESTS)))
        with mock.patch.dict(os.environ, PYTHONPATH=folders):
            forkserver.ensure_running()
        names = list(map(str, words)), list(map(str, self._streams))
        self.process = CONTEXT.Process(
            target=_run, args=(*names, place or Path.cwd(), environment or {})
        )
        self.process.start()
        self.pid: int = self.process.pid or 0

    @property
    def output(self) -> str:
        return self._read(0)

    @property
    def errors(self) -> str:
        return self._read(1)

    def poll(self) -> int | None:
        """The status of a command that has ended; negative numbers are signals."""
        return self.process.exitcode

    def wait(self, timeout: float = 120) -> int | None:
        self.process.join(timeout)
        return self.poll()

    def kill(self) -> None:
        self.process.kill()

    def _read(self, number: int) -> str:
        stream = self._streams[number]
        return stream.read_text() if stream.exists() else ""


def _run(
    words: Sequence[str], streams: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> None:
    """A command, in a session of its own as a shell starts it."""
    os.setsid()
    os.environ.update(environment)
    os.chdir(folder)
    for number, name in enumerate(streams, 1):
        opened = os.open(name, os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    from discl.cli import main

    sys.argv = ["discl", *words]
    main()
