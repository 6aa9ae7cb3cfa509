"""One process per device of this machine.

A worker process asks questions over a pipe of `multiprocessing`, and one thread of the command
answers them. A worker that is killed is started again. A worker ends when the command is gone.

On a CPU workers are forks of a server of `multiprocessing`, which has loaded the libraries for all
of them. On GPUs each begins anew: diffusers looks for a GPU when it is imported, and no fork may
use one that its parent has looked for.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess, SpawnProcess
from types import ModuleType
from typing import Any

import torch

from ...errors import DisclError, RunError
from ...run_folder.run import Run
from ...spectrum.plan import Request
from ...utils.logging import SILENT, forward_messages, get_logger
from .base import GRACE, PAUSE, Assignment, WorkerPool, make_pieces
from .dispatcher import Dispatcher

logger = get_logger(__name__)

SPAWN = multiprocessing.get_context("spawn")
FORKS = multiprocessing.get_context("forkserver")
LIBRARIES = (
    __name__,
    "diffusers.pipelines.auto_pipeline",
    "diffusers.pipelines.stable_diffusion",
    "diffusers.schedulers.scheduling_ddim",
    "transformers.models.auto.image_processing_auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
)
"""Modules that take seconds to load."""
SAFE_PATH = "PYTHONSAFEPATH"
ADVICE = (
    "Their own messages are above. Signal 9 mostly means that memory is full: lower runtime.slots "
    "or runtime.processes."
)


def list_devices(run: Run) -> list[str]:
    """Devices of this machine's workers, one for each.

    `runtime.processes` sets their number. By default there is one for every visible GPU, or one on
    the CPU.
    """
    runtime, device = run.recipe.runtime, str(run.device)
    visible = (
        [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        if device == "cuda"
        else [device]
    )
    count = runtime.processes or len(visible)
    return [visible[number % len(visible)] for number in range(count)]


@contextmanager
def _clean_start() -> Iterator[None]:
    """Processes started inside import neither the calling script nor modules beside the data.

    So a script needs no `if __name__ == "__main__"`, and Python looks for modules only where the
    command does.
    """
    main, safe = sys.modules["__main__"], os.environ.get(SAFE_PATH)
    sys.modules["__main__"], os.environ[SAFE_PATH] = ModuleType("__main__"), "1"
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        del os.environ[SAFE_PATH]
        if safe is not None:
            os.environ[SAFE_PATH] = safe


def run_worker(connection: Connection, environment: Mapping[str, str]) -> None:
    """A worker process: makes pieces of a plan until there is nothing left.

    - `environment`: of the command, which may have changed since the server began.

    Its questions are `("begin",)`, `("take", bool)`, `("advance",)` and
    `("log", name, level, text)`; it ends with
    `("work", Work)` or `("error", DisclError)`. Each gets one answer.
    """
    os.environ.clear()
    os.environ.update(environment)
    for each in (signal.SIGINT, signal.SIGTERM):  # the command gets them too, and stops it
        signal.signal(each, signal.SIG_IGN)
    os.dup2(2, 1)  # standard output is the command's, whatever libraries print
    threading.Thread(target=_end_with_command, name="parent", daemon=True).start()

    lock = threading.Lock()  # other threads log

    def ask(*question: Any) -> Any:
        try:
            with lock:
                connection.send(question)
                return connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # the command is gone

    assignment = ask("begin")
    forward_messages(partial(ask, "log"), assignment.level)
    try:
        work = make_pieces(
            assignment.open(),
            assignment.ahead,
            lambda written: ask("take", written),
            lambda: bool(ask("advance")),
        )
    except DisclError as error:
        ask("error", error)
    else:
        ask("work", work)


def _end_with_command() -> None:
    """Ends this process when the command is gone, even if killed.

    Nothing is written after that, because the next command makes what is not written by then.
    """
    if (command := multiprocessing.parent_process()) is not None:
        command.join()
        os._exit(1)


@dataclass
class _Process:
    """A worker process; `life` counts how often that of its device was started before."""

    index: int
    life: int
    process: SpawnProcess | ForkServerProcess
    connection: Connection

    @property
    def name(self) -> str:
        return f"{self.index}.{self.life}"


class LocalWorkerPool(WorkerPool):
    """Worker processes on this machine, one per device."""

    target = staticmethod(run_worker)

    def __init__(self, run: Run, devices: Sequence[str]) -> None:
        super().__init__(run, Dispatcher(len(devices)))
        self.devices, self.ahead = devices, 0
        self.error: BaseException | None = None
        self.changed = threading.Event()
        self.running: dict[Connection, _Process] = {}
        self.server = threading.Thread(target=self._serve, name="workers", daemon=True)

    def __enter__(self) -> LocalWorkerPool:
        logger.info(
            f"generate: {len(self.devices)} processes, on {', '.join(dict.fromkeys(self.devices))}"
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.dispatcher.stop()
        known = self.dispatcher.known()
        try:
            if kind is not None:  # do not wait for those that are still loading
                self._kill(lambda worker: worker.name not in known)
            if self.started:
                self.server.join(GRACE)
        finally:
            self._kill(lambda worker: True)

    def _kill(self, chosen: Callable[[_Process], bool]) -> None:
        for worker in filter(chosen, list(self.running.values())):
            worker.process.kill()

    def _start(self, requests: Sequence[Request]) -> None:
        self.ahead = self.dispatcher.even(len(requests))
        self.server.start()

    def _watch(self) -> None:
        self.changed.wait(PAUSE)
        self.changed.clear()
        if self.error is not None:
            raise self.error

    def _serve(self) -> None:
        """Starts a worker per device and answers them all until the last one has ended.

        It has a thread, so that Ctrl-C interrupts the command and never half a message.
        """
        for index in range(len(self.devices)):
            with self._errors_kept():
                self._start_process(index)
        while self.running:
            for connection in wait(list(self.running)):
                with self._errors_kept():
                    self._attend(self.running[connection])  # type: ignore[index]

    @contextmanager
    def _errors_kept(self) -> Iterator[None]:
        """Keeps an error for `make` to raise, and stops all workers."""
        try:
            yield
        except BaseException as error:
            self.error = self.error or error
            self.dispatcher.stop()
            self.changed.set()

    def _start_process(self, index: int, life: int = 0) -> None:
        if self.dispatcher.stopped:
            return
        ours, theirs = multiprocessing.Pipe()
        given: dict[str, Any] = {
            "target": self.target,
            "args": (theirs, dict(os.environ)),
            "name": f"worker {index}",
        }
        process: SpawnProcess | ForkServerProcess
        if set(self.devices) == {"cpu"}:
            FORKS.set_forkserver_preload(list(LIBRARIES))
            process = FORKS.Process(**given)
        else:
            process = SPAWN.Process(**given)
        try:
            with _clean_start():
                process.start()
        except OSError as error:
            raise RunError(
                f"a worker process on {self.devices[index]} cannot be started: {error}. Finished "
                "images are kept. Fix the cause or lower runtime.processes, then run the same "
                "command again."
            ) from error
        finally:
            theirs.close()  # so that `ours` ends when the process does
        self.running[ours] = _Process(index, life, process, ours)

    def _attend(self, worker: _Process) -> None:
        """Answers one message of a worker, or notices that it has ended."""
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            self._ended(worker)
            return
        try:
            answer = self._answer(worker, *message)
        except BaseException:
            worker.process.kill()
            raise
        with suppress(OSError):  # it has ended meanwhile, which the next call notices
            worker.connection.send(answer)

    def _answer(self, worker: _Process, kind: str, *values: Any) -> Any:
        match kind:
            case "begin":
                return self._assignment(worker.index)
            case "take":
                return self.dispatcher.take(worker.name, *values)
            case "advance":
                self.changed.set()
                return self.dispatcher.advance(*values)
            case "log":
                name, level, text = values
                get_logger(name).log(level, text)
            case "work":
                self.counted.append(*values)
            case "error":
                raise values[0]
            case _:
                raise ValueError(f"a worker process sent '{kind}', which is no message of it")
        return None

    def _ended(self, worker: _Process) -> None:
        del self.running[worker.connection]
        worker.connection.close()
        worker.process.join()
        code = worker.process.exitcode or 0
        if not self.dispatcher.stopped:
            how = f"signal {-code}" if code < 0 else f"status {code}"
            device = self.devices[worker.index]
            self._count_loss(worker.name, f"the worker on {device} ended with {how}", ADVICE)
            self._start_process(worker.index, worker.life + 1)
        self.changed.set()

    def _assignment(self, index: int) -> Assignment:
        threads = self.run.recipe.runtime.threads
        if threads is None and self.devices[index] == "cpu":
            threads = max(torch.get_num_threads() // len(self.devices), 1)
        return Assignment.of(
            self.run,
            self.devices[index],
            threads,
            self.ahead,
            level=SILENT if index else logger.getEffectiveLevel(),
        )
