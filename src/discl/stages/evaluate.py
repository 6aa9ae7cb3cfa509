"""`discl evaluate`: every classifier measured alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import ImageTable
from ..evaluation import metrics
from ..models.classifier import ClassifierConfig, load_classifier, save_classifier
from ..recipe import Method
from ..run_folder import paths
from ..run_folder.run import Run
from ..training.image_cache import ImageCache
from ..training.loop import predict_logits
from ..training.objectives import adjust_logits, make_objective
from ..utils.console import progress
from ..utils.plugins import is_address
from ..utils.stored import read_json, read_tensors, save_tensors, write_text
from .classifiers import ensembles, starter_of
from .resize_data import prepared_table
from .trained import is_ensemble, is_measured, read_note, trained_on, whole_history


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
            run, name, method, read_tensors(run.path(paths.TRAIN) / name / paths.LOGITS), labels
        )
        if _is_ensembled(run, name):
            rows[f"{name}+we"] = _read_ensemble(run, name)
        for row, (logits, stated) in rows.items():
            results[row] = {
                split: {**measure(each, labels[split], domains=domains.get(split)), **stated}
                for split, each in logits.items()
            }
            predictions |= {f"{row}/{split}": each.argmax(1) for split, each in logits.items()}
    save_tensors(predictions, run.path(paths.PREDICTIONS))
    write_text(run.path(paths.RESULTS), json.dumps(results, indent=2, ensure_ascii=False))
    return run.path(paths.RESULTS)


def measure_classifiers(run: Run) -> None:
    """Writes the logits of every split, of each trained classifier and of its ensemble, into its folder; what is there is left alone."""
    splits = {name: table for name, table in run.tables.items() if name != "train"}
    labels, decode = (
        torch.from_numpy(splits["validation"].labels) if "validation" in splits else None,
        _decoder(run, splits),
    )
    for name in run.recipe.methods:
        folder, fingerprint = run.path(paths.TRAIN) / name, trained_on(run, name) or ""
        if not is_measured(run, folder, fingerprint):
            _measure_classifier(run, name, *load_classifier(folder), folder, decode, fingerprint)
        if _is_ensembled(run, name):
            _ensemble(run, name, decode, labels, fingerprint)


def _is_ensembled(run: Run, name: str) -> bool:
    """Whether a method is a tuned CLIP and ensembles are asked for."""
    tuned_clip = run.recipe.training(name).model.architecture == "clip" and run.recipe.methods[
        name
    ].fine_tune in {"full", "lp-ft"}
    return tuned_clip and bool(run.recipe.evaluate.weight_ensembling)


def _decoder(run: Run, splits: dict[str, ImageTable]) -> Callable[[int], dict[str, ImageCache]]:
    """A function that gives the pixels of every split at a size, decoded when they are first asked for."""

    @cache
    def decode(size: int) -> dict[str, ImageCache]:
        result = {}
        for split, table in splits.items():
            with progress(f"decode {split} images", len(table)) as advance:
                result[split] = ImageCache([prepared_table(run, split, size)], size, advance)
        return result

    return decode


def _measure_classifier(
    run: Run,
    name: str,
    model: nn.Module,
    config: ClassifierConfig,
    folder: Path,
    decode: Callable[[int], dict[str, ImageCache]],
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
    save_tensors(logits, folder / paths.LOGITS, metadata)


def _ensemble(
    run: Run,
    name: str,
    decode: Callable[[int], dict[str, ImageCache]],
    labels: Tensor | None,
    fingerprint: str,
) -> None:
    """Makes `train/METHOD/we`, the classifier whose weights lie between those of the pretrained and of the tuned CLIP, with its logits.

    α has the best macro F1 on validation, whose labels these are; without a validation split it is 0.5, the default of arXiv 2109.01903.
    """
    folder, alphas = (
        run.path(paths.TRAIN) / name / paths.ENSEMBLE,
        list(run.recipe.evaluate.weight_ensembling),
    )
    mark = folder / paths.ENSEMBLE_MARK
    if is_ensemble(run, folder, alphas, fingerprint):
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


def _read_ensemble(run: Run, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(logits of each split, α) of a method's ensemble."""
    folder = run.path(paths.TRAIN) / name / paths.ENSEMBLE
    alpha = read_json(folder / paths.ENSEMBLE_MARK, "alpha")["alpha"]
    return read_tensors(folder / paths.LOGITS), {"alpha": alpha}


def _rows_of(
    run: Run, name: str, method: Method, logits: dict[str, Tensor], labels: dict[str, Tensor]
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """`{row of the table: (logits of each split, what was chosen)}`: the classifier itself and its post-hoc variants."""
    rows: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {name: (logits, {})}
    history = whole_history(run, name)
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
    noted = read_note(run, name).get("corrected")
    return (
        noted
        if isinstance(noted, bool)
        else make_objective(method.objective, run.allow_plugins).corrected
    )
