"""CIFAR100-LT at the full 200 epochs on one GPU, about a minute a training: `gpu.sh cifar MINUTES`.

    python benchmarks/gpu_pack.py --data DIR --out build/gpu/data  # once, on any machine
    benchmarks/gpu.sh cifar 8 --data build/gpu/data --out OUT      # on the machine with the GPU
    python benchmarks/gpu_pack.py --table OUT/cifar.zip            # the table, on any machine

It needs numpy, Pillow, safetensors and torch. Strategies, mixtures, draws, networks and losses are
the package's. The loop is its own: pixels and augmentation live on the GPU, and a gradient step is
a CUDA graph. Before anything is trained, steps with and without a graph are compared. Where they
differ or a graph cannot be captured, steps are launched one by one.

Several trainings run at once, each on its own stream, as many as a short trial finds best and the
time allows. Each is a unit: when it ends, its figures and predictions are added to `cifar.zip`. A
unit that is there is not trained again. Units of `CLAIM` come first, seed by seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from discl.training.objectives import CORRECTED, adjust_logits
from discl.utils.atomic import whole
from discl.utils.hashing import digest
from gpu_data import Data, read_data, smoke_data, write_data
from gpu_train import Training

CLAIM = ("ce", "ce-undersampled", "ce-discl", "ce-all-levels", "ce-text-only")
"""The rows of the claim with their controls; the others follow."""
ARCHIVE = "cifar.zip"
TOGETHER = (1, 2, 4, 6)
"""Numbers of simultaneous trainings that are tried."""
RESERVE = 10
"""Seconds that are kept for measuring on the test images."""
EQUAL = 0.02
"""Largest relative difference of losses with and without a graph, in bfloat16."""


class Archive:
    """`cifar.zip`: for each unit its figures as JSON and its predictions as safetensors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, bytes]:
        if not self.path.is_file():
            return {}
        with zipfile.ZipFile(self.path) as stored:
            return {name: stored.read(name) for name in stored.namelist()}

    def add(self, files: dict[str, bytes]) -> None:
        """Writes the archive again with these files; a kill leaves the old one."""
        everything = self.read() | files
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (
            whole(self.path) as unfinished,
            zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as stored,
        ):
            for name, content in sorted(everything.items()):
                stored.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)


def identity(data: Data, name: str, seed: int) -> str:
    """A digest of everything that a unit's figures depend on."""
    settings = data.settings
    told = [settings[key] for key in ("train", "classifier", "levels")]
    return digest(told, settings["rows"][name], seed, data.digest)


def missing_units(data: Data, archive: Archive, seeds: Sequence[int]) -> list[tuple[str, int]]:
    """(row, seed) of what is still to be trained, in order."""
    rows = data.settings["rows"]
    first = [name for name in CLAIM if name in rows]
    order = [
        (name, seed)
        for names in (first, [name for name in rows if name not in first])
        for seed in seeds
        for name in names
    ]
    stored = archive.read()
    done = {
        key.removesuffix(".json"): json.loads(content)["identity"]
        for key, content in stored.items()
        if key.startswith("seed-") and key.endswith(".json")
    }
    return [
        (name, seed)
        for name, seed in order
        if done.get(f"seed-{seed}/{name}") != identity(data, name, seed)
    ]


def describe_unit(data: Data, training: Training, seconds: float, beside: int) -> dict[str, bytes]:
    """The files of a finished training. Raises ArithmeticError for a loss that is not finite."""
    losses = training.losses.cpu().numpy()
    if not np.isfinite(losses).all():
        first = int(np.flatnonzero(~np.isfinite(losses))[0])
        raise ArithmeticError(f"the loss of {training.name} is not finite in epoch {first}")
    labels = data.images["test"]["labels"]
    test = torch.from_numpy(data.images["test"]["pixels"]).permute(0, 3, 1, 2)
    logits = training.logits(test.to(training.device))
    rows = {training.name: logits}
    if training.objective.name not in CORRECTED:  # τ and prior as without validation images
        counts = torch.from_numpy(training.drawn).clamp_min(1)
        rows[f"{training.name}+la"] = adjust_logits(logits, counts)
    predicted = {name: each.argmax(1).numpy().astype(np.uint8) for name, each in rows.items()}
    told = {
        "identity": identity(data, training.name, training.seed),
        "epochs": len(losses),
        "seconds": round(seconds, 1),
        "trained_together": beside,
        "cuda_graph": training.graph is not None,
        "precision": str(training.precision).removeprefix("torch."),
        "device": describe_device(training.device),
        "levels": [[list(key), len(list(run))] for key, run in _runs(training.levels)],
        "class_samples": training.drawn.tolist(),
        "loss": [round(float(loss), 4) for loss in losses],
        "rows": {
            name: accuracies(each, labels, data.settings["groups"])
            for name, each in predicted.items()
        },
    }
    place = f"seed-{training.seed}/{training.name}"
    return {
        f"{place}.json": json.dumps(told).encode(),
        f"{place}.safetensors": save(predicted),
    }


def _runs(levels: Sequence[Sequence[int]]) -> Iterator[tuple[tuple[int, ...], Iterator[Any]]]:
    return itertools.groupby(tuple(each) for each in levels)


def describe_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def accuracies(
    predicted: np.ndarray, labels: np.ndarray, groups: dict[str, list[int]]
) -> dict[str, float]:
    """Mean class accuracy of each group of classes, and accuracy over all images, in [0, 1]."""
    right = predicted == labels
    of_class = {label: float(right[labels == label].mean()) for label in np.unique(labels)}
    means = {
        name: float(np.mean([of_class[label] for label in members if label in of_class]))
        for name, members in groups.items()
        if members
    }
    return means | {"accuracy": float(right.mean())}


@dataclass(frozen=True)
class Session:
    """What all trainings of a call share; `pixels` are on the device, by kind of images."""

    data: Data
    device: torch.device
    pixels: dict[str, Tensor]
    graph: bool
    precision: torch.dtype

    @classmethod
    def on(cls, data: Data, device: torch.device, graph: bool) -> Session:
        kinds = {row["images"]: name for name, row in data.settings["rows"].items()}
        pixels = {
            kind: torch.from_numpy(data.pixels(name)).permute(0, 3, 1, 2).to(device)
            for kind, name in kinds.items()
        }
        precision = torch.bfloat16 if device.type == "cuda" else torch.float32
        return cls(data, device, pixels, graph, precision)

    def training(self, name: str, seed: int, graph: bool | None = None) -> Training:
        pixels = self.pixels[self.data.settings["rows"][name]["images"]]

        def make(graph: bool) -> Training:
            return Training(self.data, name, seed, pixels, graph=graph, precision=self.precision)

        if graph is not None:
            return make(graph)
        try:
            return make(self.graph)
        except RuntimeError as error:  # a loss that no graph can have
            print(f"{name}: {error}", flush=True)
            return make(False)


def check_graph(session: Session, steps: int = 8) -> tuple[bool, str]:
    """(Whether steps as a graph give the losses of steps without one, what was found)."""
    losses = []
    try:
        for graph in (False, True):
            training = session.training("ce", 0, graph)
            seen = []
            for _ in itertools.islice(training.steps(), steps):
                torch.cuda.synchronize()
                seen.append(training.total.item())
            losses.append(np.diff(seen, prepend=0.0))
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"[:500]
    difference = float(np.max(np.abs(losses[0] - losses[1]) / np.abs(losses[0])))
    return difference <= EQUAL, f"losses differ by {difference:.2g} of their value"


def measure_speeds(
    session: Session, together: Sequence[int] = TOGETHER, steps: int = 40
) -> dict[int, float]:
    """Steps per second of all trainings together, by how many run at once."""
    speeds = {}
    for count in together:
        try:
            trainings = [session.training("ce", seed) for seed in range(count)]
            running = [training.steps() for training in trainings]
            for _ in range(5):
                _advance(running)
            torch.cuda.synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                _advance(running)
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{count} at once: {error}", flush=True)
            break
        speeds[count] = round(count * steps / (time.perf_counter() - started), 1)
    return speeds


def choose_count(speeds: dict[int, float], steps: int, seconds: float) -> int:
    """How many trainings of `steps` to run at once: the fastest number that ends in time, or 0."""
    fits = [count for count, speed in speeds.items() if count * steps / speed <= seconds]
    return max(fits, key=lambda count: speeds[count], default=0)


def _advance(running: Sequence[Iterator[int]]) -> int | None:
    """One step of each; returns the epoch of the first, None at the end."""
    epochs = [next(each, None) for each in running]
    return epochs[0]


def carry_out(
    session: Session, units: Sequence[tuple[str, int]], archive: Archive, since: float
) -> float:
    """Trains some units at once and adds their files; returns the seconds that it took."""
    started = time.perf_counter()
    trainings = [session.training(name, seed) for name, seed in units]
    running = [training.steps() for training in trainings]
    told = 0
    while (epoch := _advance(running)) is not None:
        if epoch >= told + 25:
            told = epoch
            line = f"{time.time() - since:6.1f} s  epoch {epoch}"
            print(line, flush=True)
    if session.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    for training in trainings:
        try:
            archive.add(describe_unit(session.data, training, seconds, len(units)))
        except ArithmeticError as error:
            print(f"{time.time() - since:6.1f} s  {error}", flush=True)
    names = ", ".join(f"{name} {seed}" for name, seed in units)
    print(f"{time.time() - since:6.1f} s  {names}: {seconds:.1f} s", flush=True)
    return seconds


def train_units(
    data: Data,
    archive: Archive,
    seeds: Sequence[int],
    device: torch.device,
    minutes: float,
    together: Sequence[int] = TOGETHER,
) -> bool:
    """Trains what is missing while time is left; returns whether everything is there."""
    since = time.time()
    waiting = missing_units(data, archive, seeds)
    if not waiting:
        return True
    test = data.images["test"]["labels"]
    told: dict[str, Any] = {"settings": data.settings}
    archive.add(
        {"facts.json": json.dumps(told).encode(), "labels.safetensors": save({"test": test})}
    )
    session, speeds = Session.on(data, device, graph=False), {1: float("inf")}
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        equal, found = check_graph(session)
        session = replace(session, graph=equal)
        speeds = measure_speeds(session, together) or speeds
        setup = {"graph": found, "steps_per_second": speeds, "device": describe_device(device)}
        setup |= {"torch": torch.__version__}
        archive.add({"setup.json": json.dumps(setup).encode()})
        print(f"{time.time() - since:6.1f} s  {setup}", flush=True)
    steps = data.settings["train"]["epochs"] * data.settings["train"]["steps_per_epoch"]
    while waiting:
        left = 60 * minutes - (time.time() - since) - RESERVE
        count = choose_count(speeds, steps, left)
        if not count:
            break
        taken, waiting = waiting[:count], waiting[count:]
        carry_out(session, taken, archive, since)
    print(f"{time.time() - since:6.1f} s  {len(waiting)} trainings are missing", flush=True)
    return not waiting


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=8, help="start no training that ends later"
    )
    parser.add_argument("--data", type=Path, default=Path("build/gpu/data"))
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--seeds", type=int, nargs="+", help="default: those of the settings")
    parser.add_argument(
        "--together", type=int, nargs="+", default=TOGETHER, help="numbers at once to try"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny data on the CPU")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        raise SystemExit("this machine has no NVIDIA GPU; --smoke runs tiny data on the CPU.")
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            write_data(smoke_data(), Path(folder))
            data = read_data(Path(folder))
    else:
        data = read_data(arguments.data)
    device = torch.device("cpu" if arguments.smoke else "cuda")
    archive = Archive(arguments.out / ARCHIVE)
    seeds = arguments.seeds or data.settings["seeds"]
    train_units(data, archive, seeds, device, arguments.minutes, arguments.together)


if __name__ == "__main__":
    main()
