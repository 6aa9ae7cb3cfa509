"""What a training was made from, and whether its files are intact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from .. import baselines
from ..curriculum import strategies
from ..curriculum.schedule import Record
from ..errors import BrokenFileError, RunError
from ..mixtures import in_long_form
from ..models.classifier import (
    TRAINED_AGAIN,
    ClassifierConfig,
    check_classifier,
    read_config,
    write_config,
)
from ..recipe import Method
from ..recipe.loop import learner_of
from ..recipe.methods import RETRIEVED
from ..run_folder import paths
from ..run_folder.run import Run
from ..training import objectives
from ..training.checkpoint import read_history
from ..training.objectives import make_objective
from ..utils.atomic import make_folder, writing
from ..utils.hashing import digest
from ..utils.logging import get_logger
from ..utils.plugins import is_address, own_source, read_piece
from ..utils.stored import AGAIN, broken, read_header, read_json, read_table, write_text
from .classifiers import checkpoint_identity, describe_classifier
from .sample_pool import hard_rows, held_out_sources

logger = get_logger(__name__)

REDEFINED = {
    "random": "a level for each epoch",
    **dict.fromkeys(strategies.MEASURING, "V by source, in float32"),
}
"""Strategies that drew other samples in an earlier version; their classifiers are trained again."""


def describe_crops(run: Run) -> dict[str, str]:
    """Metadata of logits: which crops they are of; empty for the centre alone."""
    chosen = run.recipe.evaluate
    if chosen.test_time_crops == 1:
        return {}
    margin = "auto" if chosen.test_time_margin is None else str(chosen.test_time_margin)
    return {"crops": f"{chosen.test_time_crops}, margin {margin}"}


def is_measured(run: Run, folder: Path, fingerprint: str) -> bool:
    """Whether a folder holds a classifier's own logits of every split, intact."""
    path, classes = folder / paths.LOGITS, len(run.train.class_names)
    if not path.exists():
        return False
    wanted = {
        split: (len(table), classes) for split, table in run.tables.items() if split != "train"
    }
    try:
        shapes, metadata = read_header(path)
        if shapes != wanted or metadata.get("fingerprint", fingerprint) != fingerprint:
            raise broken(path, "holds the logits of other images or of another classifier")
        if metadata.get("crops") != describe_crops(run).get("crops"):
            return False
    except BrokenFileError as error:
        logger.warning(f"{str(error).removesuffix(f' {AGAIN}')} The classifier is measured again.")
        return False
    return True


def is_ensemble(run: Run, folder: Path, alphas: list[float], fingerprint: str) -> bool:
    """Whether a folder holds an ensemble over these α, intact, with its logits."""
    mark = folder / paths.ENSEMBLE_MARK
    if not mark.exists():
        return False
    try:
        if read_json(mark, "alpha", "alphas")["alphas"] != alphas:
            return False
        check_classifier(folder, read_config(folder), fingerprint)
    except BrokenFileError as error:
        logger.warning(f"{error.path} cannot be used, so the ensemble is made again")
        return False
    return is_measured(run, folder, fingerprint)


def classifier_config(run: Run, name: str) -> ClassifierConfig:
    """Returns the network and the input of a method's classifier."""
    train, method = run.recipe.training(name), run.recipe.methods[name]
    config = describe_classifier(
        train, run.train.class_names, run.recipe.prompts.names, method.loss.name, method.fine_tune
    )
    depth = run.train.depth
    return config if depth is None else replace(config, depth=depth.plain())


def fingerprint(run: Run, name: str, method: Method, added: Dataset) -> str:
    """Returns a digest of everything that a method's classifier depends on.

    - `added`: rows of its images beside the real training images, with their ids and labels.
    """
    listed = read_table(run.path(paths.DATA), ["split", "id", "label", "digest"])
    levels = sorted(run.recipe.spectrum.levels)
    used = (
        []
        if method.strategy == "real-only"
        else [run.recipe.hard.rule, levels, list(added["id"]), list(added["label"])]
    )
    if method.images == RETRIEVED:
        used += [read_table(run.path(paths.RETRIEVED), ["id", "digest"]).to_pydict()]
    hard = np.flatnonzero(hard_rows(run)).tolist()
    train = run.recipe.training(name)
    names = list(run.train.class_names)
    texts = (
        dict(sorted(run.recipe.prompts.names.items())) if train.model.architecture == "clip" else {}
    )
    own = _own_sources(method, run.allow_plugins)
    unused = {"checkpoint"} if method.fine_tune == "light" else {"checkpoint", "light"}
    rounds = (
        [list(added["round"]), train.curriculum_epochs, held_out_sources(run)]
        if name == learner_of(run.recipe)
        else []
    )
    return digest(
        # The added images stand for the threshold; adjustment and τ come after training. The
        # method's own settings and the checkpoint follow below.
        in_long_form(
            method.model_dump(
                mode="json", exclude={"threshold", "adjustment", "tau_normalisation", "train"}
            ),
            run.recipe.hard.rule == "tail",
        ),
        train.model_dump(mode="json", exclude={"model": unused}),
        checkpoint_identity(train),
        names,
        listed.to_pydict(),
        hard,
        used,
        *([texts] if texts else []),  # a CLIP's head is made of them
        *([own] if own else []),
        *([rounds] if rounds else []),
        *([REDEFINED[method.strategy]] if method.strategy in REDEFINED else []),
    )


def _own_sources(method: Method, allow_plugins: bool = False) -> list[str]:
    """Digests of the sources of a method's custom pieces; editing one triggers retraining."""
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
        system, _ = read_piece("system", method.system)
        named.append(("system", system, baselines.SYSTEMS, baselines.GROUP))
    return [source for each in named if (source := own_source(*each, allow_plugins)) is not None]


def trained_on(run: Run, name: str) -> str | None:
    """Returns the fingerprint of a method's folder, whether its training is finished or not."""
    return read_note(run, name).get("fingerprint")


def read_note(run: Run, name: str) -> dict[str, Any]:
    """Returns the content of a method's `method.json`, empty if it does not exist."""
    mark = run.path(paths.TRAIN) / name / paths.METHOD
    advice = f"Put it back, or delete {mark.parent} to have the method trained again."
    return read_json(mark, "fingerprint", advice=advice) if mark.exists() else {}


def is_trained(run: Run, name: str, fingerprint: str) -> bool:
    """Whether a method's classifier exists and is intact; says why broken weights are not.

    Raises BrokenFileError for a broken history, which only a new training can replace.
    """
    folder = run.path(paths.TRAIN) / name
    weights = folder / paths.WEIGHTS
    if trained_on(run, name) != fingerprint or not weights.exists():
        return False
    try:
        check_classifier(
            folder, _own_config(run, name) or classifier_config(run, name), fingerprint
        )
    except BrokenFileError as error:
        cause = str(error).removesuffix(f" {TRAINED_AGAIN}")
        logger.warning(f"train {name}: {cause} The method is trained again.")
        return False
    whole_history(run, name)
    return True


def _own_config(run: Run, name: str) -> ClassifierConfig | None:
    """A method's `config.json`, None if it is unreadable or another classifier's."""
    train = run.recipe.training(name)
    try:
        config = read_config(run.path(paths.TRAIN) / name)
    except BrokenFileError:
        return None
    stated = (config.architecture, config.class_names, config.image_size)
    wanted = (train.model.architecture, run.train.class_names, train.image_size)
    return config if stated == wanted else None


def ensure_config(run: Run, name: str) -> None:
    """Writes a trained method's `config.json` again if it is broken or another classifier's."""
    if _own_config(run, name) is None:
        folder = run.path(paths.TRAIN) / name
        logger.warning(f"train {name}: {folder / paths.CONFIG} cannot be used and is written again")
        write_config(classifier_config(run, name), folder)


def whole_history(run: Run, name: str) -> list[Record]:
    """Returns the history of a trained method; raises BrokenFileError if epochs are missing."""
    path = run.path(paths.TRAIN) / name / paths.HISTORY
    history = read_history(path)
    tuned = run.recipe.methods[name].fine_tune != "zero-shot"
    epochs = run.recipe.training(name).epochs if tuned else 0
    if [record["epoch"] for record in history] != list(range(epochs)):
        raise broken(path, f"is not the history of {epochs} epochs", TRAINED_AGAIN)
    return history


def _check_ours(run: Run, folder: Path) -> None:
    """Raises RunError if a method's folder is a link to a place where no method was trained.

    A run folder from others may hold a link to anything, which must not be deleted.
    """
    target = folder.resolve()
    inside = run.folder.resolve() in target.parents
    if folder.is_symlink() or not (inside or (folder / paths.METHOD).is_file()):
        raise RunError(
            f"{folder} leads to {target}, which would be deleted to train again; remove the link, "
            "or delete the old classifier yourself."
        )


def open_method(run: Run, name: str, method: Method, fingerprint: str) -> None:
    """Prepares a method's folder; a classifier of other data or settings is deleted."""
    folder, present = run.path(paths.TRAIN) / name, trained_on(run, name)
    if present == fingerprint:  # what is left of a classifier with broken weights
        for left in (paths.WEIGHTS, paths.LOGITS):
            with writing(folder / left):
                (folder / left).unlink(missing_ok=True)
        shutil.rmtree(folder / paths.ENSEMBLE, ignore_errors=True)
    if present != fingerprint:
        if present is not None:
            logger.warning(f"train {name}: trained on other data or settings; it is trained again")
        if folder.exists():  # even without method.json, as after a killed deletion
            _check_ours(run, folder)
            shutil.rmtree(folder)
        make_folder(folder)
        noted = {"fingerprint": fingerprint, **method.model_dump(mode="json")}
        if is_address(method.loss.name):  # so that evaluation needs no import
            noted["corrected"] = make_objective(method.objective, run.allow_plugins).corrected
        write_text(folder / paths.METHOD, json.dumps(noted, indent=2))
