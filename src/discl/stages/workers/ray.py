"""One actor per device of a Ray cluster."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from ...errors import DisclError, RunError
from ...run_folder import paths
from ...run_folder.run import Run
from ...spectrum.plan import Request
from ...spectrum.stats import Work
from ...utils.atomic import writing
from ...utils.logging import get_logger, silence
from .base import GRACE, PAUSE, Assignment, WorkerPool, make_pieces
from .dispatcher import Dispatcher

logger = get_logger(__name__)

ANY = "auto"
"""The address of the cluster in `RAY_ADDRESS` or on this machine; one is started if there is none.
"""
TABLES = (paths.DATA, paths.HARD)
"""What a worker reads of the run folder; sent along for machines that do not see it."""
AT_ONCE = 20_000
"""Requests in one message."""


class RemoteDispatcher:
    """A dispatcher in a process of the cluster, with the methods of `Dispatcher`."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self.ray, self.actor = ray, actor

    def __getattr__(self, method: str) -> Any:
        return partial(self._call, method)

    def _call(self, method: str, *values: Any) -> Any:
        return self.ray.get(getattr(self.actor, method).remote(*values))

    def plan(self, requests: Sequence[Request]) -> None:
        """As `Dispatcher.plan`, in messages of bounded size."""
        for first in range(0, len(requests), AT_ONCE):
            self._call("plan", requests[first : first + AT_ONCE])


@dataclass(frozen=True)
class RayAssignment(Assignment):
    """An assignment for a machine that may not see the run folder.

    - `tables`: the content of `TABLES`, by name.
    - `store`: the address of the images if they are not in the run folder.
    - `node`: the machine of the command.
    """

    tables: dict[str, bytes] = field(default_factory=dict)
    store: str | None = None
    node: str = ""

    @contextmanager
    def opened(self, node: str) -> Iterator[Run]:
        """Opens the run on a machine; where it does not see the folder, with the tables sent along.

        Raises RunError where that machine could not store images.
        """
        if node == self.node or self._sees_folder():
            yield self.open()
            return
        if self.store is None or "://" not in self.store:
            raise RunError(
                f"machine {os.uname().nodename} does not see the run folder {self.folder}, so it "
                "cannot store images there. Put the folder where all machines see it, or set "
                "runtime.store to an address that all reach, such as s3://bucket/birds."
            )
        with tempfile.TemporaryDirectory(prefix="discl-") as folder:
            paths = {name: Path(folder) / name for name in self.tables}
            for name, path in paths.items():
                with writing(path):
                    path.write_bytes(self.tables[name])
            overrides = {name: str(path) for name, path in paths.items()}
            yield replace(self, overrides={**self.overrides, **overrides}).open()

    def _sees_folder(self) -> bool:
        try:
            return all(
                (Path(self.folder) / name).read_bytes() == content
                for name, content in self.tables.items()
                if name not in self.overrides
            )
        except OSError:
            return False


class RayWorkerPool(WorkerPool):
    """Workers on a Ray cluster: one per GPU, or one per CPU if there is no GPU.

    `runtime.processes` sets another number. Raises RunError where Ray is not installed or no
    cluster answers.
    """

    def __init__(self, run: Run, address: str = ANY) -> None:
        self.ray = _import_ray()
        self.started_cluster = not self.ray.is_initialized()
        if self.started_cluster:
            _join(self.ray, address)
        resources, runtime = self.ray.cluster_resources(), run.recipe.runtime
        gpus = 0 if runtime.device in {"cpu", "mps"} else int(resources.get("GPU", 0))
        threads = runtime.threads or 1
        self.count = runtime.processes or gpus or max(int(resources.get("CPU", 1)) // threads, 1)
        self.needs: dict[str, Any] = (
            {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_gpus": 0, "num_cpus": threads}
        )
        self.device = "cuda" if gpus else "cpu"
        self.threads = None if gpus else threads
        here = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            _node(self.ray), soft=False
        )
        options = {"num_cpus": 0, "scheduling_strategy": here}
        self.actor = self.ray.remote(Dispatcher).options(**options).remote(self.count)
        super().__init__(run, cast(Dispatcher, RemoteDispatcher(self.ray, self.actor)))
        self.assignment: Any = None
        self.running: dict[Any, tuple[str, Any]] = {}
        self.actors = 0

    def __enter__(self) -> RayWorkerPool:
        nodes = sum(1 for node in self.ray.nodes() if node["Alive"])
        logger.info(
            f"generate: {self.count} Ray workers on {nodes} machine{'s' if nodes > 1 else ''}"
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *others: object) -> None:
        try:
            self.dispatcher.stop()
            known = self.dispatcher.known()
            ending = [reference for reference, (name, _) in self.running.items() if name in known]
            if ending:
                ended, _ = self.ray.wait(ending, num_returns=len(ending), timeout=GRACE)
                self.counted += [work for each in ended if (work := self._result(each)) is not None]
            for _, actor in self.running.values():
                self.ray.kill(actor)
            self.ray.kill(self.actor)
        except self.ray.exceptions.RayError:
            if kind is None:
                raise
        finally:
            if self.started_cluster:
                self.ray.shutdown()

    def _start(self, requests: Sequence[Request]) -> None:
        tables = {name: self.run.path(name).read_bytes() for name in TABLES}
        assignment = RayAssignment.of(
            self.run, self.device, self.threads, Dispatcher(self.count).even(len(requests)),
            tables=tables, store=self.run.recipe.runtime.store, node=_node(self.ray),
        )  # fmt: skip
        self.assignment = self.ray.put(assignment)
        for _ in range(min(self.count, len({request.source_id for request in requests}))):
            self._start_actor()

    def _start_actor(self) -> None:
        name = f"worker {self.actors}"
        self.actors += 1
        actor = self.ray.remote(RayWorker).options(**self.needs, max_restarts=0).remote()
        self.running[actor.work.remote(name, self.actor, self.assignment)] = name, actor

    def _result(self, reference: Any) -> Work | None:
        """The counters of a worker that has ended; None where an error ended it."""
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayError:
            return None
        return result if isinstance(result, Work) else None

    def _watch(self) -> None:
        """Takes the results of workers that ended; starts another one for each that died."""
        ended, _ = self.ray.wait(list(self.running), timeout=PAUSE)
        for reference in ended:
            name, _ = self.running.pop(reference)
            try:
                result = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError:
                raise  # a bug, with its own traceback
            except self.ray.exceptions.RayError as error:
                self._count_loss(name, f"{name} died", str(error))
                self._start_actor()
                continue
            if isinstance(result, DisclError):
                raise result
            self.counted.append(result)


class RayWorker:
    """One device of the cluster."""

    def work(self, name: str, dispatcher: Any, assignment: RayAssignment) -> Work | DisclError:
        """Works until nothing is left; returns the engine's counters or the error that ended it."""
        import ray

        silence()
        remote = RemoteDispatcher(ray, dispatcher)
        try:
            with assignment.opened(ray.get_runtime_context().get_node_id()) as run:
                return make_pieces(
                    run,
                    assignment.ahead,
                    lambda written: remote.take(name, written),
                    lambda: bool(remote.advance()),
                )
        except DisclError as error:
            return error


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
            address=None if address == ANY else address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(
            f"no Ray cluster answers at '{address}': {error} Start one with `ray start --head`, or "
            "give no address to use this machine alone."
        ) from error


def _node(ray: Any) -> str:
    node: str = ray.get_runtime_context().get_node_id()
    return node
