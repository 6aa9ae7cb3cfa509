"""What synthetic images are worth, over the gap between the generator and the task.

    python -m benchmarks.gap --work build/gap                                  # everything
    python -m benchmarks.gap --work build/gap --settings plain vague --draws 0 1 2
    python -m benchmarks.gap --table                                           # from the figures

A setting is a data set and what the generator knows of it. `plain`, `half` and `vague` are
Fashion-MNIST-LT with prompts that are right with probability 1, .6 and .2; where a prompt is wrong
it describes another upper garment. In `dim` the real images are narrower, darker and moved, and
the generator does not know that style. `style-25`, `style-50` and `style-100` are CIFAR-10-LT with
a generator that knows drawings (`checkpoints/make_style.py`): the task is the photos. In
`vague-adapted` and its like the generator is tuned on the real training images (`discl adapt`): by
low-rank weights, in `half-tokens` by class tokens alone, in `half-both` by both.

Each draw is another long-tailed sample (imbalance ratio 100, 500 images in the largest class). A
unit is one setting and draw: it makes the spectrum, trains every row with a small network, and
writes one file to `results/gap`. A unit whose file exists is not run again; call it again after a
kill. Levels and temperatures are chosen on validation images. What is expected was written down
before the first unit was run: `results/gap/expected.yaml`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gap"
LEVELS = (0, 30, 50, 70, 90)
SEEDS = 8
FEW, MANY = 20, 100
"""A class with fewer images is few, one with more than `MANY` is many."""
BATCH, RATE = 64, 0.003
REFEREE_STEPS = 3000
SCALE = 3.0
TEMPERATURES = (0.5, 1.0, 1.5)
CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Sneaker",
    "Bag",
    "Sandal",
    "Ankle boot",
    "Dress",
    "Pullover",
    "Coat",
    "Shirt",
)
UPPER = ("T-shirt/top", "Pullover", "Dress", "Coat", "Shirt")
ANIMALS_LAST = (
    "airplane",
    "automobile",
    "ship",
    "truck",
    "frog",
    "horse",
    "bird",
    "deer",
    "cat",
    "dog",
)


@dataclass(frozen=True)
class Setting:
    """A data set, and what the generator knows of it.

    - `domain`: the real images, `fashion`, `dim` or `photos`.
    - `right`: fraction of the prompts of a class that describe it.
    - `style`: strength of the drawings that the prompts name, in per cent; `photos` only.
    - `threshold`: `clip_similarity` from which the filter keeps an image.
    - `adapted`: how the generator is tuned on the real training images first, of `ADAPTATIONS`.
    """

    domain: str
    right: float = 1.0
    style: int = 0
    threshold: float = 0.6
    adapted: str = ""


SETTINGS = {
    "plain": Setting("fashion"),
    "half": Setting("fashion", right=0.6),
    "vague": Setting("fashion", right=0.2),
    "dim": Setting("dim"),
    "style-25": Setting("photos", style=25, threshold=0.42),
    "style-50": Setting("photos", style=50, threshold=0.42),
    "style-100": Setting("photos", style=100, threshold=0.42),
}
SETTINGS |= {
    f"{name}-adapted": replace(setting, adapted="adapted")
    for name, setting in SETTINGS.items()
    if name != "plain"
} | {
    f"{name}-{how}": replace(SETTINGS[name], adapted=how)
    for name in ("half", "vague")
    for how in ("tokens", "both")
}
ADAPT = yaml.safe_load((HERE / "adapt.yaml").read_text())
"""How the generator is tuned."""
ADAPTATIONS: dict[str, dict[str, Any]] = {
    "adapted": {},
    "tokens": {"rank": 0, "class_tokens": 2},
    "both": {"class_tokens": 2},
}
"""What differs from `ADAPT`. The tokens are at the default rate, which was not searched."""


@dataclass(frozen=True)
class Training:
    """How every row of a table is trained.

    - `network`: `small`, three convolutions, or `resnet10`, that of the recipe `fashion-lt`.
    - `epochs`, `curriculum_epochs`: of `samples` images each.
    - `rows`: the rows of the table; none: all. `best-fixed` stands for the fixed level that is best
      on validation with the small network.
    """

    network: str = "small"
    epochs: int = 24
    curriculum_epochs: int = 20
    samples: int = 1280
    rows: tuple[str, ...] = ()


TRAININGS = {
    "small": Training(),
    "resnet10": Training(
        "resnet10",
        epochs=36,
        curriculum_epochs=32,
        samples=1216,
        rows=(
            "ce",
            "ce-undersampled",
            "oversampled",
            "ce-balanced",
            "oracle",
            "text-only",
            "all",
            "d2s",
            "best-fixed",
        ),
    ),
}


@dataclass(frozen=True)
class Row:
    """One training: a strategy and a mixture.

    - `mixture`: `all` real images, the head `undersampled`, or classes drawn `balanced`.
    - `filtered`: only synthetic images that pass the filter.
    - `oracle`: real extra images take the place of synthetic ones.
    """

    strategy: str = "real-only"
    mixture: str = "all"
    level: int | None = None
    filtered: bool = False
    oracle: bool = False


REAL_ROWS = {
    "ce": Row(),
    "ce-undersampled": Row(mixture="undersampled"),
    "oversampled": Row("fixed", "undersampled", level=100),
    "ce-balanced": Row(mixture="balanced"),
    "oracle": Row("fixed", "undersampled", level=100, oracle=True),
    "oracle-balanced": Row("fixed", "balanced", level=100, oracle=True),
}
STRATEGIES = {
    "text-only": "text-only",
    "all": "all-levels",
    "d2s": "diverse-to-specific",
    "s2d": "specific-to-diverse",
}


def synthetic_rows() -> dict[str, Row]:
    """Rows that take synthetic images; the three of the claim also with the filter."""
    rows = {name: Row(strategy, "undersampled") for name, strategy in STRATEGIES.items()}
    rows |= {
        f"fixed-{level}": Row("fixed", "undersampled", level=level) for level in LEVELS if level
    }
    for name in ("text-only", "all", "d2s"):
        rows[f"{name}-balanced"] = Row(STRATEGIES[name], "balanced")
        for mixture, end in (("undersampled", ""), ("balanced", "-balanced")):
            rows[f"{name}{end}-filtered"] = Row(STRATEGIES[name], mixture, filtered=True)
    return rows


# ------------------------------------------------------------------------------- data and prompts


def prepare_domain(domain: str, work: Path, cifar10: Path | None) -> str:
    """Folder of the real images of a domain, made once in the work folder if it does not ship."""
    if domain == "fashion":
        return "embedded:fashion-mnist/data"
    folder = work / "data" / domain
    if not folder.exists():
        import datasets

        unfinished = folder.with_name(folder.name + ".new")
        unfinished.mkdir(parents=True, exist_ok=True)
        rows = _dimmed() if domain == "dim" else _photos(cifar10)
        for split, (ids, images, labels, names) in rows.items():
            features = datasets.Features(
                {
                    "id": datasets.Value("string"),
                    "image": datasets.Image(),
                    "label": datasets.ClassLabel(names=list(names)),
                }
            )
            encoded = [{"bytes": _encode(image), "path": None} for image in images]
            table = datasets.Dataset.from_dict(
                {"id": ids, "image": encoded, "label": labels}, features=features
            )
            table.to_parquet(unfinished / f"{split}.parquet")
        unfinished.replace(folder)
    return str(folder)


def _encode(image: Any) -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "WEBP", lossless=True, method=0)
    return buffer.getvalue()


def _dimmed() -> dict[str, tuple[list[str], list[Any], list[int], Sequence[str]]]:
    """The shipped Fashion-MNIST at 70 % of its width, 60 % of its brightness, moved aside."""
    import numpy as np
    from PIL import Image

    from discl import read_tables

    result = {}
    for split, table in read_tables("embedded:fashion-mnist/data").items():
        images = []
        for row in range(len(table)):
            narrow = table.image(row).convert("L").resize((22, 32), Image.Resampling.BILINEAR)
            canvas = np.zeros((32, 32), np.uint8)
            canvas[:, 8:30] = (np.asarray(narrow, np.float32) * 0.6).round()
            images.append(canvas)
        result[split] = (list(table.ids), images, table.labels.tolist(), table.class_names)
    return result


def _photos(
    cifar10: Path | None,
) -> dict[str, tuple[list[str], list[Any], list[int], Sequence[str]]]:
    """CIFAR-10 without what the generator saw: 500 training and 100 validation images a class."""
    import numpy as np

    from discl import read_tables
    from discl.data.readers.camera_traps import is_pretraining

    if cifar10 is None:
        raise SystemExit(
            "the style settings need --cifar10 DIR, with train.parquet and test.parquet"
        )
    tables = read_tables(str(cifar10))
    chosen: dict[str, list[int]] = {"train": [], "validation": []}
    table = tables["train"]
    room = {label: {"train": 500, "validation": 100} for label in range(10)}
    labels, ids = table.labels, table.ids
    for row in np.random.default_rng(2410).permutation(len(table)).tolist():
        free = room[int(labels[row])]
        split = next((name for name, left in free.items() if left), None)
        if split and not is_pretraining(ids[row]):
            free[split] -= 1
            chosen[split].append(row)
    parts = {split: (table, sorted(rows)) for split, rows in chosen.items()}
    parts["test"] = (tables["test"], list(range(len(tables["test"]))))
    return {
        split: (
            [part.ids[row] for row in rows],
            [np.asarray(part.image(row).convert("RGB")) for row in rows],
            [int(part.labels[row]) for row in rows],
            part.class_names,
        )
        for split, (part, rows) in parts.items()
    }


def write_phrases(setting: Setting, work: Path) -> str:
    """Ten prompts per class. The first `right` of ten describe it, the others another garment."""
    if setting.domain != "photos":
        if setting.right == 1:
            return "embedded:fashion-mnist"
        shipped = HERE.parent / "src/discl/assets/phrases/fashion-mnist.yaml"
        texts = yaml.safe_load(shipped.read_text())
        count = round(10 * setting.right)
        prompts = {}
        for label, name in enumerate(CLOTHES):
            others = [other for other in UPPER if other != name]
            wrong = [texts[others[(label + at) % len(others)]][at] for at in range(count, 10)]
            prompts[name] = texts[name][:count] + wrong
    else:
        words = {25: "a soft {}", 50: "an icon of a {}", 100: "a sign of a {}"}
        prompts = {name: [words[setting.style].format(name)] for name in ANIMALS_LAST}
    file = work / "phrases" / f"{setting.domain}-{setting.right:g}-{setting.style}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(prompts))
    return str(file)


def recipe_of(setting: Setting, draw: int, work: Path, cifar10: Path | None) -> dict[str, Any]:
    """Overrides of the recipe `fashion-lt` for one setting and draw."""
    overrides: dict[str, Any] = {
        "data.root": prepare_domain(setting.domain, work, cifar10),
        "data.long_tail.seed": draw,
        "prompts.phrases": write_phrases(setting, work),
        "spectrum.levels": list(LEVELS),
        "spectrum.seeds": SEEDS,
        "spectrum.num_inference_steps": 10,
        "filter.threshold": -1,
        "runtime.threads": 1,
        "runtime.device": "cpu",
    }
    if setting.adapted:
        overrides["spectrum.adapt"] = {**ADAPT, **ADAPTATIONS[setting.adapted], "seed": draw}
    if setting.domain == "photos":
        overrides |= {
            "data.long_tail.class_order": list(ANIMALS_LAST),
            "spectrum.checkpoint": str(HERE / "checkpoints" / "style"),
            "filter.checkpoint": str(HERE / "checkpoints" / "cifar" / "clip"),
        }
    return overrides


# --------------------------------------------------------------------------------------- samples


@dataclass
class Samples:
    """All samples of one setting and draw.

    - `pool`: the pool of the package, real rows first.
    - `pixels`: uint8 `[rows, 3, 32, 32]`.
    - `passed`: bool `[rows]`, false where the filter would drop an image.
    - `held_out`: `{split: (pixels, labels)}` of validation and test.
    """

    pool: Any
    pixels: Any
    passed: Any
    held_out: dict[str, tuple[Any, Any]]


def load_samples(name: str, draw: int, work: Path, cifar10: Path | None) -> Samples:
    """Makes the spectrum of a setting and draw where it is missing, and reads all images."""
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from discl import SpectrumDataset, load_recipe, open_run, run_until

    setting = SETTINGS[name]
    recipe = load_recipe("fashion-lt", recipe_of(setting, draw, work, cifar10))
    run = open_run(recipe, work / "runs" / f"{name}-{draw}", amend=True)
    run_until(run, "filter")
    train = SpectrumDataset.of_run(run.folder, size=32)
    real = int((~train.pool.synthetic).sum())
    verdicts = pq.read_table(run.path("filter.parquet"))
    score = dict(
        zip(verdicts["id"].to_pylist(), verdicts["clip_similarity"].to_pylist(), strict=True)
    )
    passed = np.ones(len(train), bool)
    passed[real:] = [score[name] >= setting.threshold for name in train.synthetic["id"]]
    held_out = {}
    for split in ("validation", "test"):
        part = SpectrumDataset.of_run(run.folder, size=32, split=split)
        held_out[split] = (_pixels(part), torch.from_numpy(part.pool.labels))
    return Samples(train.pool, _pixels(train), passed, held_out)


def _pixels(dataset: Any) -> Any:
    """uint8 `[rows, 3, 32, 32]` of every image of a data set."""
    import torch

    out = torch.empty(len(dataset), 3, 32, 32, dtype=torch.uint8)
    for row in range(len(dataset)):
        out[row] = (dataset[row].image * 255).round().byte()
    return out


def add_oracle(samples: Samples, setting: Setting, draw: int, work: Path) -> Samples:
    """The real images alone, and `SCALE` real extra images for each hard one at level 100."""
    import numpy as np
    import torch

    from discl import read_tables
    from discl.curriculum.sampling import Pool
    from discl.data import to_square

    pool, real = samples.pool, np.flatnonzero(~samples.pool.synthetic)
    table = read_tables(prepare_domain(setting.domain, work, None))["train"]
    order = {name: label for label, name in enumerate(pool.class_names)}
    labels = np.array([order[str(table.class_names[label])] for label in table.labels.tolist()])
    pixels = (
        torch.stack(
            [torch.from_numpy(to_square(table.image(row), 32)) for row in range(len(table))]
        )
        .permute(0, 3, 1, 2)
        .contiguous()
    )
    taken = {samples.pixels[row].numpy().tobytes() for row in real.tolist()}
    counts = np.bincount(pool.labels[real], minlength=pool.num_classes)
    rng = np.random.default_rng(draw)
    extra: list[int] = []
    for label in np.unique(pool.labels[pool.hard]).tolist():
        rows = rng.permutation(np.flatnonzero(labels == label)).tolist()
        free = [row for row in rows if pixels[row].numpy().tobytes() not in taken]
        extra += free[: round(SCALE * counts[label])]
    added = np.zeros(len(extra), bool)
    return Samples(
        Pool(
            np.concatenate([pool.labels[real], labels[extra]]),
            np.full(len(real) + len(extra), 100),
            np.concatenate([np.zeros(len(real), bool), ~added]),
            np.concatenate([pool.hard[real], added]),
            pool.class_names,
        ),
        torch.cat([samples.pixels[real], pixels[extra]]),
        np.ones(len(real) + len(extra), bool),
        samples.held_out,
    )


# -------------------------------------------------------------------------------------- training


def make_resnet10(classes: int) -> Any:
    """The network of the recipe `fashion-lt`."""
    from discl.models.classifier import ClassifierConfig, build_classifier

    config = ClassifierConfig(
        architecture="resnet10",
        stem="3x3",
        width=16,
        class_names=tuple(str(number) for number in range(classes)),
        image_size=32,
        resize=32,
        mean=(0.5, 0.5, 0.5),
        std=(1.0, 1.0, 1.0),
    )
    return build_classifier(config)


def epochs_of(row: Row, samples: Samples, draw: int, training: Training) -> Iterator[Any]:
    """Row numbers `[samples]` of each epoch, by the package's strategies and mixtures."""
    import numpy as np

    from discl import draw_epoch, make_strategy
    from discl.curriculum.schedule import make_sampling

    pool = samples.pool
    if row.filtered:
        pool = replace(pool, held_out=pool.held_out | ~samples.passed)
    strategy = make_strategy(
        row.strategy,
        levels=LEVELS,
        seed=draw,
        curriculum_epochs=training.epochs if row.oracle else training.curriculum_epochs,
        level=row.level,
    )
    sampling = make_sampling(
        pool,
        strategy,
        undersample=row.mixture == "undersampled",
        synthetic_scale=SCALE,
        shortage="repeat",
        missing="nearest",
        class_power=0.0 if row.mixture == "balanced" else 1.0,
    )
    for epoch in range(training.epochs):
        chosen = strategy.levels(epoch, ())
        seed = int(np.random.SeedSequence([17, draw, epoch]).generate_state(1)[0])
        yield draw_epoch(pool, chosen, sampling, training.samples, seed=seed)[0]


def train_row(
    row: Row, samples: Samples, draw: int, training: Training
) -> dict[str, dict[str, float]]:
    """`{split: {metric: per cent}}` of one training, `test` and `validation`.

    Metrics without and with post-hoc logit adjustment (`+la`, arXiv 2007.07314). Its temperature is
    the best on validation, its prior the classes as they were drawn.
    """
    import numpy as np
    import torch
    from torch.nn import functional as F

    from discl.evaluation.proxy import augment, make_network

    torch.manual_seed(draw)
    make = make_network if training.network == "small" else make_resnet10
    network = make(samples.pool.num_classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.0)
    labels = torch.from_numpy(samples.pool.labels)
    drawn = np.zeros(samples.pool.num_classes)
    steps, step = training.epochs * (training.samples // BATCH), 0
    generator = torch.Generator().manual_seed(draw)
    for rows in epochs_of(row, samples, draw, training):
        drawn += np.bincount(samples.pool.labels[rows], minlength=len(drawn))
        for first in range(0, len(rows), BATCH):
            part = torch.from_numpy(rows[first : first + BATCH])
            pixels = augment(samples.pixels[part].float() / 255 - 0.5, generator)
            for group in optimizer.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = F.cross_entropy(
                network(pixels.contiguous(memory_format=torch.channels_last)), labels[part]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    network.eval()
    logits = {split: _predict(network, pixels) for split, (pixels, _) in samples.held_out.items()}
    prior = torch.from_numpy(np.log(drawn.clip(0.5) / drawn.sum())).float()
    counts = _real_counts(samples.pool)
    scores = {
        tau: _metrics(logits["validation"] - tau * prior, samples.held_out["validation"][1], counts)
        for tau in TEMPERATURES
    }
    tau = max(TEMPERATURES, key=lambda tau: scores[tau]["all"])
    return {
        split: _metrics(logits[split], target, counts)
        | {
            f"{metric}+la": value
            for metric, value in _metrics(logits[split] - tau * prior, target, counts).items()
        }
        for split, (_, target) in samples.held_out.items()
    }


def _predict(network: Any, pixels: Any) -> Any:
    import torch

    with torch.inference_mode():
        parts = [network(part.float() / 255 - 0.5) for part in pixels.split(1000)]
    return torch.cat(parts)


def _real_counts(pool: Any) -> Any:
    import numpy as np

    return np.bincount(pool.labels[~pool.synthetic], minlength=pool.num_classes)


def _metrics(logits: Any, labels: Any, counts: Any) -> dict[str, float]:
    """Accuracy over all images, and over those of many, medium and few classes, in per cent."""
    import numpy as np

    right = (logits.argmax(1) == labels).numpy()
    count = counts[labels.numpy()]
    groups = {
        "all": np.ones(len(right), bool),
        "many": count > MANY,
        "medium": (count <= MANY) & (count >= FEW),
        "few": count < FEW,
    }
    return {name: 100 * float(right[rows].mean()) for name, rows in groups.items()}


# --------------------------------------------------------------------------------- the gap itself


def train_referee(domain: str, work: Path, cifar10: Path | None) -> Any:
    """A classifier of the domain with 32 features, trained on its whole balanced pool.

    It only measures the gap; no row of the table sees it or its images.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from torch.nn import functional as F

    from discl import read_tables
    from discl.data import to_square
    from discl.evaluation.proxy import augment, make_network

    torch.manual_seed(0)  # of the first weights too
    network = make_network(10, width=32, features=32)
    file = work / "referees" / f"{domain}.safetensors"
    if file.exists():
        network.load_state_dict(load_file(file))
        return network.eval()
    table = read_tables(prepare_domain(domain, work, cifar10))["train"]
    pixels = (
        torch.stack(
            [torch.from_numpy(to_square(table.image(row), 32)) for row in range(len(table))]
        )
        .permute(0, 3, 1, 2)
        .contiguous()
    )
    order = CLOTHES if domain != "photos" else ANIMALS_LAST
    labels = torch.tensor([order.index(str(table.class_names[at])) for at in table.labels.tolist()])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-3)
    for step in range(REFEREE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / REFEREE_STEPS))
        part = torch.randint(len(labels), (BATCH,), generator=generator)
        inputs = augment(pixels[part].float() / 255 - 0.5, generator)
        loss = F.cross_entropy(network(inputs), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), file)
    return network.eval()


def measure_referees(work: Path, results: Path, cifar10: Path | None) -> None:
    """Writes how much of each domain's real tail images its referee recognises: `referees.json`.

    Fractions of different domains compare only relative to it: a referee of photos of 32 pixels is
    wrong more often than one of clothes.
    """
    import numpy as np
    import torch

    from discl import read_tables
    from discl.data import to_square

    known = {}
    for domain in sorted({setting.domain for setting in SETTINGS.values()}):
        if domain == "photos" and cifar10 is None:
            continue
        referee = train_referee(domain, work, cifar10)
        table = read_tables(prepare_domain(domain, work, cifar10))["validation"]
        tail = (CLOTHES if domain != "photos" else ANIMALS_LAST)[-3:]
        order = list(CLOTHES if domain != "photos" else ANIMALS_LAST)
        names = [str(table.class_names[label]) for label in table.labels.tolist()]
        rows = [row for row, name in enumerate(names) if name in tail]
        pixels = torch.stack([torch.from_numpy(to_square(table.image(row), 32)) for row in rows])
        with torch.inference_mode():
            found = referee(pixels.permute(0, 3, 1, 2).float() / 255 - 0.5).argmax(1).numpy()
        known[domain] = float(np.mean(found == [order.index(names[row]) for row in rows]))
    write_json(results / "referees.json", known)


def measure_gap(name: str, samples: Samples, work: Path, cifar10: Path | None) -> dict[str, Any]:
    """Per level: recognised fraction, precision, coverage and Fréchet distance.

    Features are a referee's, which is not the generator's CLIP. Reference are the validation images
    of the tail classes. Precision and coverage: five neighbours (arXiv 2002.09797).
    """
    import numpy as np
    import torch
    from benchmarks.generator import frechet_distance

    from discl.evaluation.worth import precision_and_coverage

    referee = train_referee(SETTINGS[name].domain, work, cifar10)
    order = CLOTHES if SETTINGS[name].domain != "photos" else ANIMALS_LAST
    place = torch.tensor([order.index(str(each)) for each in samples.pool.class_names])
    pixels, labels = samples.held_out["validation"]
    tail = np.unique(samples.pool.labels[samples.pool.hard])
    with torch.inference_mode():
        known = referee[0](pixels.float() / 255 - 0.5).numpy()
    figures = {}
    for level in LEVELS:
        rows = np.flatnonzero(samples.pool.synthetic & (samples.pool.levels == level))
        with torch.inference_mode():
            made = referee[0](samples.pixels[rows].float() / 255 - 0.5)
            found = referee[1](made).argmax(1)
        own = samples.pool.labels[rows]
        precise, covered, distances, weights = [], [], [], []
        for label in tail.tolist():
            real = known[labels.numpy() == label]
            synthetic = made.numpy()[own == label]
            precision, coverage = precision_and_coverage(real, synthetic)
            precise.append(precision)
            covered.append(coverage)
            distances.append(frechet_distance(real, synthetic))
            weights.append(len(synthetic))
        figures[str(level)] = {
            "recognised": float((found == place[torch.from_numpy(own)]).float().mean()),
            "precision": float(np.average(precise, weights=weights)),
            "coverage": float(np.mean(covered)),
            "frechet": float(np.mean(distances)),
            "kept": float(samples.passed[rows].mean()),
        }
    return figures


# ----------------------------------------------------------------------------------------- units


def run_unit(
    name: str, draw: int, work: Path, results: Path, cifar10: Path | None, training: Training
) -> None:
    """All rows of one setting and draw, and of its real images where no setting had them yet."""
    target = results / f"{name}-{draw}.json"
    domain = SETTINGS[name].domain
    of_real = results / f"real-{domain}-{draw}.json"
    if target.exists() and of_real.exists():
        return
    started = time.time()
    samples = load_samples(name, draw, work, cifar10)
    if not of_real.exists():
        oracle = add_oracle(samples, SETTINGS[name], draw, work)
        rows = {
            key: train_row(
                row, oracle if row.oracle else _without_synthetic(samples), draw, training
            )
            for key, row in chosen_rows(training, REAL_ROWS, name, draw).items()
        }
        write_json(of_real, {"rows": rows})
    if not target.exists():
        made = chosen_rows(training, synthetic_rows(), name, draw)
        rows = {key: train_row(row, samples, draw, training) for key, row in made.items()}
        gap = measure_gap(name, samples, work, cifar10)
        seconds = round(time.time() - started)
        write_json(target, {"gap": gap, "rows": rows, "seconds": seconds})


def chosen_rows(
    training: Training, rows: Mapping[str, Row], name: str, draw: int
) -> dict[str, Row]:
    """The rows that a table has; its best fixed level is that of the small network."""
    if not training.rows:
        return dict(rows)
    chosen = {key: row for key, row in rows.items() if key in training.rows}
    if "best-fixed" in training.rows and "fixed-50" in rows:
        unit = json.loads((RESULTS / f"{name}-{draw}.json").read_text())
        chosen[best_fixed(unit)] = rows[best_fixed(unit)]
    return chosen


def best_fixed(unit: Mapping[str, Any]) -> str:
    """The fixed level that is best on the few classes of the validation images."""
    rows = [name for name in unit["rows"] if name.startswith("fixed-")]
    return max(rows, key=lambda name: unit["rows"][name]["validation"]["few"])


def _without_synthetic(samples: Samples) -> Samples:
    import numpy as np

    from discl.curriculum.sampling import Pool

    real, pool = np.flatnonzero(~samples.pool.synthetic), samples.pool
    kept = Pool(
        pool.labels[real],
        pool.levels[real],
        pool.synthetic[real],
        pool.hard[real],
        pool.class_names,
    )
    return Samples(kept, samples.pixels[real], samples.passed[real], samples.held_out)


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".new")
    unfinished.write_text(json.dumps(_rounded(value), indent=1) + "\n")
    unfinished.replace(file)


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 3) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("build/gap"))
    parser.add_argument("--results", type=Path, help="default: results/gap, a folder each network")
    parser.add_argument(
        "--network",
        choices=list(TRAININGS),
        default="small",
        help="resnet10: the rows of the claim",
    )
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--draws", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--cifar10", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--table", action="store_true", help="print all tables and do nothing else")
    arguments = parser.parse_args()
    folder = RESULTS if arguments.network == "small" else RESULTS / arguments.network
    results, training = arguments.results or folder, TRAININGS[arguments.network]
    if arguments.table:
        from benchmarks.gap_tables import tables

        print(tables(arguments.results or RESULTS))
        return
    if not (RESULTS / "referees.json").exists():
        measure_referees(arguments.work, RESULTS, arguments.cifar10)
    for draw in arguments.draws:
        for name in arguments.settings:
            started = time.time()
            run_unit(name, draw, arguments.work, results, arguments.cifar10, training)
            print(f"{name} {draw}: {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
