"""One actor per device of a Ray cluster."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from ...errors import DisclError, RunError
from ...run_folder.run import Run
from ...spectrum.plan import Request
from ...spectrum.stats import Work
from ...utils.atomic import writing
from ...utils.console import console, say
from .dispatcher import Dispatcher
from .local import DEATHS, GRACE, PAUSE, Losses, Stopped, describe, open_described, work

ANY = "auto"
"""The address for: the cluster that `RAY_ADDRESS` names or that runs on this machine, else one that is started for the time being."""
TABLES = ("data.parquet", "hard.parquet")
"""What a worker reads of the run folder, sent along for machines that do not see it."""
AT_ONCE = 20_000
"""Requests in one message."""


class RayWorkerPool:
    """Workers on a Ray cluster, one per GPU, or, where there is none, one per CPU; used as a context, at whose end they go.

    `runtime.processes` asks for another number. Raises RunError where Ray is not installed or no cluster answers.
    """

    def __init__(self, run: Run, address: str = ANY) -> None:
        self.run, self.ray = run, _import_ray()
        self.ours = not self.ray.is_initialized()
        if self.ours:
            _join(self.ray, address)
        resources = self.ray.cluster_resources()
        device = run.recipe.runtime.device
        gpus = 0 if device in {"cpu", "mps"} else int(resources.get("GPU", 0))
        threads = run.recipe.runtime.threads or 1
        self.count = (
            run.recipe.runtime.processes or gpus or max(int(resources.get("CPU", 1)) // threads, 1)
        )
        self.needs: dict[str, Any] = (
            {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_gpus": 0, "num_cpus": threads}
        )
        self.place = "cuda" if gpus else "cpu"
        self.threads = None if gpus else threads
        self.told: Any = None
        here = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            _node(self.ray), soft=False
        )
        self.desk = (
            self.ray.remote(Dispatcher)
            .options(num_cpus=0, scheduling_strategy=here)
            .remote(self.count)
        )
        self.running: dict[Any, tuple[str, Any]] = {}
        self.counted: list[dict[str, int]] = []
        self.started, self.losses = 0, Losses()

    def make(self, requests: Sequence[Request], advance: Callable[[int], None]) -> None:
        """Makes the requests and returns when all are written; `advance` is told how many are denoised."""
        before, _ = self.ray.get(self.desk.progress.remote())
        for first in range(0, len(requests), AT_ONCE):
            self.ray.get(self.desk.plan.remote(requests[first : first + AT_ONCE]))
        if self.told is None:
            self.told = self.ray.put(self._described(len(requests)))
            for _ in range(min(self.count, len({request.source_id for request in requests}))):
                self._start()
        counted, written = 0, False
        while not written:
            self._look_after()
            denoised, written = self.ray.get(self.desk.progress.remote())
            count = min(denoised - before, len(requests))
            advance(count - counted)
            counted = count

    def _described(self, planned: int) -> dict[str, Any]:
        tables = {name: self.run.path(name).read_bytes() for name in TABLES}
        told = describe(self.run, self.place, self.threads, Dispatcher(self.count).even(planned))
        return {
            **told,
            "tables": tables,
            "store": self.run.recipe.runtime.store,
            "node": _node(self.ray),
        }

    @property
    def done(self) -> Work:
        """What the engines counted, all together; known when the workers have gone."""
        return Work(**{name: sum(each[name] for each in self.counted) for name in asdict(Work())})

    def __enter__(self) -> RayWorkerPool:
        nodes = sum(1 for node in self.ray.nodes() if node["Alive"])
        say(f"generate: {self.count} Ray workers on {nodes} machine{'s' if nodes > 1 else ''}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.ray.get(self.desk.stop.remote())
            known = self.ray.get(self.desk.known.remote())
            ending = [reference for reference, (name, _) in self.running.items() if name in known]
            ended, _ = (
                self.ray.wait(ending, num_returns=len(ending), timeout=GRACE)
                if ending
                else ([], [])
            )
            for reference in ended:
                self.counted += [
                    each["done"] for each in self._results(reference) if "done" in each
                ]
            for _, actor in self.running.values():
                self.ray.kill(actor)
            self.ray.kill(self.desk)
        except self.ray.exceptions.RayError:
            if kind is None:
                raise
        finally:
            if self.ours:
                self.ray.shutdown()

    def _start(self) -> None:
        name = f"worker {self.started}"
        self.started += 1
        actor = self.ray.remote(RayWorker).options(**self.needs, max_restarts=0).remote()
        self.running[actor.work.remote(name, self.desk, self.told)] = name, actor

    def _results(self, reference: Any) -> list[dict[str, Any]]:
        try:
            return [self.ray.get(reference)]
        except self.ray.exceptions.RayError:
            return []

    def _look_after(self) -> None:
        """Waits a moment; gives the work of a worker that died to others, and starts another one in its place."""
        ended, _ = self.ray.wait(list(self.running), timeout=PAUSE)
        for reference in ended:
            name, _ = self.running.pop(reference)
            try:
                result = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError:
                raise  # a bug, with its own traceback
            except self.ray.exceptions.RayError as error:
                self._count_loss(name, error)
                self._start()
                continue
            if "error" in result:
                raise result["error"]
            self.counted.append(result["done"])

    def _count_loss(self, name: str, error: Exception) -> None:
        held, written = self.ray.get(self.desk.held.remote(name)), self.run.spectrum.ids()
        lost = self.ray.get(self.desk.lost.remote(name, held & written))
        if self.losses.count(len(written)):
            raise RunError(
                f"Ray workers die before they write an image, {DEATHS} in a row: {error}"
            ) from error
        say(f"generate: {name} died; the {lost} images that it had not written are made by another")


class RayWorker:
    """One device of the cluster."""

    def work(self, name: str, desk: Any, told: Mapping[str, Any]) -> dict[str, Any]:
        """Works for the run until the desk has no more; returns what its engine counted, or the error that stopped it."""
        import ray

        console.quiet = True
        try:
            with _open(told, ray.get_runtime_context().get_node_id()) as run:
                done = work(
                    run,
                    told["ahead"],
                    lambda idle: ray.get(desk.take.remote(name, idle)),
                    lambda: bool(ray.get(desk.advance.remote())),
                )
        except DisclError as error:
            return {"error": error}
        except Stopped:
            return {"done": asdict(Work())}
        return {"done": done}


@contextmanager
def _open(told: Mapping[str, Any], node: str) -> Iterator[Run]:
    """The run, with the tables that were sent along where this machine does not see its folder; they go at the end."""
    folder, shared = Path(told["folder"]), True
    if node != told["node"]:
        try:
            shared = all(
                (folder / name).read_bytes() == content
                for name, content in told["tables"].items()
                if name not in told["borrowed"]
            )
        except OSError:
            shared = False
    if not shared and (told["store"] is None or "://" not in told["store"]):
        raise RunError(
            f"machine {os.uname().nodename} does not see the run folder {folder}, so it has no place for images; put the folder where all "
            "machines see it, or set runtime.store to a place that all reach, such as s3://bucket/birds."
        )
    if shared:
        yield open_described(told)
        return
    with tempfile.TemporaryDirectory(prefix="discl-") as lent:
        for name, content in told["tables"].items():
            with writing(Path(lent) / name):
                (Path(lent) / name).write_bytes(content)
        yield open_described(
            {
                **told,
                "borrowed": {
                    **told["borrowed"],
                    **{name: str(Path(lent) / name) for name in told["tables"]},
                },
            }
        )


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise RunError("--ray needs Ray; install it with pip install 'discl[ray]'.") from error
    return ray


def _join(ray: Any, address: str) -> None:
    try:
        ray.init(
            address=None if address == ANY else address, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        )  # fmt: skip
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(
            f"no Ray cluster answers at '{address}': {error} Start one with `ray start --head`, or leave the address out to use this "
            "machine alone."
        ) from error


def _node(ray: Any) -> str:
    node: str = ray.get_runtime_context().get_node_id()
    return node
