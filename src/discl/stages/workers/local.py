"""One process per device of this machine.

A worker process speaks in lines of JSON: it reads on its standard input what run it works for, then asks on its standard output for
requests (`take`) and tells what it denoised (`advance`), each answered by one line. It is started again where it is killed, and goes
at once where the process that feeds it is gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import torch

from ... import errors
from ...errors import DisclError, RunError
from ...recipe import validate
from ...run_folder.run import Run
from ...spectrum.plan import Request
from ...spectrum.stats import Work
from ...utils.console import console, say
from ..engine import Sources, make_worker
from .dispatcher import Dispatcher

PAUSE = 0.2
"""Seconds between two questions of a worker for which there is no work now."""
DEATHS = 3
"""How often workers may be killed one after the other, without an image written in between, before it is given up."""
GRACE = 120.0
"""Seconds in which a worker that was told to stop writes what it has finished."""


class Stopped(Exception):
    """A worker was told to go."""


@dataclass
class Losses:
    """Workers that died one after the other, without an image written in between.

    What was denoised does not count: a worker that is killed again and again before it writes would be started again for ever.
    """

    in_a_row: int = 0
    written: int = -1

    def count(self, written: int) -> bool:
        """One more, when so many images are written; whether to give up."""
        self.in_a_row = 1 if written > self.written else self.in_a_row + 1
        self.written = max(written, self.written)
        return self.in_a_row >= DEATHS


def devices(run: Run) -> list[str]:
    """Where this machine generates, one worker each: `runtime.processes` of them, by default every visible GPU, else one place."""
    asked, device = run.recipe.runtime, str(run.device)
    visible = (
        [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        if device == "cuda"
        else [device]
    )
    count = asked.processes or len(visible)
    return [visible[number % len(visible)] for number in range(count)]


def work(
    run: Run, ahead: int, take: Callable[[bool], list[Request] | None], advance: Callable[[], bool]
) -> dict[str, int]:
    """What a worker does: takes requests until it gets None, and makes them; returns what its engine counted.

    `take` is told whether the worker has written all that it had, `advance` says after each image whether to go on. It takes
    about `ahead` requests more than its slots hold, for the end comes for all workers at once where none has much in store.
    """
    worker, sources = make_worker(run), Sources(run, ())
    worker.look_ahead(ahead)

    def stream(piece: list[Request] | None) -> Iterator[Request]:
        while piece:
            sources.expect(piece)
            yield from piece
            piece = take(False)

    def finished(_: Request) -> None:
        if not advance():
            raise Stopped

    while (piece := take(True)) is not None:
        if not piece:
            time.sleep(PAUSE)
            continue
        try:
            worker.make(stream(piece), sources, sources.sizes, finished)
        except Stopped:
            break
    return asdict(worker.engine.work)


def describe(run: Run, device: str, threads: int | None, ahead: int) -> dict[str, Any]:
    """What another process needs in order to work for a run, as plain values; `open_described` reads it."""
    runtime = run.recipe.runtime.model_copy(
        update={"device": device, "threads": threads, "processes": 1}
    )
    recipe = run.recipe.model_copy(update={"runtime": runtime}).plain()
    borrowed = {name: str(path.absolute()) for name, path in run.overrides.items()}
    return {
        "recipe": recipe,
        "folder": str(run.folder.absolute()),
        "borrowed": borrowed,
        "cwd": str(Path.cwd()),
        "ahead": ahead,
    }


def open_described(told: Mapping[str, Any]) -> Run:
    """The run that `describe` was given."""
    with suppress(OSError):  # a machine that lacks it will say which of the recipe's paths it lacks
        os.chdir(told["cwd"])
    run = Run(
        validate(told["recipe"]),
        Path(told["folder"]),
        {name: Path(path) for name, path in told["borrowed"].items()},
    )
    if run.recipe.runtime.threads:
        torch.set_num_threads(run.recipe.runtime.threads)
    return run


class InProcessWorker:
    """This process generates itself."""

    def __init__(self, run: Run) -> None:
        self.run, self.worker = run, make_worker(run)

    def make(self, requests: Sequence[Request], advance: Callable[[int], None]) -> None:
        """Makes the requests and returns when all are written; `advance` is told of each that is denoised."""
        sources = Sources(self.run, requests)
        self.worker.make(requests, sources, sources.sizes, lambda request: advance(1))

    @property
    def done(self) -> Work:
        return self.worker.engine.work

    def __enter__(self) -> InProcessWorker:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class LocalWorkerPool:
    """Worker processes on this machine, one per device; used as a context, at whose end they go."""

    command: tuple[str, ...] = (sys.executable, "-P", "-m", "discl.stages.workers.local")

    def __init__(self, run: Run, places: Sequence[str]) -> None:
        self.run, self.places = run, places
        self.dispatcher, self.changed = Dispatcher(len(places)), threading.Condition()
        self.error: BaseException | None = None
        self.losses = Losses()
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.counted: list[dict[str, int]] = []
        self.ahead = 0
        self.threads: list[threading.Thread] = []

    def make(self, requests: Sequence[Request], advance: Callable[[int], None]) -> None:
        """Makes the requests and returns when all are written; `advance` is told how many are denoised.

        Raises what a worker told of, and what went wrong while one was attended.
        """
        with self.changed:
            before, _ = self.dispatcher.progress()
            self.dispatcher.plan(requests)
        if not self.threads:
            self.ahead = self.dispatcher.even(len(requests))
            self.threads = [
                threading.Thread(target=self._attend, args=(number,), daemon=True)
                for number in range(len(self.places))
            ]
            for thread in self.threads:
                thread.start()
        told = 0
        while True:
            with self.changed:
                self.changed.wait(PAUSE)
                denoised, written = self.dispatcher.progress()
                error = self.error
            count = min(denoised - before, len(requests))
            advance(count - told)
            told = count
            if error is not None:
                raise error
            if written:
                return

    @property
    def done(self) -> Work:
        """What the engines counted, all together; known when the workers have gone."""
        return Work(**{name: sum(each[name] for each in self.counted) for name in asdict(Work())})

    def __enter__(self) -> LocalWorkerPool:
        say(f"generate: {len(self.places)} processes, on {', '.join(dict.fromkeys(self.places))}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self.changed:
            self.dispatcher.stop()
            loading = [
                process
                for name, process in self.processes.items()
                if name not in self.dispatcher.known()
            ]
        if kind is not None:
            for process in loading:
                process.kill()
        deadline = time.monotonic() + GRACE
        for thread in self.threads:
            thread.join(max(deadline - time.monotonic(), 0))
        for process in self.processes.values():
            process.kill()

    def _attend(self, number: int) -> None:
        """Serves the worker of a device, and starts it again where it is killed; what goes wrong is raised by `make`."""
        try:
            for life in range(10**6):
                name = f"{number}.{life}"
                process = self._start(number, name)
                told = self._serve(name, process)
                code = process.wait()
                if told is not None:
                    raise told
                if self.dispatcher.stopped:
                    return
                self._count_loss(name, self.places[number], code)
        except BaseException as error:  # `make` would wait for ever for a thread that dies
            with self.changed:
                self.error = self.error or error
                self.dispatcher.stop()
                self.changed.notify_all()

    def _start(self, number: int, name: str) -> subprocess.Popen[str]:
        asked = self.run.recipe.runtime.threads
        threads = asked or (
            max(torch.get_num_threads() // len(self.places), 1)
            if self.places[number] == "cpu"
            else None
        )
        package = str(Path(errors.__file__).parents[1])
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
        }
        try:
            process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise RunError(
                f"a worker process on {self.places[number]} cannot be started: {error}. What was finished is intact; mend the cause, "
                "or lower runtime.processes, and run the same command again."
            ) from error
        with self.changed:
            self.processes[name] = process
        self._answer(
            process,
            {**describe(self.run, self.places[number], threads, self.ahead), "quiet": number > 0},
        )
        return process

    def _serve(self, name: str, process: subprocess.Popen[str]) -> DisclError | None:
        """Answers a worker until it goes; returns the error that it told of, if any."""
        told: DisclError | None = None
        for line in _whole(process.stdout or ()):
            question = json.loads(line)
            with self.changed:
                if "take" in question:
                    piece = self.dispatcher.take(name, question["take"])
                    answer: Any = None if piece is None else [asdict(request) for request in piece]
                elif "advance" in question:
                    answer = self.dispatcher.advance(question["advance"])
                elif "done" in question:
                    self.counted.append(question["done"])
                    answer = None
                else:
                    told = getattr(errors, question["error"], RunError)(question["told"])
                    self.dispatcher.stop()
                    answer = None
                self.changed.notify_all()
            self._answer(process, answer)
        return told

    @staticmethod
    def _answer(process: subprocess.Popen[str], answer: Any) -> None:
        with suppress(OSError):  # it was killed meanwhile, as its attendant will find
            if process.stdin is not None:
                process.stdin.write(json.dumps(answer) + "\n")
                process.stdin.flush()

    def _count_loss(self, name: str, place: str, code: int) -> None:
        written = self.run.spectrum.ids()
        with self.changed:
            lost = self.dispatcher.lost(name, written)
            hopeless = self.losses.count(len(written))
        how = f"signal {-code}" if code < 0 else f"status {code}"
        if hopeless:
            raise RunError(
                f"worker processes on {place} end with {how} before they write an image, {DEATHS} in a row; what they told stands above. "
                "Signal 9 mostly means that the memory is full: lower runtime.slots or runtime.processes."
            )
        say(
            f"generate: the worker on {place} ended with {how}; the {lost} images that it had not written are made by another"
        )


def _whole(lines: Iterable[str]) -> Iterator[str]:
    """The lines, but not the half that is left of one whose writer was killed."""
    return (line for line in lines if line.endswith("\n"))


def _listen(lines: Iterable[str], answers: SimpleQueue[str]) -> None:
    """Hands on what the process says that started this one; when that one is gone, even killed, this one ends at once.

    It writes nothing any more, for a command that is run again makes what is not written by then.
    """
    try:
        for line in _whole(lines):
            answers.put(line)
    finally:
        os._exit(1)


def main() -> None:
    """A worker process."""
    for each in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # whoever started it has got it too, and tells it to stop
        signal.signal(each, signal.SIG_IGN)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    answers: SimpleQueue[str] = SimpleQueue()
    threading.Thread(
        target=_listen, args=(os.fdopen(os.dup(0)), answers), name="listen", daemon=True
    ).start()

    def ask(**question: Any) -> Any:
        channel.write(json.dumps(question) + "\n")
        channel.flush()
        return json.loads(answers.get())

    def take(idle: bool) -> list[Request] | None:
        answer = ask(take=idle)
        return None if answer is None else [Request(**request) for request in answer]

    told = json.loads(answers.get())
    console.quiet = told["quiet"]
    try:
        done = work(open_described(told), told["ahead"], take, lambda: bool(ask(advance=1)))
        ask(done=done)
    except DisclError as error:
        ask(error=type(error).__name__, told=str(error))
    except BrokenPipeError:
        os._exit(1)  # nobody is there any more


if __name__ == "__main__":
    main()
