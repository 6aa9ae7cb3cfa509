"""The cost of the curriculum in training: ratios of times in one process, and a counter.

    python benchmarks/training.py --json benchmarks/results/training.json
    python benchmarks/training.py --quick          # seconds; its times mean nothing

Every arm trains the same network with the same updates. Only the origin of a batch differs. The
arms take turns, an epoch each, after one warm-up. A ratio is that of the medians. `--clock
processor` measures the processor time of this process instead of the wall's, for a busy machine.
Then everything but the arm with workers runs in this process. The images are the shipped ones, as
JPEG files of 32 and of 256 pixels.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from discl.curriculum.progress import measure_progress
from discl.curriculum.sampling import Pool
from discl.curriculum.schedule import EpochSchedule, hold_out_guidance, make_sampling
from discl.curriculum.strategies import make_strategy
from discl.data import read_tables
from discl.evaluation.metrics import true_class_probability
from discl.models.classifier import ClassifierConfig, build_classifier
from discl.recipe import Train
from discl.stages.classifiers import describe_classifier, starter_of
from discl.training import image_cache as pixels_module
from discl.training.image_cache import EpochLoader, ImageCache, aspects_of
from discl.training.inference import choose_precision, predict_logits
from discl.training.objectives import FLYP, make_objective
from discl.training.optim import make_optimizer
from discl.training.step import EpochPart, StepConfig, TrainState
from figures import Figure, as_rows, table
from turns import typical_seconds

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVELS = (50, 70, 90)
PARTS = ("workers", "small", "progress", "large", "attention")
SETS = {  # real images, hard ones, images of the spectrum; V is 2,000 hard ones or a fifth
    "CIFAR100-LT": (10_847, 325, 2_925),
    "iWildCam": (129_809, 8_260, 198_240),
}


@dataclass(frozen=True)
class Setting:
    """A network, the pictures that it learns from and how."""

    architecture: str
    image_size: int
    stored_size: int
    batch: int
    augment: tuple[str, ...]
    steps: int

    @property
    def config(self) -> ClassifierConfig:
        stem = "7x7" if self.image_size > 64 else "3x3"
        width = 16 if self.architecture.endswith("-cifar") else 64
        names = tuple(str(label) for label in range(10))
        return ClassifierConfig(
            self.architecture, stem, width, names, self.image_size, self.stored_size, MEAN, STD
        )


SMALL = Setting("resnet32-cifar", 32, 32, 128, ("random-crop", "flip"), 4)
LARGE = Setting("resnet10", 224, 256, 8, ("random-resized-crop", "flip"), 2)


# ---------------------------------------------------------------- what is trained on


def jpegs(size: int, count: int) -> tuple[list[bytes], np.ndarray]:
    """(JPEG files, labels) of shipped pictures."""
    table = read_tables("embedded:fashion-mnist/data")["validation"]
    files = []
    for row in range(count):
        out = io.BytesIO()
        table.image(row % len(table)).resize((size, size), Image.Resampling.BICUBIC).save(
            out, "JPEG", quality=90
        )
        files.append(out.getvalue())
    return files, np.resize(table.labels, count)


def make_pool(real: int, hard: int, synthetic: int) -> Pool:
    """Ten classes; `hard` of the real images are hard.

    Each level of each class has the same number of synthetic images.
    """
    rows = np.arange(real + synthetic)
    whole = max(10, hard // 10 * 10)
    source = rows // 10 // len(LEVELS) * 10 % whole + rows % 10  # one image a level of each
    return Pool(
        labels=rows % 10,
        levels=np.where(rows < real, 100, np.asarray(LEVELS)[rows // 10 % len(LEVELS)]),
        synthetic=np.repeat([False, True], [real, synthetic]),
        hard=rows < hard,
        class_names=[str(label) for label in range(10)],
        sources=np.where(rows < real, rows, source),
    )


def imagenet_lt() -> Pool:
    """A pool of ImageNet-LT's size: 115,846 real images of 1,000 classes.

    136 classes have 1,530 hard images, with 24 synthetic images each.
    """
    real, hard, tail = 115_846, 1_530, 136
    rows, extra = np.arange(real), np.arange(24 * hard)
    return Pool(
        labels=np.concatenate(
            [np.where(rows < hard, rows % tail, tail + rows % (1000 - tail)), extra % tail]
        ),
        levels=np.concatenate(
            [np.full(real, 100), np.asarray(LEVELS)[extra // tail % len(LEVELS)]]
        ),
        synthetic=np.repeat([False, True], [real, len(extra)]),
        hard=np.arange(real + len(extra)) < hard,
        class_names=[str(label) for label in range(1000)],
    )


def make_schedule(
    pool: Pool, strategy: str, samples: int, undersample: bool = False
) -> EpochSchedule:
    levels = list(LEVELS)
    followed = make_strategy(strategy, levels=levels, curriculum_epochs=1000)
    return EpochSchedule(
        pool,
        followed,
        make_sampling(
            pool,
            strategy,
            undersample=undersample,
            synthetic_scale=3.0,
            shortage="repeat",
            missing="error",
        ),
        samples=samples,
        seed=0,
    )


def make_learner(setting: Setting, precision: torch.dtype, counts: np.ndarray) -> TrainState:
    torch.manual_seed(0)
    model: Any = build_classifier(setting.config)
    optimizer = partial(
        make_optimizer, name="sgd", lr=0.01, weight_decay=2e-4, momentum=0.9, nesterov=False
    )
    return TrainState(
        model.to(memory_format=torch.channels_last),
        optimizer,
        objective=make_objective("cross-entropy"),
        class_counts=counts,
        config=setting.config,
        steps=StepConfig(),
        augment=setting.augment,
        precision=precision,
        device="cpu",
    )


class Fixed:
    """The same batch again and again, from memory: what training costs that waits for nothing."""

    def __init__(self, pixels: ImageCache, batch: int) -> None:
        self.rows, self.pixels = np.arange(batch), pixels.__getitems__(list(range(batch)))
        self.aspects_of = partial(aspects_of, pixels)

    def of(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        for _ in range(len(rows) // len(self.rows)):
            yield self.rows, self.pixels


def train_epoch(
    learner: TrainState, batches: Any, rows: np.ndarray, labels: np.ndarray, setting: Setting
) -> None:
    part = EpochPart(rows, 0, epochs=1, batch_size=setting.batch, seed=0)
    learner.train_epoch(batches, part, labels, lambda progress: 0.01, Path("none"))


class PlainFolder(Dataset):
    """The files of a folder as a plain loop reads them: one by one, augmented by PIL."""

    def __init__(self, files: Sequence[Path], labels: np.ndarray, setting: Setting) -> None:
        self.files, self.labels, self.setting = files, labels, setting
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        with Image.open(self.files[row]) as stored:
            image = stored.convert("RGB")
        size = self.setting.image_size
        if "random-resized-crop" in self.setting.augment:
            side = round(image.width * float(torch.empty(()).uniform_(0.08, 1)) ** 0.5)
            left, top = (int(torch.randint(image.width - side + 1, ())) for _ in range(2))
            image = image.resize(
                (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side)
            )
        else:
            border = size // 8
            left, top = (int(torch.randint(2 * border + 1, ())) for _ in range(2))
            image = ImageOps.expand(image, border).crop((left, top, left + size, top + size))
        if torch.rand(()) < 0.5:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.asarray(image, np.uint8).copy()).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std, int(self.labels[row])


def plain_loop(
    folder: Path, files: Sequence[bytes], labels: np.ndarray, setting: Setting
) -> Callable[[], None]:
    """An epoch of a plain loop: DataLoader, forward, backward, step, in float32."""
    paths = [folder / f"{row:05d}.jpg" for row in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    torch.manual_seed(0)
    model = build_classifier(setting.config).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=2e-4)
    loader = DataLoader(
        PlainFolder(paths, labels, setting), setting.batch, shuffle=True, drop_last=True
    )

    def epoch() -> None:
        done = 0
        while done < setting.steps:
            for images, truth in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images), truth).backward()
                optimizer.step()
                done += 1
                if done == setting.steps:
                    break

    return epoch


# ---------------------------------------------------------------- the measurements


def feeding(
    setting: Setting,
    images: int,
    repetitions: int,
    clock: str,
    decoded: bool,
    title: str,
) -> list[Figure]:
    """Curriculum training against the same loop on a fixed batch, and a plain loop on files."""
    files, labels = jpegs(setting.stored_size, images)
    pool = make_pool(images * 3 // 4, images // 16, images // 4)
    limit, pixels_module.MEMORY_LIMIT = (
        pixels_module.MEMORY_LIMIT,
        pixels_module.MEMORY_LIMIT if decoded else 0,
    )
    pixels = ImageCache(
        [[{"image": {"bytes": data, "path": None}} for data in files]], setting.stored_size
    )
    pixels_module.MEMORY_LIMIT = limit
    course = make_schedule(pool, "diverse-to-specific", setting.steps * setting.batch)
    epochs = iter(range(1000))
    precisions = {"float32": torch.float32, "auto": choose_precision("auto", "cpu")}
    arms: dict[str, Callable[[], None]] = {}
    for name, precision in precisions.items():
        learner = make_learner(setting, precision, pool.real_counts)
        batches, fixed = learner.loader(pixels, setting.batch, 0), Fixed(pixels, setting.batch)
        rows = np.arange(setting.steps * setting.batch) % setting.batch

        def ours(learner: TrainState = learner, batches: EpochLoader = batches) -> None:
            drawn, _ = course.draw(next(epochs), 0, [])
            train_epoch(learner, batches, drawn, pool.labels, setting)

        def same_batch(
            learner: TrainState = learner, fixed: Fixed = fixed, rows: np.ndarray = rows
        ) -> None:
            train_epoch(learner, fixed, rows, pool.labels, setting)

        arms |= {f"fixed {name}": same_batch, f"curriculum {name}": ours}
    with tempfile.TemporaryDirectory() as folder:
        arms["plain"] = plain_loop(Path(folder), files, labels, setting)
        seconds = typical_seconds(arms, repetitions, clock)
    rate = {name: setting.steps * setting.batch / value for name, value in seconds.items()}
    automatic = str(precisions["auto"]).removeprefix("torch.")
    speeds = (
        ", ".join(f"{name.replace('auto', automatic)} {value:.0f}" for name, value in rate.items())
        + " images/s"
    )
    return [
        Figure(
            f"{title}: curriculum ÷ fixed batch in memory, {automatic}",
            rate["curriculum auto"] / rate["fixed auto"],
            ">=" if decoded else "",
            0.95 if decoded else None,
            speeds,
        ),
        Figure(
            f"{title}: curriculum ÷ fixed batch in memory, float32",
            rate["curriculum float32"] / rate["fixed float32"],
            ">=" if decoded else "",
            0.95 if decoded else None,
        ),
        Figure(
            f"{title}: curriculum ÷ plain loop of PIL on files, both float32",
            rate["curriculum float32"] / rate["plain"],
        ),
        Figure(
            f"{title}: curriculum as it comes ({automatic}) ÷ that plain loop",
            rate["curriculum auto"] / rate["plain"],
        ),
    ]


def probing(setting: Setting, images: int, repetitions: int, clock: str) -> list[Figure]:
    """Time of measuring on V before and after a probe, as a fraction of its epoch.

    Also the time to draw the rows of an epoch, as a fraction of a step.
    """
    files, labels = jpegs(setting.stored_size, images)
    pixels = ImageCache(
        [[{"image": {"bytes": data, "path": None}} for data in files]], setting.stored_size
    )
    precision = choose_precision("auto", "cpu")
    learner = make_learner(setting, precision, np.ones(10))
    batches, config = learner.loader(pixels, setting.batch, 0), setting.config
    rows = np.arange(setting.steps * setting.batch) % images
    judged = np.arange(min(setting.steps * setting.batch, images))
    seconds = typical_seconds(
        {
            "epoch": lambda: train_epoch(
                learner, batches, rows, np.resize(labels, images), setting
            ),
            "judge": lambda: none(
                true_class_probability(
                    predict_logits(learner.model, pixels, judged, config, precision), labels[judged]
                )
            ),
        },
        repetitions,
        clock,
    )
    step, per_image = seconds["epoch"] / setting.steps, seconds["judge"] / len(judged)
    figures = []
    levels = list(LEVELS)
    for name, (real, hard, synthetic) in SETS.items():
        _, guidance = hold_out_guidance(make_pool(real, hard, synthetic), levels, None, 0)
        before, after = np.random.default_rng(0).random((2, len(guidance)))
        gain = partial(measure_progress, guidance, before, after)
        counted = typical_seconds({"gain": lambda gain=gain: none(gain())}, 3, clock)["gain"]
        measured, trained = 2 * len(guidance) * per_image + counted, real / setting.batch * step
        figures.append(
            Figure(
                f"progress of {name}: measuring ÷ training time",
                measured / (measured + trained),
                "<=",
                0.05,
                f"|V| {len(guidance)}, {real:,} images an epoch; {1 / per_image:.0f} images/s "
                f"evaluated, {setting.batch / step:.0f} trained",
            )
        )
    pool = imagenet_lt()
    for strategy in ("diverse-to-specific", "all-levels"):
        steps = int((~pool.synthetic).sum()) // setting.batch
        course = make_schedule(pool, strategy, steps * setting.batch, undersample=True)
        draws = (course.draw(epoch, 0, []) for epoch in range(100))
        drawn = typical_seconds({"draw": partial(next, draws)}, 3, clock)["draw"]
        told = f"{1000 * drawn:.0f} ms for {steps} steps of {1000 * step:.0f} ms"
        figures.append(
            Figure(
                f"index draw of ImageNet-LT ÷ step, {strategy}",
                drawn / steps / step,
                "<=",
                0.01,
                told,
            )
        )
    return figures


def attention(repetitions: int, clock: str, batch: int = 128) -> list[Figure]:
    """A step of FLYP in bfloat16 with the attention used on CPUs, against torch's fused one."""
    folder = Path(__file__).parent / "checkpoints" / "cifar" / "clip"
    train = Train.model_validate(
        {"image_size": 32, "model": {"architecture": "clip", "checkpoint": str(folder)}}
    )
    config = describe_classifier(train, tuple(f"class {label}" for label in range(10)), None, FLYP)
    setting = Setting("clip", 32, 32, batch, ("random-crop", "flip"), 2)
    pixels = Noise(batch)
    arms: dict[str, Callable[[], None]] = {}
    for name in ("sdpa", "eager"):
        optimizer = partial(
            make_optimizer, name="adamw", lr=1e-5, weight_decay=0.1, momentum=0.9, nesterov=False
        )
        learner = TrainState(
            starter_of(config, train)(),
            optimizer,
            objective=make_objective(FLYP),
            class_counts=np.ones(10),
            config=config,
            steps=StepConfig(),
            augment=setting.augment,
            precision=torch.bfloat16,
            device="cpu",
        )
        if name == "sdpa":
            learner.model.clip.set_attn_implementation(name)  # type: ignore[union-attr, operator]
        rows, labels = np.arange(setting.steps * batch) % batch, np.arange(batch) % 10

        def epoch(
            learner: TrainState = learner, rows: np.ndarray = rows, labels: np.ndarray = labels
        ) -> None:
            train_epoch(learner, Fixed(pixels, batch), rows, labels, setting)  # type: ignore[arg-type]

        arms[name] = epoch
    seconds = typical_seconds(arms, repetitions, clock)
    told = ", ".join(
        f"{name} {value / setting.steps:.3f} s a step" for name, value in seconds.items()
    )
    return [
        Figure(
            "FLYP in bfloat16 on a CPU: plain attention ÷ fused attention, images/s",
            seconds["sdpa"] / seconds["eager"],
            "",
            None,
            told,
        )
    ]


class Noise:
    """ImageCache drawn at random."""

    def __init__(self, count: int) -> None:
        self.memory = torch.randint(
            0,
            256,
            (count, 3, 32, 32),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(0),
        )

    def __getitems__(self, rows: Sequence[int]) -> Tensor:
        return self.memory[torch.as_tensor(rows)]


def none(result: Any) -> None:
    """Takes a result that is not needed."""


class Marking(list):
    """Rows that leave a file named after the process that asks for one."""

    folder: Path

    def __getitem__(self, row: Any) -> Any:
        (self.folder / str(os.getpid())).touch()
        return super().__getitem__(row)


def workers_restarted(workers: int = 2, epochs: int = 4) -> Figure:
    """Number of decoding processes started after the first epoch, over epochs of other levels."""
    files, _ = jpegs(32, 256)
    limit, pixels_module.MEMORY_LIMIT = pixels_module.MEMORY_LIMIT, 0
    table = Marking({"image": {"bytes": data, "path": None}} for data in files)
    pixels = ImageCache([table], 32)
    pixels_module.MEMORY_LIMIT = limit
    pool = make_pool(160, 32, 96)
    course = make_schedule(pool, "diverse-to-specific", 128)
    strategy = replace(course.strategy, curriculum_epochs=epochs - 1)  # type: ignore[type-var]
    course, seen = replace(course, strategy=strategy), set()
    with tempfile.TemporaryDirectory() as folder:
        table.folder = Path(folder)
        batches = EpochLoader(pixels, 16, workers)
        for epoch in range(epochs):
            rows, chosen = course.draw(epoch, 0, [])
            seen.add(tuple(chosen["levels"]))
            for _ in batches.of(rows):
                pass
        processes = len(list(table.folder.iterdir()))
    drawn = ", ".join(" ".join(map(str, levels)) or "real only" for levels in sorted(seen))
    detail = f"{workers} workers, levels {drawn}"
    return Figure("workers restarted by a switch of level", processes - workers, "==", 0, detail)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument(
        "--quick", action="store_true", help="one short repetition, small pictures only"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    small = replace(SMALL, steps=2, batch=32) if arguments.quick else SMALL
    repetitions, images = (1, 256) if arguments.quick else (arguments.repetitions, 1024)
    figures: list[Figure] = []
    if "workers" in arguments.parts:
        figures.append(workers_restarted())
    if "small" in arguments.parts:
        figures += feeding(small, images, repetitions, arguments.clock, True, "32 px, decoded once")
    if "progress" in arguments.parts:
        figures += probing(small, images, repetitions, arguments.clock)
    if "large" in arguments.parts and not arguments.quick:
        figures += feeding(
            LARGE,
            64,
            repetitions,
            arguments.clock,
            False,
            "224 px, decoded at each visit, no worker",
        )
    if "attention" in arguments.parts:
        figures += attention(repetitions, arguments.clock)
    print(table(figures))
    settings = {
        "small": asdict(small),
        "large": asdict(LARGE),
        "repetitions": repetitions,
        "threads": arguments.threads,
        "clock": arguments.clock,
        "torch": torch.__version__,
        "quick": arguments.quick,
    }
    if arguments.json:
        rows = as_rows(figures)
        arguments.json.write_text(
            json.dumps({"settings": settings, "figures": rows}, indent=1, ensure_ascii=False) + "\n"
        )


if __name__ == "__main__":
    main()
