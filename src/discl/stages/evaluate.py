"""`discl evaluate`: every classifier measured alike."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import ImageTable
from ..errors import CheckpointError
from ..evaluation import metrics
from ..evaluation.controls import ADJUSTED, ENSEMBLED, NORMALISED
from ..models.classifier import (
    TRAINED_AGAIN,
    ClassifierConfig,
    load_classifier,
    save_classifier,
)
from ..recipe import Method
from ..run_folder import paths
from ..run_folder.run import Run
from ..training.image_cache import ImageCache
from ..training.inference import predict_logits, side_of_crops
from ..training.loop import LAST_LAYER
from ..training.objectives import FLYP, adjust_logits, make_objective, normalise_head
from ..utils.console import progress
from ..utils.plugins import is_address
from ..utils.stored import read_json, read_tensors, reading, save_tensors, write_text
from .classifiers import ensemble_weights, starter_of
from .resize_data import prepared_table
from .trained import (
    describe_crops,
    is_ensemble,
    is_measured,
    read_note,
    trained_on,
    whole_history,
)

Rows = dict[str, tuple[dict[str, Tensor], dict[str, Any]]]
"""`{row of the table: (logits of each split, settings)}`"""


def evaluate(run: Run) -> Path:
    """Measures every method on validation and test; returns the path of `results.json`.

    It holds `{method: {split: {metric: value}}}`, with further rows:

    - `METHOD+la`, post-hoc logit adjustment, if the method's loss does not correct for the class
      prior. τ and the prior (real counts, or those of the samples trained on) have the best mean
      class accuracy on validation, unless the recipe's `adjustment` sets them.
    - `METHOD+tau`, the class vectors of a linear head ÷ ‖w‖^τ, if the recipe offers τ. The best one
      is chosen in the same way.
    - `METHOD+we`, weight ensembling, if the method tunes a CLIP.
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
        rows |= _normalised_rows(run, name, method, rows[name][0], labels)
        if _is_ensembled(run, name):
            rows[name + ENSEMBLED] = _read_ensemble(run, name)
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
    """Writes the missing logits of every split, of each classifier and of its ensemble."""
    splits = {name: table for name, table in run.tables.items() if name != "train"}
    decode = _decoder(run, splits)
    labels = torch.from_numpy(splits["validation"].labels) if "validation" in splits else None
    for name in run.recipe.methods:
        folder, fingerprint = run.path(paths.TRAIN) / name, trained_on(run, name) or ""
        if not is_measured(run, folder, fingerprint):
            classifier = _load(run, name, folder)
            _measure_classifier(
                run, name, *classifier, folder=folder, decode=decode, fingerprint=fingerprint
            )
        if _is_ensembled(run, name):
            _ensemble(run, name, decode, labels, fingerprint)


def _load(run: Run, name: str, folder: Path) -> tuple[nn.Module, ClassifierConfig]:
    """A method's classifier; the base of light tuning is where the recipe says."""
    light = run.recipe.methods[name].fine_tune == "light"
    return load_classifier(folder, run.recipe.training(name).model.checkpoint if light else None)


def _side(run: Run, config: ClassifierConfig) -> int:
    """Side of the squares that evaluation takes its crops from."""
    chosen = run.recipe.evaluate
    return side_of_crops(config, chosen.test_time_crops, chosen.test_time_margin)


def _is_ensembled(run: Run, name: str) -> bool:
    """Whether a method is a tuned CLIP and the recipe wants ensembles."""
    clip = run.recipe.training(name).model.architecture == "clip"
    tuned = run.recipe.methods[name].fine_tune in {"full", "lp-ft", "light"}
    return clip and tuned and bool(run.recipe.evaluate.weight_ensembling)


def _decoder(run: Run, splits: dict[str, ImageTable]) -> Callable[[int], dict[str, ImageCache]]:
    """Returns a function that decodes every split at a size, once."""

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
    *,
    folder: Path,
    decode: Callable[[int], dict[str, ImageCache]],
    fingerprint: str,
) -> None:
    """Writes a classifier's logits of every split to `folder/logits.safetensors`.

    They are in float32 whatever the precision of training: in bfloat16 the highest logits of many
    images are equal.
    """
    logits, crops = {}, run.recipe.evaluate.test_time_crops
    for split, pixels in decode(_side(run, config)).items():
        with progress(f"evaluate {name} on {split}", len(pixels)) as advance:
            logits[split] = predict_logits(
                model.to(run.device),
                pixels,
                np.arange(len(pixels)),
                config,
                device=run.device,
                workers=run.recipe.runtime.workers,
                crops=crops,
                on_progress=advance,
            )
    metadata = {"fingerprint": fingerprint} if fingerprint else {}
    metadata |= describe_crops(run)
    save_tensors(logits, folder / paths.LOGITS, metadata or None)


def _ensemble(
    run: Run,
    name: str,
    decode: Callable[[int], dict[str, ImageCache]],
    labels: Tensor | None,
    fingerprint: str,
) -> None:
    """Makes `train/METHOD/we`: weights between those of the pretrained and of the tuned CLIP.

    - `labels`: of validation, on which α has the best macro F1. Without validation α is 0.5, the
      default of arXiv 2109.01903.
    """
    folder = run.path(paths.TRAIN) / name / paths.ENSEMBLE
    alphas = list(run.recipe.evaluate.weight_ensembling)
    mark = folder / paths.ENSEMBLE_MARK
    if is_ensemble(run, folder, alphas, fingerprint):
        return
    tuned, config = _load(run, name, folder.parent)
    pretrained = _start_of(run, name, tuned, config)
    pixels = decode(_side(run, config)).get("validation")
    crops = run.recipe.evaluate.test_time_crops

    def measure(model: nn.Module) -> float:
        if pixels is None or labels is None:
            return 0.0
        rows = np.arange(len(pixels))
        logits = predict_logits(model, pixels, rows, config, device=run.device, crops=crops)
        return metrics.macro_f1(
            metrics.confusion_matrix(logits.argmax(1), labels, len(config.class_names))
        )

    alpha, figures = ensemble_weights(
        pretrained, tuned.to(run.device), alphas if pixels is not None else [0.5], measure
    )
    shutil.rmtree(folder, ignore_errors=True)
    save_classifier(tuned, config, folder, fingerprint)
    _measure_classifier(
        run, name + ENSEMBLED, tuned, config, folder=folder, decode=decode, fingerprint=fingerprint
    )
    write_text(
        mark,
        json.dumps(
            {"alpha": alpha, "alphas": alphas, "validation_macro_f1": list(figures.values())}
        ),
    )


def _start_of(run: Run, name: str, tuned: nn.Module, config: ClassifierConfig) -> nn.Module:
    """The network before its training; of light tuning the kept start of the light part."""
    if config.light is None:
        return starter_of(config, run.recipe.training(name), run.recipe.prompts.names)()
    start, kept = copy.deepcopy(tuned), run.path(paths.TRAIN) / name / paths.START
    with reading(kept, TRAINED_AGAIN):
        start.load_state_dict(read_tensors(kept, TRAINED_AGAIN))
    return start


def _read_ensemble(run: Run, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(Logits of each split, α) of a method's ensemble."""
    folder = run.path(paths.TRAIN) / name / paths.ENSEMBLE
    alpha = read_json(folder / paths.ENSEMBLE_MARK, "alpha")["alpha"]
    return read_tensors(folder / paths.LOGITS), {"alpha": alpha}


def _rows_of(
    run: Run, name: str, method: Method, logits: dict[str, Tensor], labels: dict[str, Tensor]
) -> Rows:
    """The rows of a classifier and of its `+la`."""
    rows: Rows = {name: (logits, {})}
    history = whole_history(run, name)
    if _is_corrected(run, name, method) or not history:
        return rows
    shown = history[-1].get(LAST_LAYER) or [each["class_samples"] for each in history]
    effective = torch.tensor(shown).view(-1, len(run.train.class_names)).sum(0).clamp_min(1)
    counts = {"real": torch.from_numpy(run.tables["train"].class_counts), "effective": effective}
    taus = run.recipe.evaluate.logit_adjustment
    if method.adjustment is not None:
        prior, tau = str(method.adjustment.prior), method.adjustment.tau
    elif "validation" in logits:
        prior, tau = _choose_adjustment(logits["validation"], labels["validation"], counts, taus)
    else:
        prior, tau = "effective", min(taus, key=lambda each: abs(each - 1))
    adjusted = {split: adjust_logits(each, counts[prior], tau) for split, each in logits.items()}
    rows[name + ADJUSTED] = (adjusted, {"prior": prior, "tau": tau})
    return rows


def _choose_adjustment(
    logits: Tensor, labels: Tensor, counts: dict[str, Tensor], taus: Iterable[float]
) -> tuple[str, float]:
    """The (prior, τ) with the best mean class accuracy, the first of equal ones."""

    def score(option: tuple[str, float]) -> float:
        prior, tau = option
        return _mean_class_accuracy(adjust_logits(logits, counts[prior], tau), labels)

    return max(itertools.product(counts, taus), key=score)


def _mean_class_accuracy(logits: Tensor, labels: Tensor) -> float:
    confusion = metrics.confusion_matrix(logits.argmax(1), labels, logits.shape[1])
    return float(np.mean(list(metrics.class_accuracies(confusion).values())))


def _normalised_rows(
    run: Run, name: str, method: Method, logits: dict[str, Tensor], labels: dict[str, Tensor]
) -> Rows:
    """The row `METHOD+tau` with its τ, where the recipe offers some and the head is linear.

    τ has the best mean class accuracy on validation, unless the method sets it. Without validation
    images it is the one closest to .5.
    """
    own, taus = method.tau_normalisation, run.recipe.evaluate.tau_normalisation
    rebuilt = method.loss.name == FLYP or method.fine_tune == "zero-shot"
    if own is None and (not taus or rebuilt or _is_corrected(run, name, method)):
        return {}
    head = _linear_head(_load(run, name, run.path(paths.TRAIN) / name)[0])
    if head is None:
        return {}
    bias = None if head.bias is None else head.bias.detach()
    normalised = partial(normalise_head, weight=head.weight.detach(), bias=bias)
    tau = own
    if tau is None and "validation" in logits:
        tau = max(
            taus,
            key=lambda each: _mean_class_accuracy(
                normalised(logits["validation"], tau=each), labels["validation"]
            ),
        )
    elif tau is None:
        tau = min(taus, key=lambda each: abs(each - 0.5))
    rows = {split: normalised(each, tau=tau) for split, each in logits.items()}
    return {name + NORMALISED: (rows, {"tau_normalisation": tau})}


def _linear_head(model: nn.Module) -> nn.Linear | None:
    """The last layer of a classifier, if it is linear and by itself."""
    try:
        head = getattr(model, "head", None)
    except CheckpointError:  # a network of transformers without a separate head
        return None
    return head if isinstance(head, nn.Linear) else None


def _is_corrected(run: Run, name: str, method: Method) -> bool:
    """Whether a method's loss corrects for the class prior; noted in training if it is custom."""
    if not is_address(method.loss.name):
        return method.loss.corrected
    noted = read_note(run, name).get("corrected")
    if isinstance(noted, bool):
        return noted
    return make_objective(method.objective, run.allow_plugins).corrected
