"""Several processes that generate together: one per device of this machine, all fed by this one.

A worker process speaks in lines of JSON: it reads on its standard input what run it works for, then asks on its standard output for
requests (`take`) and tells what it denoised (`advance`), each answered by one line. It is started again where it is killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .. import errors
from ..console import console, say
from ..errors import DisclError, RunError
from ..recipe import validate
from ..spectrum.dispatch import Dispatcher
from ..spectrum.plan import Request
from ..spectrum.queue import Work
from ..workspace import Run
from .making import Sources, make_worker

PAUSE = 0.2
"""Seconds between two questions of a worker for which there is no work now."""
DEATHS = 3
"""How often workers may be killed one after the other, without an image in between, before it is given up."""
GRACE = 120.0
"""Seconds in which a worker that was told to stop writes what it has finished."""


class Stopped(Exception):
    """A worker was told to go."""


def devices(run: Run) -> list[str]:
    """Where this machine generates, one worker each: `runtime.processes` of them, by default every visible GPU, else one place."""
    asked, device = run.recipe.runtime, str(run.device)
    visible = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if device == "cuda" else [device]
    count = asked.processes or len(visible)
    return [visible[number % len(visible)] for number in range(count)]


def work(run: Run, ahead: int, take: Callable[[bool], list[Request] | None], advance: Callable[[], bool]) -> dict[str, int]:
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
    runtime = run.recipe.runtime.model_copy(update={"device": device, "threads": threads, "processes": 1})
    recipe = run.recipe.model_copy(update={"runtime": runtime}).plain()
    borrowed = {name: str(path.absolute()) for name, path in run.borrowed.items()}
    return {"recipe": recipe, "folder": str(run.folder.absolute()), "borrowed": borrowed, "cwd": str(Path.cwd()), "ahead": ahead}


def open_described(told: Mapping[str, Any]) -> Run:
    """The run that `describe` was given."""
    with suppress(OSError):  # a machine that lacks it will say which of the recipe's paths it lacks
        os.chdir(told["cwd"])
    run = Run(validate(told["recipe"]), Path(told["folder"]), {name: Path(path) for name, path in told["borrowed"].items()})
    if run.recipe.runtime.threads:
        torch.set_num_threads(run.recipe.runtime.threads)
    return run


class Alone:
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

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Crew:
    """Worker processes on this machine, one per device; used as a context, at whose end they go."""

    command: tuple[str, ...] = (sys.executable, "-P", "-m", "discl.stages.crew")

    def __init__(self, run: Run, places: Sequence[str]) -> None:
        self.run, self.places = run, places
        self.dispatcher, self.changed = Dispatcher(len(places)), threading.Condition()
        self.error: DisclError | None = None
        self.deaths, self.denoised_then = 0, -1
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.counted: list[dict[str, int]] = []
        self.ahead = 0
        self.threads: list[threading.Thread] = []

    def make(self, requests: Sequence[Request], advance: Callable[[int], None]) -> None:
        """Makes the requests and returns when all are written; `advance` is told how many are denoised."""
        with self.changed:
            before, _ = self.dispatcher.progress()
            self.dispatcher.plan(requests)
        if not self.threads:
            self.ahead = self.dispatcher.even(len(requests))
            self.threads = [threading.Thread(target=self._attend, args=(number,), daemon=True) for number in range(len(self.places))]
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

    def __enter__(self) -> Crew:
        say(f"generate: {len(self.places)} processes, on {', '.join(dict.fromkeys(self.places))}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self.changed:
            self.dispatcher.stop()
            loading = [process for name, process in self.processes.items() if name not in self.dispatcher.known()]
        if kind is not None:
            for process in loading:
                process.kill()
        deadline = time.monotonic() + GRACE
        for thread in self.threads:
            thread.join(max(deadline - time.monotonic(), 0))
        for process in self.processes.values():
            process.kill()

    def _attend(self, number: int) -> None:
        """Serves the worker of a device, and starts it again where it is killed."""
        for life in range(10**6):
            name = f"{number}.{life}"
            process = self._start(number, name)
            error = self._serve(name, process)
            code = process.wait()
            if error is None and code != 0:
                error = self._count_loss(name, self.places[number], code)
            with self.changed:
                self.error = self.error or error
                self.changed.notify_all()
                if error is not None or code == 0 or self.dispatcher.stopped:
                    return

    def _start(self, number: int, name: str) -> subprocess.Popen[str]:
        asked = self.run.recipe.runtime.threads
        threads = asked or (max(torch.get_num_threads() // len(self.places), 1) if self.places[number] == "cpu" else None)
        package = str(Path(errors.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))}
        process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        with self.changed:
            self.processes[name] = process
        self._answer(process, {**describe(self.run, self.places[number], threads, self.ahead), "quiet": number > 0})
        return process

    def _serve(self, name: str, process: subprocess.Popen[str]) -> DisclError | None:
        """Answers a worker until it goes; returns the error that it told of, if any."""
        told: DisclError | None = None
        for line in process.stdout or ():
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

    def _count_loss(self, name: str, place: str, code: int) -> DisclError | None:
        written = self.run.spectrum.ids()
        with self.changed:
            lost = self.dispatcher.lost(name, written)
            denoised, _ = self.dispatcher.progress()
            self.deaths = self.deaths + 1 if denoised == self.denoised_then else 1
            self.denoised_then = denoised
            if self.dispatcher.stopped:
                return None
        how = f"signal {-code}" if code < 0 else f"status {code}"
        if self.deaths >= DEATHS:
            return RunError(
                f"worker processes on {place} end with {how} before they make an image, {DEATHS} in a row; what they wrote stands above. "
                "Signal 9 mostly means that the memory is full: lower runtime.slots or runtime.processes."
            )
        say(f"generate: the worker on {place} ended with {how}; the {lost} images that it had not written are made by another")
        return None


def main() -> None:
    """A worker process."""
    for each in (signal.SIGINT, signal.SIGTERM):  # whoever started it has got it too, and tells it to stop
        signal.signal(each, signal.SIG_IGN)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def ask(**question: Any) -> Any:
        channel.write(json.dumps(question) + "\n")
        channel.flush()
        line = sys.stdin.readline()
        if not line:
            raise Stopped
        return json.loads(line)

    def take(idle: bool) -> list[Request] | None:
        answer = ask(take=idle)
        return None if answer is None else [Request(**request) for request in answer]

    told = json.loads(sys.stdin.readline())
    console.quiet = told["quiet"]
    try:
        done = work(open_described(told), told["ahead"], take, lambda: bool(ask(advance=1)))
        ask(done=done)
    except DisclError as error:
        ask(error=type(error).__name__, told=str(error))
    except (Stopped, BrokenPipeError):
        os._exit(1)  # nobody is there any more


if __name__ == "__main__":
    main()
