"""What all workers share: one interface, progress, losses, and the loop of a worker process."""

from __future__ import annotations

import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from ...errors import RunError
from ...recipe import validate
from ...run_folder.run import Run
from ...spectrum.plan import Request
from ...spectrum.stats import Work
from ...utils.logging import SILENT, get_logger
from ...utils.memory import keep_freed_memory
from ..engine import Sources, make_worker
from .dispatcher import Dispatcher

logger = get_logger(__name__)

PAUSE = 0.2
"""Seconds between two questions of a worker that has nothing to do, and between two looks at it."""
DEATHS = 3
"""Workers that may end in a row, without an image written in between, until the command fails."""
GRACE = 120.0
"""Seconds in which a stopped worker writes what it has finished."""


class _Stopped(Exception):
    """A worker was stopped by its pool."""


class Workers(AbstractContextManager["Workers"]):
    """Makes the images of a plan. Use it as a context; all workers stop at its end."""

    @abstractmethod
    def make(self, requests: Sequence[Request], on_denoised: Callable[[int], None]) -> None:
        """Makes the requests and returns when all are written.

        - `on_denoised`: gets the number of images that were denoised since its last call.
        """

    @property
    @abstractmethod
    def work(self) -> Work:
        """Counters of all engines together; complete when the context has ended."""


class InProcessWorker(Workers):
    """Makes images in this process, on the run's device."""

    def __init__(self, run: Run) -> None:
        self.run, self.worker = run, make_worker(run)

    def make(self, requests: Sequence[Request], on_denoised: Callable[[int], None]) -> None:
        sources = Sources(self.run, requests)
        self.worker.make(requests, sources, sources.sizes, lambda request: on_denoised(1))

    @property
    def work(self) -> Work:
        return self.worker.engine.work

    def __exit__(self, *_: object) -> None:
        pass


@dataclass
class Losses:
    """Counts workers that ended one after the other without an image written in between.

    Denoised images do not count. A worker that ends before it writes would otherwise be started
    again for ever.
    """

    in_a_row: int = 0
    written: int = -1

    def count(self, written: int) -> bool:
        """Counts one more loss, when the store holds that many images; returns whether to fail."""
        self.in_a_row = 1 if written > self.written else self.in_a_row + 1
        self.written = max(written, self.written)
        return self.in_a_row >= DEATHS


class WorkerPool(Workers):
    """Several workers that take pieces of a plan from one dispatcher.

    A subclass starts them, watches them, and calls `_count_loss` for each that ended.
    """

    def __init__(self, run: Run, dispatcher: Dispatcher) -> None:
        self.run, self.dispatcher, self.losses = run, dispatcher, Losses()
        self.counted: list[Work] = []
        self.started = False

    def make(self, requests: Sequence[Request], on_denoised: Callable[[int], None]) -> None:
        """As `Workers.make`; raises what stopped a worker, and RunError for too many losses."""
        before, _ = self.dispatcher.progress()
        self.dispatcher.plan(requests)
        if not self.started:
            self.started = True
            self._start(requests)
        reported, written = 0, False
        while not written:
            self._watch()
            denoised, written = self.dispatcher.progress()
            count = min(denoised - before, len(requests))
            on_denoised(count - reported)
            reported = count

    @abstractmethod
    def _start(self, requests: Sequence[Request]) -> None:
        """Starts all workers, for a plan that begins with these requests."""

    @abstractmethod
    def _watch(self) -> None:
        """Waits for `PAUSE` seconds at most; raises what stopped a worker."""

    @property
    def work(self) -> Work:
        totals = {
            name: sum(getattr(each, name) for each in self.counted) for name in asdict(Work())
        }
        return Work(**totals)

    def _count_loss(self, name: str, ended: str, why: str) -> None:
        """Hands out again what a worker held that has ended; raises RunError for too many losses.

        - `ended`: says which worker ended, and with what; `why`: advice, or the error behind it.
        """
        held, written = self.dispatcher.held(name), self.run.spectrum.ids()
        lost = self.dispatcher.lost(name, held & written)
        if self.losses.count(len(written)):
            raise RunError(
                f"workers end before they write an image, {DEATHS} in a row: {ended}. {why}"
            )
        logger.warning(
            f"generate: {ended}; other workers make the {lost} images that it had not written"
        )


@dataclass(frozen=True)
class Assignment:
    """The run that a worker process works for, as plain values.

    - `overrides`: tables to read instead of those in the run folder, by name.
    - `ahead`: requests that a worker takes beyond those in its slots.
    - `level`: messages from this level on are sent to the command.
    """

    recipe: dict[str, Any]
    folder: str
    overrides: dict[str, str]
    cwd: str
    ahead: int
    level: int = SILENT

    @classmethod
    def of(cls, run: Run, device: str, threads: int | None, ahead: int, **more: Any) -> Self:
        """The assignment of one worker on a device; `more` are further fields."""
        runtime = run.recipe.runtime.model_copy(
            update={"device": device, "threads": threads, "processes": 1}
        )
        return cls(
            recipe=run.recipe.model_copy(update={"runtime": runtime}).plain(),
            folder=str(run.folder.absolute()),
            overrides={name: str(path.absolute()) for name, path in run.overrides.items()},
            cwd=str(Path.cwd()),
            ahead=ahead,
            **more,
        )

    def open(self) -> Run:
        """Opens the run in this process, with its number of threads."""
        keep_freed_memory()
        with suppress(OSError):  # where it does not exist, opening names the missing path
            os.chdir(self.cwd)
        overrides = {name: Path(path) for name, path in self.overrides.items()}
        run = Run(validate(self.recipe), Path(self.folder), overrides)
        if run.recipe.runtime.threads:
            torch.set_num_threads(run.recipe.runtime.threads)
        return run


def make_pieces(
    run: Run, ahead: int, take: Callable[[bool], list[Request] | None], advance: Callable[[], bool]
) -> Work:
    """Makes piece after piece in a worker process; returns the counters of its engine.

    - `ahead`: requests that are taken beyond those in the slots. All workers end at about the same
      time if none has many in store.
    - `take`: gets whether everything taken so far is written; returns requests, none if there are
      none at the moment, None at the end.
    - `advance`: called after each image; returns whether to go on.
    """
    worker, sources = make_worker(run), Sources(run, ())
    worker.look_ahead(ahead)

    def stream(piece: list[Request] | None) -> Iterator[Request]:
        while piece:
            sources.expect(piece)
            yield from piece
            piece = take(False)

    def on_finished(_: Request) -> None:
        if not advance():
            raise _Stopped

    while (piece := take(True)) is not None:
        if not piece:
            time.sleep(PAUSE)
            continue
        try:
            worker.make(stream(piece), sources, sources.sizes, on_finished)
        except _Stopped:
            break
    return worker.engine.work
