"""Phase 2 of a run: train every method on real and synthetic images, measure them all alike."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from .. import baselines
from ..baselines import make_system, read_system
from ..console import progress, say
from ..curriculum import metrics, objectives, strategies
from ..curriculum.course import Record, hold_out_guidance, make_mixing
from ..curriculum.mixture import Mixing, Pool
from ..curriculum.models import (
    TRAINED_AGAIN,
    ClassifierConfig,
    check_classifier,
    load_classifier,
    read_config,
    save_classifier,
    write_config,
)
from ..curriculum.objectives import adjust_logits, make_objective
from ..curriculum.pixels import Pixels
from ..curriculum.processes import Processes, current_processes
from ..curriculum.progress import GuidanceSet
from ..curriculum.strategies import RealOnly, Strategy, follows_progress, make_strategy
from ..curriculum.training import (
    TrainSettings,
    check_batch_size,
    make_course,
    predict_logits,
    read_history,
    train_classifier,
)
from ..data import ImageTable
from ..digests import digest
from ..errors import BrokenFileError, RunError, TrainingError
from ..files import make_folder, writing
from ..plugins import is_address, own_source
from ..recipe import Method, Train, check_own_pieces
from ..stored import (
    AGAIN,
    broken,
    read_header,
    read_json,
    read_table,
    read_tensors,
    save_tensors,
    write_text,
)
from ..workspace import Run
from .classifiers import (
    checkpoint_identity,
    describe_classifier,
    describe_training,
    ensembles,
    starter_of,
)
from .loggers import open_loggers
from .preparing import prepared_table
from .samples import hard_rows, kept_images, made_aspects, make_pool, real_aspects

CLASS_POWER = {"instance": 1.0, "square-root": 0.5, "class-balanced": 0.0}
"""Exponent of a class's share of an epoch, by the name that recipes use."""
REDEFINED = {
    "random": "a level for each epoch",
    **dict.fromkeys(strategies.MEASURING, "V by source, in float32"),
}
"""Strategies that drew other samples in an earlier version: their classifiers are trained again."""


def train(run: Run) -> Path:
    """Trains the classifier of every method into `train/METHOD`; a finished one is left alone, a half-finished one goes on.

    Raises TrainingError for what a method cannot be trained on before any other is trained, and before an old classifier is deleted.
    """
    methods = run.recipe.methods
    check_own_pieces(run.recipe, run.allow_plugins)
    kept = {
        threshold: kept_images(run, threshold)
        for threshold in dict.fromkeys(method.threshold for method in methods.values())
    }
    fingerprints = {
        name: _fingerprint(run, name, method, kept[method.threshold])
        for name, method in methods.items()
    }
    waiting = {
        name: method
        for name, method in methods.items()
        if not _is_trained(run, name, fingerprints[name])
    }
    hard = hard_rows(run)
    pools = {threshold: make_pool(run.train, hard, images) for threshold, images in kept.items()}
    asked = {}
    for name, method in waiting.items():
        try:
            wanted = _ask(run, name, method, pools[method.threshold])
        except TrainingError as error:
            raise TrainingError(f"methods.{name}: {error} Nothing was trained.") from error
        settings = replace(wanted.settings, fingerprint=fingerprints[name])
        asked[name] = replace(wanted, settings=settings)
    processes = current_processes()
    if processes.first:
        for name in methods.keys() - waiting.keys():
            _mend_config(run, name)
    if processes.first and waiting:
        run.settle()
        for name, method in waiting.items():
            _open_method(run, name, method, fingerprints[name])
    processes.wait()  # until the first has made the folders ready
    fed = {
        name: (_config(run, name).resize, run.recipe.training(name).resize_mode, method.threshold)
        for name, method in waiting.items()
    }
    for size, mode, threshold in dict.fromkeys(sorted(fed.values(), key=lambda each: each[:2])):
        pixels = _training_pixels(run, size, mode, kept[threshold])
        for name, method in waiting.items():
            if fed[name] == (size, mode, threshold):
                _train_method(run, name, method, asked[name], pixels)
    return run.path("train")


def _training_pixels(run: Run, size: int, mode: str, synthetic: Dataset) -> Pixels:
    """Real training images, then synthetic ones, at `size` pixels: their centres, or whole with
    their aspects."""
    real = prepared_table(run, "train", size, mode)
    aspects = (
        np.concatenate([real_aspects(run, "train"), made_aspects(run, synthetic["source_id"][:])])
        if mode == "whole"
        else None
    )
    with progress("decode training images", len(real) + len(synthetic)) as advance:
        return Pixels([real, synthetic], size, advance, aspects)


def fit_classifier(
    table: ImageTable,
    fitted: list[int],
    judged: list[int],
    train: Train,
    epochs: int,
    device: torch.device,
    aspects: np.ndarray | None = None,
) -> np.ndarray:
    """Probabilities `[judged, classes]` of a plain cross-entropy classifier that is trained on the
    `fitted` rows only.

    `aspects` is width / height of the images of `table`, which `train.resize_mode: whole` needs.
    """
    rows = table.select(fitted + judged)
    config = describe_classifier(train, table.class_names)
    pool, pixels = (
        make_pool(rows, np.zeros(len(rows), bool), _no_images()),
        Pixels(
            [rows],
            config.resize,
            aspects=aspects[fitted + judged] if aspects is not None else None,
        ),
    )
    count = len(fitted)
    seen = Pool(
        pool.labels[:count],
        pool.levels[:count],
        pool.synthetic[:count],
        pool.hard[:count],
        pool.class_names,
    )
    settings = replace(describe_training(train, "full", len(fitted), device, epochs), select="last")
    with (
        tempfile.TemporaryDirectory() as folder,
        progress("judge training images", epochs) as advance,
    ):
        train_classifier(
            seen, pixels, RealOnly(), Mixing(None, 0.0), "cross-entropy", seen.real_counts, config, settings, Path(folder), device=device,
            on_epoch=lambda record: advance(1), make_model=starter_of(config, train), processes=Processes(),
        )  # fmt: skip
        model, _ = load_classifier(Path(folder))
    logits = predict_logits(
        model.to(device), pixels, np.arange(len(fitted), len(rows)), config, device=device
    )
    return metrics.softmax_rows(logits).numpy()


def evaluate(run: Run) -> Path:
    """Measures every method on validation and test and writes `results.json`: `{method: {split: {metric: value}}}`.

    A method whose loss is not corrected for the class prior gets a second row `METHOD+la`, post-hoc logit adjustment,
    with τ and the prior (real counts, or the counts effectively trained on) of the best mean class accuracy on validation, or as
    the recipe's `adjustment` says. A tuned CLIP gets a row
    `METHOD+we`, weight ensembling.
    """
    splits = {name: table for name, table in run.tables.items() if name != "train"}
    labels = {split: torch.from_numpy(table.labels) for split, table in splits.items()}
    domains = {
        split: table.rows["domain"][:]
        for split, table in splits.items()
        if "domain" in table.rows.column_names
    }
    results: dict[str, Any] = {}
    predictions: dict[str, Tensor] = {}
    measure = partial(
        metrics.measure,
        class_names=run.train.class_names,
        groups=run.groups,
        worst_k=run.recipe.evaluate.worst_k,
    )
    measure_classifiers(run)
    for name, method in run.recipe.methods.items():
        rows = _rows_of(
            run, name, method, read_tensors(run.path("train") / name / "logits.safetensors"), labels
        )
        if _is_ensembled(run, name):
            rows[f"{name}+we"] = _read_ensemble(run, name)
        for row, (logits, stated) in rows.items():
            results[row] = {
                split: {**measure(each, labels[split], domains=domains.get(split)), **stated}
                for split, each in logits.items()
            }
            predictions |= {f"{row}/{split}": each.argmax(1) for split, each in logits.items()}
    run.settle()
    save_tensors(predictions, run.path("predictions.safetensors"))
    write_text(run.path("results.json"), json.dumps(results, indent=2, ensure_ascii=False))
    return run.path("results.json")


def measure_classifiers(run: Run) -> None:
    """Writes the logits of every split, of each trained classifier and of its ensemble, into its folder; what is there is left alone."""
    splits = {name: table for name, table in run.tables.items() if name != "train"}
    labels, decode = (
        torch.from_numpy(splits["validation"].labels) if "validation" in splits else None,
        _decoder(run, splits),
    )
    for name in run.recipe.methods:
        folder, fingerprint = run.path("train") / name, _trained_on(run, name) or ""
        if not _is_measured(run, folder, fingerprint):
            _measure_classifier(run, name, *load_classifier(folder), folder, decode, fingerprint)
        if _is_ensembled(run, name):
            _ensemble(run, name, decode, labels, fingerprint)


def _is_measured(run: Run, folder: Path, fingerprint: str) -> bool:
    """Whether a classifier's logits of every split are there, whole and its own."""
    path, classes = folder / "logits.safetensors", len(run.train.class_names)
    if not path.exists():
        return False
    wanted = {
        split: (len(table), classes) for split, table in run.tables.items() if split != "train"
    }
    try:
        shapes, metadata = read_header(path)
        if shapes != wanted or metadata.get("fingerprint", fingerprint) != fingerprint:
            raise broken(path, "holds the logits of other images or of another classifier")
    except BrokenFileError as error:
        say(f"{str(error).removesuffix(f' {AGAIN}')} So the classifier is measured again.")
        return False
    return True


def _is_ensembled(run: Run, name: str) -> bool:
    """Whether a method is a tuned CLIP and ensembles are asked for."""
    tuned_clip = run.recipe.training(name).model.architecture == "clip" and run.recipe.methods[
        name
    ].fine_tune in {"full", "lp-ft"}
    return tuned_clip and bool(run.recipe.evaluate.weight_ensembling)


def _decoder(run: Run, splits: dict[str, ImageTable]) -> Callable[[int], dict[str, Pixels]]:
    """A function that gives the pixels of every split at a size, decoded when they are first asked for."""

    @cache
    def decode(size: int) -> dict[str, Pixels]:
        result = {}
        for split, table in splits.items():
            with progress(f"decode {split} images", len(table)) as advance:
                result[split] = Pixels([prepared_table(run, split, size)], size, advance)
        return result

    return decode


def _measure_classifier(
    run: Run,
    name: str,
    model: nn.Module,
    config: ClassifierConfig,
    folder: Path,
    decode: Callable[[int], dict[str, Pixels]],
    fingerprint: str,
) -> None:
    """Writes a classifier's logits of every split to `folder/logits.safetensors`.

    They are computed in float32 whatever it was trained in: bfloat16 has so few values that the highest logits of many images tie.
    """
    logits = {}
    for split, pixels in decode(config.resize).items():
        with progress(f"evaluate {name} on {split}", len(pixels)) as advance:
            logits[split] = predict_logits(
                model.to(run.device), pixels, np.arange(len(pixels)), config, device=run.device,
                workers=run.recipe.runtime.workers, on_progress=advance,
            )  # fmt: skip
    metadata = {"fingerprint": fingerprint} if fingerprint else None
    save_tensors(logits, folder / "logits.safetensors", metadata)


def _ensemble(
    run: Run,
    name: str,
    decode: Callable[[int], dict[str, Pixels]],
    labels: Tensor | None,
    fingerprint: str,
) -> None:
    """Makes `train/METHOD/we`, the classifier whose weights lie between those of the pretrained and of the tuned CLIP, with its logits.

    α has the best macro F1 on validation, whose labels these are; without a validation split it is 0.5, the default of arXiv 2109.01903.
    """
    folder, alphas = run.path("train") / name / "we", list(run.recipe.evaluate.weight_ensembling)
    mark = folder / "ensemble.json"
    if _is_ensemble(run, folder, alphas, fingerprint):
        return
    tuned, config = load_classifier(folder.parent)
    pretrained = starter_of(config, run.recipe.training(name), run.recipe.prompts.names)()
    pixels = decode(config.resize).get("validation")

    def measure(model: nn.Module) -> float:
        if pixels is None or labels is None:
            return 0.0
        logits = predict_logits(model, pixels, np.arange(len(pixels)), config, device=run.device)
        return metrics.macro_f1(
            metrics.confusion_matrix(logits.argmax(1), labels, len(config.class_names))
        )

    alpha, figures = ensembles(
        pretrained, tuned.to(run.device), alphas if pixels is not None else [0.5], measure
    )
    shutil.rmtree(folder, ignore_errors=True)
    save_classifier(tuned, config, folder, fingerprint)
    _measure_classifier(run, f"{name}+we", tuned, config, folder, decode, fingerprint)
    write_text(
        mark,
        json.dumps(
            {"alpha": alpha, "alphas": alphas, "validation_macro_f1": list(figures.values())}
        ),
    )


def _is_ensemble(run: Run, folder: Path, alphas: list[float], fingerprint: str) -> bool:
    """Whether a folder holds an ensemble over these α, whole, with its logits."""
    mark = folder / "ensemble.json"
    if not mark.exists():
        return False
    try:
        if read_json(mark, "alpha", "alphas")["alphas"] != alphas:
            return False
        check_classifier(folder, read_config(folder), fingerprint)
    except BrokenFileError as error:
        say(f"{error.path} cannot be used, so the ensemble is made again")
        return False
    return _is_measured(run, folder, fingerprint)


def _read_ensemble(run: Run, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(logits of each split, α) of a method's ensemble."""
    folder = run.path("train") / name / "we"
    alpha = read_json(folder / "ensemble.json", "alpha")["alpha"]
    return read_tensors(folder / "logits.safetensors"), {"alpha": alpha}


def _rows_of(
    run: Run, name: str, method: Method, logits: dict[str, Tensor], labels: dict[str, Tensor]
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """`{row of the table: (logits of each split, what was chosen)}`: the classifier itself and its post-hoc variants."""
    rows: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {name: (logits, {})}
    history = _whole_history(run, name)
    if _is_corrected(run, name, method) or not history:
        return rows
    counts = {
        "real": torch.from_numpy(run.tables["train"].class_counts),
        "effective": torch.tensor(
            history[-1].get("last_layer_samples") or [record["class_samples"] for record in history]
        )
        .view(-1, len(run.train.class_names))
        .sum(0)
        .clamp_min(1),
    }
    options: list[tuple[str, float]] = [
        (prior, tau) for prior in counts for tau in run.recipe.evaluate.logit_adjustment
    ]
    prior: str
    if method.adjustment is not None:
        prior, tau = method.adjustment.prior, method.adjustment.tau
    elif "validation" in logits:

        def judge(option: tuple[str, float]) -> float:
            predicted = adjust_logits(logits["validation"], counts[option[0]], option[1]).argmax(1)
            confusion = metrics.confusion_matrix(
                predicted, labels["validation"], len(counts["real"])
            )
            return float(np.mean(list(metrics.class_accuracies(confusion).values())))

        prior, tau = max(options, key=judge)
    else:
        prior, tau = (
            "effective",
            min(run.recipe.evaluate.logit_adjustment, key=lambda each: abs(each - 1)),
        )
    adjusted = {split: adjust_logits(each, counts[prior], tau) for split, each in logits.items()}
    rows[f"{name}+la"] = (adjusted, {"prior": prior, "tau": tau})
    return rows


def _is_corrected(run: Run, name: str, method: Method) -> bool:
    """Whether a method's loss corrects for the class prior; of one of your own, what was noted when it was trained."""
    if not is_address(method.loss.name):
        return method.loss.corrected
    noted = _noted(run, name).get("corrected")
    return (
        noted
        if isinstance(noted, bool)
        else make_objective(method.objective, run.allow_plugins).corrected
    )


@dataclass(frozen=True)
class _Asked:
    """What a method is trained on and how; `pool` without V, where there is one."""

    pool: Pool
    strategy: Strategy
    mixing: Mixing
    settings: TrainSettings
    guidance: GuidanceSet | None


def check_training(run: Run) -> None:
    """Raises TrainingError for what a method cannot be trained on whatever its synthetic images are; `hard.parquet` is there already.

    A method whose strategy is `module:attribute` is passed over: that is imported by the stage that trains.
    """
    pool = make_pool(run.train, hard_rows(run), _no_images())
    for name, method in run.recipe.methods.items():
        if is_address(method.strategy):
            continue
        try:
            _ask_of_real(run, name, method, pool)
        except TrainingError as error:
            raise TrainingError(f"methods.{name}: {error}") from error


def _ask(run: Run, name: str, method: Method, pool: Pool) -> _Asked:
    """What a method asks for. Raises TrainingError where the pool or the processes cannot give it."""
    asked, levels = _ask_of_real(run, name, method, pool), run.recipe.spectrum.levels
    if follows_progress(method.strategy, asked.strategy):
        pool, guidance = hold_out_guidance(
            pool, levels, method.guidance_images, asked.settings.seed
        )
        _tell_guidance(name, method, pool, guidance)
        asked = replace(asked, pool=pool, guidance=guidance)
    if asked.settings.epochs:
        course = make_course(
            asked.pool, asked.strategy, asked.mixing, asked.settings, asked.guidance
        )
        course.check(levels, asked.settings.epochs)
    return asked


def _tell_guidance(name: str, method: Method, pool: Pool, guidance: GuidanceSet) -> None:
    """Says what V takes from training, and where it is smaller than the recipe asks for."""
    held, hard = int((pool.hard & pool.held_out).sum()), int(pool.hard.sum())
    sources = len(np.unique(pool.sources[guidance.rows]))
    less = (
        f", not {method.guidance_images}: no more have one and can be spared by their class"
        if method.guidance_images and sources < method.guidance_images
        else ""
    )
    say(
        f"train {name}: progress is measured on {sources} hard image{'s' * (sources != 1)}, by one "
        f"synthetic image at every level{less}; "
        f"{held} of {hard} hard images are held out of training with all their synthetic images"
    )


def _ask_of_real(run: Run, name: str, method: Method, pool: Pool) -> _Asked:
    """What a method asks for, without V: whatever does not depend on the synthetic images, which may be missing in the pool.

    Raises TrainingError where the real images or the processes cannot give it.
    """
    recipe = run.recipe
    strategy = make_strategy(
        method.strategy,
        levels=recipe.spectrum.levels,
        curriculum_epochs=recipe.training(name).curriculum_epochs,
        level=method.level,
        seed=recipe.training(name).seed,
        allow_plugins=run.allow_plugins,
    )
    undersample = (
        method.undersample
        if method.undersample is not None
        else method.strategy != "real-only" and recipe.hard.rule == "tail"
    )
    mixing = make_mixing(
        pool,
        strategy,
        undersample,
        method.synthetic_scale,
        method.shortage,
        method.missing,
        CLASS_POWER[method.sampling],
    )
    train = recipe.training(name)
    settings = describe_training(
        train, method.fine_tune, int((~pool.synthetic).sum()), run.device, train.epochs
    )
    if follows_progress(method.strategy, strategy):
        samples = settings.steps_per_epoch * settings.batch_size
        settings = replace(
            settings, probe_samples=method.probe_samples or min(30_000, samples // 4)
        )
    if settings.epochs:
        check_batch_size(pool, settings.batch_size)
        current_processes().check_batch_size(settings.batch_size, settings.stepping.accumulate)
        make_course(pool, strategy, mixing, settings)
    return _Asked(pool, strategy, mixing, settings, None)


def _no_images() -> Dataset:
    """Synthetic images, where there are none."""
    return Dataset.from_dict({"image": [], "label": [], "level": []})


def _train_method(run: Run, name: str, method: Method, asked: _Asked, pixels: Pixels) -> None:
    recipe, folder, train = run.recipe, run.path("train") / name, run.recipe.training(name)
    pool, strategy, mixing, settings = asked.pool, asked.strategy, asked.mixing, asked.settings
    config = _config(run, name)
    validate = _validator(run, config) if "validation" in run.tables else None
    loggers = recipe.runtime.loggers if current_processes().first else []
    logs = run.path("logs")
    opened = open_loggers(loggers, logs, f"{recipe.name}-{name}", folder / "wandb.txt")
    with progress(f"train {name}", settings.epochs) as advance, opened as log:

        def on_epoch(record: dict[str, Any]) -> None:
            advance(1)
            log(record)

        counts = _prior_counts(pool, strategy, mixing, method, settings)
        objective = make_objective(method.objective, run.allow_plugins)
        history = train_classifier(
            pool, pixels, strategy, mixing, objective, counts, config, settings, folder, validate, run.device, 
            on_epoch=on_epoch, guidance=asked.guidance, make_model=starter_of(config, train, recipe.prompts.names),
            companion=make_system(method.system, run.allow_plugins) if method.system else None,
        )  # fmt: skip
    apart = [record["classes_apart"] for record in history if "classes_apart" in record]
    if apart:
        say(
            f"train {name}: {min(apart)} to {max(apart)} of {pool.num_classes} classes took another level than the common one"
        )
    scales = [record["effective_scale"] for record in history if record["levels"]]
    if scales:
        wanted = f"(asked for {method.synthetic_scale:g})"
        say(
            f"train {name}: {min(scales):.2f} to {max(scales):.2f} distinct synthetic images per real tail image {wanted}"
        )


def _prior_counts(
    pool: Pool, strategy: Any, mixing: Mixing, method: Method, settings: TrainSettings
) -> np.ndarray:
    """Class counts of Balanced Softmax: real images, or the samples that all epochs draw together."""
    if method.prior == "real":
        return pool.real_counts
    total = np.zeros(pool.num_classes)
    course = make_course(pool, strategy, mixing, settings)
    for epoch in range(settings.epochs):
        rows, _ = course.draw(epoch, 0, [])
        total += np.bincount(pool.labels[rows], minlength=pool.num_classes)
    return total


def _validator(run: Run, config: ClassifierConfig) -> Callable[[nn.Module], float]:
    """Accuracy on validation, in float32 as `evaluate` has it: bfloat16 lets the highest logits of
    many images tie."""
    table = run.tables["validation"]
    pixels = Pixels([prepared_table(run, "validation", config.resize)], config.resize)
    labels = torch.from_numpy(table.labels)

    def validate(model: nn.Module) -> float:
        logits = predict_logits(
            model,
            pixels,
            np.arange(len(table)),
            config,
            device=run.device,
            workers=run.recipe.runtime.workers,
        )
        return (logits.argmax(1) == labels).double().mean().item()

    return validate


def _config(run: Run, name: str) -> ClassifierConfig:
    train, method = run.recipe.training(name), run.recipe.methods[name]
    config = describe_classifier(
        train, run.train.class_names, run.recipe.prompts.names, method.loss.name
    )
    depth = run.train.depth
    return config if depth is None else replace(config, depth=depth.plain())


def _fingerprint(run: Run, name: str, method: Method, kept: Dataset) -> str:
    """Digest of everything that a method's classifier depends on."""
    listed = read_table(run.path("data.parquet"), ["split", "id", "label", "digest"])
    levels = sorted(level.percent for level in run.recipe.spectrum.levels)
    used = (
        []
        if method.strategy == "real-only"
        else [run.recipe.hard.rule, levels, list(kept["id"]), list(kept["label"])]
    )
    hard = np.flatnonzero(hard_rows(run)).tolist()
    train = run.recipe.training(name)
    names = list(run.train.class_names)
    texts = (
        dict(sorted(run.recipe.prompts.names.items())) if train.model.architecture == "clip" else {}
    )
    own = _own_sources(method, run.allow_plugins)
    return digest(
        # What was kept tells of the threshold; the adjustment comes after; settings of its own and the checkpoint follow below.
        method.model_dump(mode="json", exclude={"threshold", "adjustment", "train"}),
        train.model_dump(mode="json", exclude={"model": {"checkpoint"}}),
        checkpoint_identity(train),
        names,
        listed.to_pydict(),
        hard,
        used,
        *([texts] if texts else []),  # a CLIP's head is made of them
        *([own] if own else []),
        *([REDEFINED[method.strategy]] if method.strategy in REDEFINED else []),
    )


def _own_sources(method: Method, allow_plugins: bool = False) -> list[str]:
    """Digests of the sources of a method's pieces that do not ship, so that one that was edited is trained with anew."""
    named: list[tuple[str, str, Mapping[str, Any], str]] = [
        ("strategy", method.strategy, strategies.STRATEGIES, strategies.GROUP),
        (
            "objective",
            method.loss.name,
            {**objectives.OBJECTIVES, objectives.FLYP: objectives.contrastive},
            objectives.GROUP,
        ),
    ]
    if method.system is not None:
        system, _ = read_system(method.system)
        named.append(("system", system, baselines.SYSTEMS, baselines.GROUP))
    return [source for each in named if (source := own_source(*each, allow_plugins)) is not None]


def _trained_on(run: Run, name: str) -> str | None:
    """Fingerprint of what lies in a method's folder, trained to the end or not."""
    return _noted(run, name).get("fingerprint")


def _noted(run: Run, name: str) -> dict[str, Any]:
    """What `method.json` of a method's folder says; empty where there is none."""
    mark = run.path("train") / name / "method.json"
    advice = f"Put it back, or delete {mark.parent} to have the method trained again."
    return read_json(mark, "fingerprint", advice=advice) if mark.exists() else {}


def _is_trained(run: Run, name: str, fingerprint: str) -> bool:
    """Whether a method's classifier is there and whole; says of weights that are not.

    Raises BrokenFileError for a broken history, which only another training would give.
    """
    folder = run.path("train") / name
    weights = folder / "model.safetensors"
    if _trained_on(run, name) != fingerprint or not weights.exists():
        return False
    try:
        check_classifier(folder, _own_config(run, name) or _config(run, name), fingerprint)
    except BrokenFileError as error:
        told = str(error).removesuffix(f" {TRAINED_AGAIN}")
        say(f"train {name}: {told} So the method is trained again.")
        return False
    _whole_history(run, name)
    return True


def _own_config(run: Run, name: str) -> ClassifierConfig | None:
    """What a method's `config.json` says; None where it cannot be read or is another classifier's."""
    train = run.recipe.training(name)
    try:
        config = read_config(run.path("train") / name)
    except BrokenFileError:
        return None
    stated = (config.architecture, config.class_names, config.image_size)
    wanted = (train.model.architecture, run.train.class_names, train.image_size)
    return config if stated == wanted else None


def _mend_config(run: Run, name: str) -> None:
    """Writes a trained method's `config.json` again where it is broken or another classifier's."""
    if _own_config(run, name) is None:
        folder = run.path("train") / name
        say(f"train {name}: {folder / 'config.json'} cannot be used, so it is written again")
        write_config(_config(run, name), folder)


def _whole_history(run: Run, name: str) -> list[Record]:
    """The history of a trained method. Raises BrokenFileError where it is not that of all epochs."""
    path = run.path("train") / name / "history.jsonl"
    history = read_history(path)
    tuned = run.recipe.methods[name].fine_tune != "zero-shot"
    epochs = run.recipe.training(name).epochs if tuned else 0
    if [record["epoch"] for record in history] != list(range(epochs)):
        raise broken(path, f"is not the history of {epochs} epochs", TRAINED_AGAIN)
    return history


def _check_ours(run: Run, folder: Path) -> None:
    """Raises RunError where a method's folder lies elsewhere, through a link, and nothing shows that a method was trained there.

    A run folder of others may hold a link to anything, which is not to be deleted.
    """
    there = folder.resolve()
    inside = run.folder.resolve() in there.parents
    if folder.is_symlink() or not (inside or (folder / "method.json").is_file()):
        raise RunError(
            f"{folder} leads to {there} and would be deleted to train anew; take the link away, or delete the old "
            "classifier there yourself."
        )


def _open_method(run: Run, name: str, method: Method, fingerprint: str) -> None:
    """Makes a method's folder ready: what was trained on something else, to the end or not, is deleted."""
    folder, found = run.path("train") / name, _trained_on(run, name)
    if found == fingerprint:  # what is left of a classifier whose weights are broken
        for left in ("model.safetensors", "logits.safetensors"):
            with writing(folder / left):
                (folder / left).unlink(missing_ok=True)
        shutil.rmtree(folder / "we", ignore_errors=True)
    if found != fingerprint:
        if found is not None:
            say(f"train {name}: trained on other data or settings; it is trained anew")
        if folder.exists():  # even without a mark, which is how a killed deletion may leave it
            _check_ours(run, folder)
            shutil.rmtree(folder)
        make_folder(folder)
        noted = {"fingerprint": fingerprint, **method.model_dump(mode="json")}
        if is_address(method.loss.name):  # so that measuring needs no import
            noted["corrected"] = make_objective(method.objective, run.allow_plugins).corrected
        write_text(folder / "method.json", json.dumps(noted, indent=2))
