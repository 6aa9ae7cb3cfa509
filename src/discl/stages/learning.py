"""Phase 2 of a run: train every method on real and synthetic images, measure them all alike."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..console import progress, say
from ..curriculum import metrics
from ..curriculum.mixture import Mixing, Pool
from ..curriculum.models import ARCHITECTURES, ClassifierConfig, load_classifier
from ..curriculum.objectives import CORRECTED, adjust_logits
from ..curriculum.optimization import make_learning_rate, make_optimizer
from ..curriculum.pixels import Pixels
from ..curriculum.progress import draw_guidance_set
from ..curriculum.strategies import MEASURING, WITHOUT_HARD, RealOnly, make_strategy
from ..curriculum.training import (
    TrainSettings,
    choose_precision,
    epoch_rows,
    predict_logits,
    read_history,
    train_classifier,
)
from ..data import ImageTable
from ..digests import derive_seed, digest
from ..levels import REAL
from ..recipe import Method, Train
from ..workspace import Run, stored_images, write_text

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as every published recipe has them


def train(run: Run) -> Path:
    """Trains the classifier of every method into `train/METHOD`; a finished one is left alone, a half-finished one goes on."""
    kept = _kept_images(run)
    waiting = {name: method for name, method in run.recipe.methods.items() if not _open_method(run, name, method, kept)}
    if waiting:
        size = run.recipe.train.resize or run.recipe.train.image_size
        with progress("decode training images", len(run.tables["train"]) + len(kept)) as advance:
            pool, pixels = make_pool(run.tables["train"], _hard_rows(run), kept, size, advance)
        for name, method in waiting.items():
            _train_method(run, name, method, pool, pixels)
    return run.path("train")


def make_pool(
    real: ImageTable, hard: np.ndarray, synthetic: Dataset, size: int, on_progress: Callable[[int], None] = lambda count: None
) -> tuple[Pool, Pixels]:
    """Every sample that training may draw, and its pixels: the rows of `real`, then those of `synthetic`.

    `hard` bool `[real]`; `synthetic` has `image`, `label` and `level`.
    """
    count, extra = len(real), len(synthetic)
    pool = Pool(
        labels=np.concatenate([real.labels, np.asarray(synthetic["label"], np.int64)]),
        levels=np.concatenate([np.full(count, REAL.percent), np.asarray(synthetic["level"], np.int64)]),
        synthetic=np.repeat([False, True], [count, extra]),
        hard=np.concatenate([hard, np.zeros(extra, bool)]),
        class_names=real.class_names,
    )
    return pool, Pixels([real.rows, synthetic], size, on_progress)


def fit_classifier(table: ImageTable, fitted: list[int], judged: list[int], train: Train, epochs: int, device: torch.device) -> np.ndarray:
    """Probabilities `[judged, classes]` of a plain cross-entropy classifier that is trained on the `fitted` rows only."""
    rows = table.select(fitted + judged)
    empty = Dataset.from_dict({"image": [], "label": [], "level": []})
    pool, pixels = make_pool(rows, np.zeros(len(rows), bool), empty, train.resize or train.image_size)
    count = len(fitted)
    seen = Pool(pool.labels[:count], pool.levels[:count], pool.synthetic[:count], pool.hard[:count], pool.class_names)
    config = _config(train, table.class_names)
    settings = _settings(train, len(fitted), device, epochs, judges=True)
    with tempfile.TemporaryDirectory() as folder, progress("judge training images", epochs) as advance:
        train_classifier(
            seen, pixels, RealOnly(), Mixing(None, 0.0), "cross-entropy", seen.real_counts, config, settings, Path(folder), device=device,
            on_epoch=lambda record: advance(1),
        )  # fmt: skip
        model, _ = load_classifier(Path(folder))
    logits = predict_logits(model.to(device), pixels, np.arange(len(fitted), len(rows)), config, device=device)
    return metrics.softmax_rows(logits).numpy()


def evaluate(run: Run) -> Path:
    """Measures every method on validation and test and writes `results.json`: `{method: {split: {metric: value}}}`.

    A method whose loss is not corrected for the class prior gets a second row `METHOD+la`, post-hoc logit adjustment,
    with τ and the prior (real counts, or the counts effectively trained on) chosen on validation.
    """
    recipe = run.recipe
    splits = {name: table for name, table in run.tables.items() if name != "train"}
    size = recipe.train.resize or recipe.train.image_size
    pixels: dict[str, Pixels] = {}
    results: dict[str, Any] = {}
    predictions: dict[str, Tensor] = {}
    measure = partial(metrics.measure, class_names=run.train.class_names, groups=run.groups, worst_k=recipe.evaluate.worst_k)
    for name, method in recipe.methods.items():
        folder = run.path("train") / name
        stored = folder / "logits.safetensors"
        if not stored.exists():
            model, config = load_classifier(folder)
            logits = {}
            for split, table in splits.items():
                if split not in pixels:
                    with progress(f"decode {split} images", len(table)) as advance:
                        pixels[split] = Pixels([table.rows], size, advance)
                with progress(f"evaluate {name} on {split}", len(table)) as advance:
                    logits[split] = predict_logits(
                        model.to(run.device), pixels[split], np.arange(len(table)), config, _precision(run), run.device,
                        workers=recipe.runtime.workers, on_progress=advance,
                    )  # fmt: skip
            unfinished = stored.with_suffix(".new")
            save_file(logits, unfinished)
            unfinished.replace(stored)
        labels = {split: torch.from_numpy(table.labels) for split, table in splits.items()}
        for row, (rows_logits, stated) in _rows_of(run, name, method, load_file(stored), labels).items():
            results[row] = {split: {**measure(each, labels[split]), **stated} for split, each in rows_logits.items()}
            predictions |= {f"{row}/{split}": each.argmax(1) for split, each in rows_logits.items()}
    save_file(predictions, run.path("predictions.safetensors"))
    write_text(run.path("results.json"), json.dumps(results, indent=2, ensure_ascii=False))
    return run.path("results.json")


def _rows_of(
    run: Run, name: str, method: Method, logits: dict[str, Tensor], labels: dict[str, Tensor]
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """`{row of the table: (logits of each split, what was chosen)}`: the classifier itself and its post-hoc variants."""
    rows: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {name: (logits, {})}
    if method.objective in CORRECTED:
        return rows
    history = read_history(run.path("train") / name / "history.jsonl")
    real = torch.from_numpy(run.tables["train"].class_counts)
    effective = torch.tensor([record["class_samples"] for record in history]).sum(0).clamp_min(1)
    options = [
        (prior, counts, tau) for prior, counts in (("real", real), ("effective", effective)) for tau in run.recipe.evaluate.logit_adjustment
    ]
    if "validation" in logits:
        accuracy = [
            (adjust_logits(logits["validation"], counts, tau).argmax(1) == labels["validation"]).float().mean().item()
            for _, counts, tau in options
        ]
        prior, counts, tau = options[int(np.argmax(accuracy))]
    else:
        prior, counts, tau = options[0]
    adjusted = {split: adjust_logits(each, counts, tau) for split, each in logits.items()}
    rows[f"{name}+la"] = (adjusted, {"prior": prior, "tau": tau})
    return rows


def _train_method(run: Run, name: str, method: Method, pool: Pool, pixels: Pixels) -> None:
    recipe, folder = run.recipe, run.path("train") / name
    strategy = make_strategy(
        method.strategy,
        levels=recipe.spectrum.levels,
        curriculum_epochs=recipe.train.curriculum_epochs,
        level=method.level,
        seed=recipe.train.seed,
    )
    undersample = method.undersample if method.undersample is not None else method.strategy != "real-only" and recipe.hard.rule == "tail"
    mixing = Mixing(
        pool.tail_share if undersample else None, method.synthetic_scale, method.shortage, method.missing,
        with_hard=method.strategy not in WITHOUT_HARD,
    )  # fmt: skip
    settings = _settings(recipe.train, int((~pool.synthetic).sum()), run.device, recipe.train.epochs)
    guidance = None
    if method.strategy in MEASURING:
        images = method.guidance_images or min(2000, int(pool.synthetic.sum()) // 5)
        guidance = draw_guidance_set(pool, recipe.spectrum.levels, images, derive_seed("guidance", recipe.train.seed))
        held_out = np.zeros(len(pool.labels), bool)
        held_out[guidance.rows] = True
        pool = replace(pool, held_out=held_out)
        samples = settings.steps_per_epoch * settings.batch_size
        settings = replace(settings, probe_samples=method.probe_samples or min(30_000, samples // 4))
    config = _config(recipe.train, run.tables["train"].class_names)
    validate = _validator(run, config, settings.precision) if "validation" in run.tables else None
    with progress(f"train {name}", settings.epochs) as advance:
        counts = _prior_counts(pool, strategy, mixing, method, settings)
        history = train_classifier(
            pool, pixels, strategy, mixing, method.objective, counts, config, settings, folder, validate, run.device,
            recipe.runtime.workers, on_epoch=lambda record: advance(1), guidance=guidance,
        )  # fmt: skip
    scales = [record["effective_scale"] for record in history if record["levels"]]
    if scales:
        asked = f"(asked for {method.synthetic_scale:g})"
        say(f"train {name}: {min(scales):.2f} to {max(scales):.2f} distinct synthetic images per real tail image {asked}")


def _prior_counts(pool: Pool, strategy: Any, mixing: Mixing, method: Method, settings: TrainSettings) -> np.ndarray:
    """Class counts of Balanced Softmax: real images, or the samples that all epochs draw together."""
    if method.prior == "real":
        return pool.real_counts
    total = np.zeros(pool.num_classes)
    for epoch in range(settings.epochs):
        rows, _ = epoch_rows(pool, strategy.levels(epoch, []), mixing, settings, epoch)
        total += np.bincount(pool.labels[rows], minlength=pool.num_classes)
    return total


def _validator(run: Run, config: ClassifierConfig, precision: torch.dtype) -> Callable[[nn.Module], float]:
    table = run.tables["validation"]
    pixels = Pixels([table.rows], config.resize)
    labels = torch.from_numpy(table.labels)

    def validate(model: nn.Module) -> float:
        logits = predict_logits(model, pixels, np.arange(len(table)), config, precision, run.device, workers=run.recipe.runtime.workers)
        return (logits.argmax(1) == labels).double().mean().item()

    return validate


def _config(train: Train, class_names: tuple[str, ...]) -> ClassifierConfig:
    width = train.model.width or ARCHITECTURES[train.model.architecture]["width"]
    return ClassifierConfig(
        train.model.architecture, train.model.stem, width, class_names, train.image_size, train.resize or train.image_size, MEAN, STD
    )


def _settings(train: Train, real_images: int, device: torch.device, epochs: int, judges: bool = False) -> TrainSettings:
    asked = train.optimizer
    return TrainSettings(
        epochs=epochs,
        steps_per_epoch=train.steps_per_epoch or -(-real_images // train.batch_size),
        batch_size=train.batch_size,
        augment=tuple(train.augment),
        make_optimizer=partial(
            make_optimizer, name=asked.name, lr=asked.lr, weight_decay=asked.weight_decay, momentum=asked.momentum, nesterov=asked.nesterov
        ),
        learning_rate=make_learning_rate(asked.lr, asked.schedule, epochs, min(asked.warm_up_epochs, epochs - 1), asked.milestones),
        precision=choose_precision(train.precision, device),
        seed=train.seed,
        select="last" if judges else train.select,
    )


def _precision(run: Run) -> torch.dtype:
    return choose_precision(run.recipe.train.precision, run.device)


def _kept_images(run: Run) -> Dataset:
    """The synthetic images that the filter kept, in the order of the plan, memory-mapped: id, image, label, level.

    Label and level are the plan's: a picture in the store may have been made under another numbering of the classes.
    """
    verdicts = [verdict for verdict in pq.read_table(run.path("filter.parquet")).to_pylist() if verdict["keep"]]
    images = stored_images(run, [verdict["id"] for verdict in verdicts])
    for name in ("label", "level"):
        images = images.add_column(name, [verdict[name] for verdict in verdicts])
    return images


def _hard_rows(run: Run) -> np.ndarray:
    hard = set(pq.read_table(run.path("hard.parquet"), columns=["id"]).column("id").to_pylist())
    return np.asarray([name in hard for name in run.tables["train"].ids])


def _fingerprint(run: Run, method: Method, kept: Dataset) -> str:
    """Digest of everything that a method's classifier depends on."""
    listed = pq.read_table(run.path("data.parquet"), columns=["split", "id", "label", "digest"])
    levels = sorted(level.percent for level in run.recipe.spectrum.levels)
    used = [] if method.strategy == "real-only" else [run.recipe.hard.rule, levels, list(kept["id"]), list(kept["label"])]
    hard = np.flatnonzero(_hard_rows(run)).tolist()
    names = list(run.train.class_names)
    return digest(method.model_dump(mode="json"), run.recipe.train.model_dump(mode="json"), names, listed.to_pydict(), hard, used)


def _open_method(run: Run, name: str, method: Method, kept: Dataset) -> bool:
    """Makes a method's folder ready and returns whether its classifier is there.

    What was trained on something else, to the end or not, is deleted first.
    """
    folder, fingerprint = run.path("train") / name, _fingerprint(run, method, kept)
    mark = folder / "method.json"
    found = json.loads(mark.read_text())["fingerprint"] if mark.exists() else None
    if found != fingerprint:
        if found is not None:
            say(f"train {name}: trained on other data or settings; it is trained anew")
        if folder.exists():  # even without a mark, which is how a killed deletion may leave it
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        write_text(mark, json.dumps({"fingerprint": fingerprint, **method.model_dump(mode="json")}, indent=2))
    return (folder / "model.safetensors").exists()
