"""Engine and training on one GPU, in at most eight minutes: the work of `gpu.sh`.

Parts run in the order of their importance, in few processes: a crash, or an error that spoils the
GPU for its process, costs one part. Every part has a time limit. What goes wrong is recorded with
its error, and the next part follows. Figures are in `gpu.json`, which is written after each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from types import FrameType
from typing import Any

from discl.utils.atomic import whole
from figures import Figure

HERE = Path(__file__).parent
RESULT = "gpu.json"
SECONDS = 460
"""Of a whole run; a machine may be lent for eight minutes."""
START = 5
"""Least seconds that are left for a part to be started; three times that for a process."""
LOADING = 40
"""Seconds for a process to load its modules."""
SLOWER = 10
"""Factor of the limits with `--smoke`."""
GRACE = 20
"""Seconds after its limit until a process is killed that does not stop by itself."""
PACKAGES = ("torch", "diffusers", "transformers", "kornia", "safetensors", "numpy", "pillow")


@dataclass(frozen=True)
class Part:
    """A few figures that are measured together.

    - `name`: of a function in `module`, which takes a bench and yields figures.
    - `limit`: seconds after which it is stopped.
    """

    module: str
    name: str
    limit: float


GROUPS = (
    (
        Part("gpu_engine", "ceiling", 20),
        Part("gpu_engine", "equality", 80),
        Part("gpu_engine", "engine", 90),
        Part("gpu_engine", "pipelines", 80),
        Part("gpu_engine", "batch_finder", 40),
        Part("gpu_engine", "scorer", 40),
        Part("gpu_engine", "autoencoder", 30),
        Part("gpu_engine", "kernels", 20),
        Part("gpu_engine", "layouts", 20),
        Part("gpu_engine", "compiled", 170),
    ),
    (
        Part("gpu_learning", "resnet10", 50),
        Part("gpu_learning", "clip_b16", 50),
        Part("gpu_checks", "checks", 50),
        Part("gpu_checks", "adapter", 30),
    ),
    (Part("gpu_checks", "tests", 90),),
    (Part("gpu_engine", "two_processes", 70),),
    (Part("gpu_engine", "compiled_pipelines", 200),),
)
"""Parts of one process each, the most important first."""


class TimeLimit(BaseException):
    """The time of a part is over; no `except Exception` on the way swallows it."""


class Record:
    """`gpu.json`: what was measured so far. Only one process writes at a time."""

    def __init__(self, path: Path, since: float) -> None:
        self.path, self.since = path, since

    def read(self) -> dict[str, Any]:
        if self.path.is_file():
            return json.loads(self.path.read_text())
        return {"settings": {}, "parts": {}, "figures": []}

    def change(self, change: Callable[[dict[str, Any]], None]) -> None:
        plain = self.read()
        change(plain)
        with whole(self.path) as unfinished:
            unfinished.write_text(json.dumps(plain, indent=1, ensure_ascii=False))

    def state(self, part: str, **told: Any) -> None:
        """Lays these values over what is told of a part."""
        self.change(lambda plain: plain["parts"].setdefault(part, {}).update(told))
        self.say(f"{part}: {told}")

    def add(self, part: str, figure: Figure) -> None:
        told = {"part": part, "name": figure.name, "value": figure.value}
        if figure.goal is not None:
            told |= {"comparison": figure.comparison, "goal": figure.goal, "met": figure.met}
        told |= {"detail": figure.detail} if figure.detail else {}
        self.change(lambda plain: plain["figures"].append(told))
        goal = "" if figure.goal is None else f" (goal {figure.comparison} {figure.goal:g})"
        self.say(f"{part}: {figure.name} {figure.value:.4g}{goal} {figure.detail}".rstrip())

    def say(self, line: str) -> None:
        print(f"{time.time() - self.since:6.1f} s  {line}", flush=True)


# ------------------------------------------------------------------------------- in each process


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeLimit in the block after that time."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def carry_out(part: Part, bench: Any, record: Record, until: float) -> None:
    """Measures a part and records how it ended; never raises."""
    limit = part.limit * (SLOWER if bench.smoke else 1)
    started, limit = time.time(), min(limit, until - time.time())
    record.state(part.name, status="running", limit=round(limit, 1))
    told: dict[str, Any] = {"status": "done"}
    bench.begin()
    try:
        with time_limit(limit):
            for figure in getattr(import_module(part.module), part.name)(bench):
                record.add(part.name, figure)
    except TimeLimit:
        told = {"status": "stopped", "error": f"not finished within {limit:.0f} s"}
    except Exception as error:
        lines = traceback.format_exc().splitlines()
        told = {
            "status": "failed",
            "error": f"{type(error).__name__}: {error}"[:1000],
            "trace": lines[-12:],
        }
    record.state(part.name, **told, seconds=round(time.time() - started, 1), **bench.end())


def work(parts: Sequence[Part], bench: Any, record: Record, until: float) -> None:
    """Measures parts in this process while time is left."""
    for module in dict.fromkeys(part.module for part in parts):  # a limit must not cut an import
        import_module(module)
    record.say(f"{', '.join(part.name for part in parts)}: modules are loaded")
    for part in parts:
        if until - time.time() > START:
            carry_out(part, bench, record, until)


# --------------------------------------------------------------------------------- the whole run


def run_groups(
    groups: Sequence[Sequence[Part]], record: Record, until: float, arguments: Sequence[str]
) -> None:
    """A process for each group; one that dies is followed by one for the rest of its group."""
    for group in groups:
        waiting = list(group)
        while waiting and until - time.time() > 3 * START:
            names = [part.name for part in waiting]
            limit = LOADING + sum(part.limit for part in waiting)
            limit = min(SLOWER * limit if "--smoke" in arguments else limit, until - time.time())
            command = [sys.executable, str(HERE / "gpu.py"), *arguments, "--parts", *names]
            command += ["--until", str(until), "--since", str(record.since)]
            ended = run_process(command, limit + GRACE)
            states = record.read()["parts"]
            for part in waiting:
                if states.get(part.name, {}).get("status") == "running":
                    record.state(part.name, status="crashed", error=ended)
            started = [part for part in waiting if part.name in record.read()["parts"]]
            if not started:  # it did not even come to its first part
                record.state(waiting[0].name, status="crashed", error=ended)
                started = waiting[:1]
            waiting = [part for part in waiting if part not in started]
        for part in waiting:
            record.state(part.name, status="skipped", error="no time was left")


def run_process(command: Sequence[str], limit: float) -> str:
    """Runs a command in a session of its own; returns how it ended and its last messages."""
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    )
    try:
        _, messages = process.communicate(timeout=limit)
        ended = f"ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, messages = process.communicate()
        ended = "was killed after its time"
    if process.returncode:
        sys.stderr.write(messages[-4000:])
    return f"the process {ended}: {messages[-1500:]}"


def describe_machine() -> dict[str, Any]:
    """Card, driver and versions, without loading torch."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        card = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        card = f"nvidia-smi: {type(error).__name__}"
    return {
        "card": card.strip(),
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "versions": versions,
        "began": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [part.name for group in GROUPS for part in group]
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder of gpu.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run")
    parser.add_argument("--parts", nargs="+", choices=every, help="only these parts")
    parser.add_argument("--smoke", action="store_true", help="tiny networks on the CPU")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    since = arguments.since or time.time()
    record = Record(arguments.out / RESULT, since)
    if arguments.smoke:  # on a CPU that may be busy
        arguments.seconds *= SLOWER
    if arguments.until:
        from gpu_bench import Bench

        names = arguments.parts or every
        parts = [part for group in GROUPS for part in group if part.name in names]
        work(parts, Bench(arguments.smoke), record, arguments.until)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    record.path.unlink(missing_ok=True)
    told = describe_machine() | {"smoke": arguments.smoke, "seconds": arguments.seconds}
    record.change(lambda plain: plain["settings"].update(told))
    record.say(str(told))
    chosen = arguments.parts or every
    groups = [[part for part in group if part.name in chosen] for group in GROUPS]
    if arguments.smoke:  # the same parts in one process: most of their time is its start
        groups = [[part for group in groups for part in group]]
    options = ["--out", str(arguments.out), *(["--smoke"] if arguments.smoke else [])]
    run_groups(groups, record, since + arguments.seconds, options)
    states = {name: told["status"] for name, told in record.read()["parts"].items()}
    record.say(f"{record.path}: {states}")
    if not record.read()["figures"]:
        raise SystemExit("nothing was measured.")


if __name__ == "__main__":
    main()
