"""Generation killed at random moments: images lost, doubled or changed, and work done twice.

    python benchmarks/kill.py --kills 50 --json benchmarks/results/kill.json

A run of the embedded example is generated once without kills. New runs of it, with a plan, are
then killed with SIGKILL at random moments and started again with the same command until they are
complete, until there are enough kills. The time of about every fifth kill is counted from the
opening of the folder, of the others from the first call of the UNet.

The store is checked after every life. Each life is a fork of this process, which has loaded the
models, so kills hit work and not imports. It counts the rows of its UNet in shared memory. Redone
rows were computed for images that were not yet written at the kill.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from discl.pipeline import run_until
from discl.recipe import load_recipe
from discl.run_folder.open import open_run
from discl.run_folder.run import Run
from discl.spectrum import engine as engine_module
from discl.spectrum import worker as worker_module
from discl.spectrum.plan import read_plan
from discl.spectrum.stats import Work
from discl.stages import engine as engine_stage
from discl.stages import pending as pending_stage
from discl.stages.budget import count_rows


@dataclass
class Found:
    """What the lives of all runs have shown."""

    kills: int = 0
    lost: int = 0
    doubled: int = 0
    largest_difference: int = 0
    redone: list[int] = field(default_factory=list)


def recipe(seeds: int, steps: int, slots: int, shard_rows: int) -> Any:
    overrides = {
        "spectrum.seeds": seeds,
        "spectrum.levels": [30, 60],
        "spectrum.num_inference_steps": steps,
        "methods": {"ce": {}},
        "runtime.slots": slots,
        "runtime.shard_rows": shard_rows,
        "runtime.device": "cpu",
        "runtime.threads": 1,
    }
    return load_recipe("fashion-lt", overrides)


def live(folder: Path, asked: Any, tally: Path) -> int:
    """A process that generates; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        descriptor = os.open(tally, os.O_RDWR | os.O_CREAT)

        class Told(Work):
            """Counters of which the rows stand in a file at any moment."""

            def __setattr__(self, name: str, value: int) -> None:
                super().__setattr__(name, value)
                if name == "unet_rows":
                    os.pwrite(descriptor, b"%012d" % value, 0)

        engine_module.Work = Told  # type: ignore[misc]
        run_until(open_run(asked, folder), "generate")
        os._exit(0)
    except (
        BaseException
    ) as error:  # told to the process that forked, which must not go on in this one
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def look(run: Run) -> tuple[dict[str, bytes], int]:
    """(`{id: encoded picture}`, rows that are there more than once)."""
    rows = run.spectrum.read(["id", "image"]).to_pylist()
    counts = Counter(row["id"] for row in rows)
    return {row["id"]: row["image"]["bytes"] for row in rows}, sum(
        count - 1 for count in counts.values()
    )


def difference(made: bytes, reference: bytes) -> int:
    """The largest, in grey levels."""
    first, second = (
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
        for data in (made, reference)
    )
    return int(np.abs(first - second).max())


def torture(
    folder: Path,
    asked: Any,
    reference: dict[str, bytes],
    found: Found,
    kills: int,
    longest: float,
    chance: random.Random,
) -> None:
    """One run from nothing to its end, killed until there were `kills` in all."""
    run = open_run(asked, folder)
    run_until(run, "plan")
    requests = read_plan(run.path("plan.parquet"))
    tally, done = folder.parent / f"{folder.name}.rows", False
    before: set[str] = set()
    while not done:
        tally.write_bytes(b"%012d" % 0)
        child = live(folder, asked, tally)
        wait, from_birth = chance.uniform(0, longest), chance.random() < 0.2
        status: int | None = None
        end = float("inf")
        while time.monotonic() < end and status is None:
            if (
                end == float("inf")
                and found.kills < kills
                and (from_birth or int(tally.read_bytes()))
            ):
                end = time.monotonic() + wait
            ended, code = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if ended else None
            time.sleep(0.002)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found.kills += 1
        elif status != 0:
            raise SystemExit(f"a process ended with status {status}; see above.")
        done = status == 0
        made, doubled = look(run)
        found.lost += len(before - set(made))
        found.doubled += doubled
        if status is None:
            new = [request for request in requests if request.id in set(made) - before]
            found.redone.append(int(tally.read_bytes()) - count_rows(run, new))
        before = set(made)
    found.lost += len(set(reference) - before)
    found.largest_difference = max(
        found.largest_difference, *(difference(made[name], reference[name]) for name in reference)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--seeds", type=int, default=6, help="images per source and level; 26 sources, 2 levels"
    )
    parser.add_argument("--steps", type=int, default=10, help="of denoising, for level 0")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--shard-rows", type=int, default=8)
    parser.add_argument(
        "--waiting",
        type=int,
        default=worker_module.WAITING,
        help="pictures that wait for the encoder, at most",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    worker_module.WAITING = arguments.waiting
    torch.set_num_threads(1)
    engine_stage.load_generator = cache(engine_stage.load_generator)  # type: ignore[assignment]
    pending_stage.ClipScorer = _once(pending_stage.ClipScorer)  # type: ignore[misc,assignment]
    asked = recipe(arguments.seeds, arguments.steps, arguments.slots, arguments.shard_rows)
    found, chance = Found(), random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        whole = open_run(asked, Path(place) / "whole")
        run_until(whole, "plan")
        engine_stage.make_worker(whole)
        started = time.monotonic()
        run_until(whole, "generate")
        undisturbed = time.monotonic() - started
        reference, _ = look(whole)
        runs = 0
        while found.kills < arguments.kills:
            runs += 1
            torture(
                Path(place) / f"run-{runs}",
                asked,
                reference,
                found,
                arguments.kills,
                undisturbed / 3,
                chance,
            )
            print(
                f"run {runs}: {found.kills} kills so far,",
                f"{found.lost} lost, {found.doubled} doubled",
                flush=True,
            )
        planned = read_plan(whole.path("plan.parquet"))
        longest = max(count_rows(whole, [request]) for request in planned)
        rows = count_rows(whole, planned)
    images = arguments.slots + min(arguments.slots, 16) + arguments.waiting + arguments.shard_rows
    result = {
        "kills": found.kills,
        "runs": runs,
        "images_per_run": len(reference),
        "undisturbed_seconds": round(undisturbed, 1),
        "slots": arguments.slots,
        "shard_rows": arguments.shard_rows,
        "lost": found.lost,
        "doubled": found.doubled,
        "largest_difference_in_grey_levels": found.largest_difference,
        "redone_rows_median": statistics.median(found.redone),
        "redone_rows_most": max(found.redone),
        "rows_in_flight_at_most": images * longest,
        "rows_in_all": rows,
    }
    for name, value in result.items():
        print(f"{name.replace('_', ' '):<40}{value:>10}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if (
        found.lost
        or found.doubled
        or found.largest_difference > 1
        or max(found.redone) > images * longest
    ):
        raise SystemExit("a goal is missed")


def _once(kind: Any) -> Any:
    made: list[Any] = []

    def make(*arguments: Any, **named: Any) -> Any:
        if not made:
            made.append(kind(*arguments, **named))
        return made[0]

    return make


if __name__ == "__main__":
    main()
