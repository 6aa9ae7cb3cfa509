"""The speed of two worker processes against one. The goal is 1.9 times, with devices for two.

    python benchmarks/workers.py --json benchmarks/results/workers.json

There are two arms, each with one worker and with two in turns. Workers are loaded and warm, and
the store is empty each time:

- `cpu`: the embedded model with one thread per worker. It needs an idle core per worker, and prints
  the number of idle cores.
- `waiting`: each call of the UNet waits a fixed time instead of computing, as a process does while
  its GPU computes. Everything else is real: taking requests, VAE, CLIP, encoding, writing. It
  measures the cost of feeding and sharing, not the speed of a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from discl.pipeline import run_until
from discl.recipe import load_recipe
from discl.run_folder.open import open_run
from discl.spectrum.models.stable_diffusion import StableDiffusion
from discl.spectrum.plan import read_plan
from discl.stages.workers import local

WAIT = "DISCL_BENCHMARK_WAIT"
GOAL = 1.9


def recipe(seeds: int, slots: int) -> Any:
    overrides = {
        "spectrum.seeds": seeds,
        "spectrum.levels": [30, 60],
        "spectrum.num_inference_steps": 10,
        "methods": {"ce": {}},
        "runtime.slots": slots,
        "runtime.shard_rows": 32,
        "runtime.device": "cpu",
        "runtime.threads": 1,
    }
    return load_recipe("fashion-lt", overrides)


def seconds(place: Path, asked: Any, workers: int) -> float:
    """Seconds in which the workers make the plan, without a first part that warms them up."""
    run = open_run(asked, place)
    run_until(run, "plan")
    requests = read_plan(run.path("plan.parquet"))
    warm = len(requests) // 8
    with local.LocalWorkerPool(run, ["cpu"] * workers) as team:
        team.make(requests[:warm], lambda count: None)
        started = time.perf_counter()
        team.make(requests[warm:], lambda count: None)
        taken = time.perf_counter() - started
    assert run.spectrum.ids() == {request.id for request in requests}
    return taken


def idle_cores(seconds: float = 3.0) -> float:
    """Idle cores during a moment in which this process is idle."""
    import psutil

    return sum(100 - percent for percent in psutil.cpu_percent(seconds, percpu=True)) / 100


def worker(connection: Connection, environment: dict[str, str]) -> None:
    """A worker process whose network waits, where the environment says so."""
    if wait := float(environment.get(WAIT, 0)):

        def predict(self: StableDiffusion, latents: torch.Tensor, *_: Any) -> torch.Tensor:
            time.sleep(wait)
            return torch.zeros_like(latents)

        StableDiffusion.predict = predict  # type: ignore[method-assign]
    local.run_worker(connection, environment)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=8, help="images per source and level; 26 sources, 2 levels"
    )
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument(
        "--wait", type=float, default=0.5, help="seconds of a call in the arm that waits"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--arms", default="waiting,cpu")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    target = importlib.import_module(Path(__file__).stem).worker  # importable in a worker
    local.LocalWorkerPool.target = staticmethod(target)  # type: ignore[method-assign]
    asked = recipe(arguments.seeds, arguments.slots)
    result: dict[str, Any] = {
        "slots": arguments.slots,
        "cores": os.cpu_count(),
        "goal": GOAL,
        "seconds_of_a_call_that_waits": arguments.wait,
    }
    with tempfile.TemporaryDirectory() as place:
        for arm in arguments.arms.split(","):
            wait = {"waiting": arguments.wait, "cpu": 0.0}[arm]
            os.environ[WAIT] = str(wait)
            idle = idle_cores()
            taken: dict[int, list[float]] = {1: [], 2: []}
            for turn in range(arguments.repetitions):
                for workers in (1, 2):
                    taken[workers].append(
                        seconds(Path(place) / f"{arm}-{turn}-{workers}", asked, workers)
                    )
            ratios = [one / two for one, two in zip(taken[1], taken[2], strict=True)]
            result[arm] = {
                "idle_cores_before": round(idle, 1),
                "seconds_of_one": [round(each, 1) for each in taken[1]],
                "seconds_of_two": [round(each, 1) for each in taken[2]],
                "ratio_median": round(statistics.median(ratios), 2),
                "ratios": [round(ratio, 2) for ratio in ratios],
                "met": statistics.median(ratios) >= GOAL,
            }
            print(f"{arm}: {json.dumps(result[arm])}", flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
