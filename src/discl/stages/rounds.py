"""The rounds of a loop: generate, filter, train the learner, measure; then the next."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from ..curriculum.rounds import round_starts
from ..curriculum.sampling import Pool
from ..curriculum.schedule import Record
from ..errors import RunError
from ..evaluation.metrics import softmax_rows
from ..recipe.loop import learner_of
from ..run_folder import paths
from ..run_folder.run import Run
from ..training.checkpoint import copy_checkpoint, finished_epochs
from ..training.distributed import Processes
from ..training.image_cache import ImageCache
from ..training.inference import predict_logits
from ..training.loop import TrainingJob, train_classifier
from ..utils.atomic import make_folder
from ..utils.console import progress
from ..utils.counts import count_of
from ..utils.logging import get_logger
from ..utils.stored import read_table
from .budget import rows_by_level
from .filter import filter_spectrum
from .generate import generate
from .method_plan import named_by_method, plan_method
from .plan import make_plan
from .resize_data import prepared_table
from .round_plan import (
    cells_of,
    kept_digests,
    loop_of,
    read_rounds,
    training_key,
    write_rounds,
)
from .sample_pool import grow_pool, hard_rows, held_out_sources, kept_images, make_pool
from .train import input_of, make_job, training_pixels

logger = get_logger(__name__)

DIGITS = 6
"""Decimals of measured figures; records are read again as they were written."""


def run_rounds(run: Run, ray: str | None = None) -> Path:
    """Goes through all rounds but the last, of which it writes the plan; returns the loop's folder.

    The stages after it make the last round. A killed round goes on: its images are those that the
    records of the rounds before ask for, and its training resumes.

    - `ray`: the address of a Ray cluster whose workers make the images.
    """
    learner, loop = learner_of(run.recipe), loop_of(run)
    if learner is None or loop is None:
        return run.folder
    while len(history := read_rounds(run, learner)) + 1 < loop.rounds:
        number = len(history)
        logger.info(f"loop: round {number + 1} of {loop.rounds}")
        make_plan(run)
        generate(run, ray=ray)
        filter_spectrum(run)
        kept = kept_images(run, run.recipe.methods[learner].threshold)
        intact = _intact(history, kept)
        if len(intact) < number:
            logger.warning("loop: other images were kept than before; the rounds start again")
            shutil.rmtree(run.path(paths.LOOP) / paths.LEARNER, ignore_errors=True)
            write_rounds(run, learner, intact)
            continue
        record = _learn(run, learner, number, kept)
        write_rounds(run, learner, [*history, record])
        _report(record)
    make_plan(run)
    return run.path(paths.LOOP)


def check_whole(run: Run) -> None:
    """Raises RunError where only a shard of a loop's plan would be made."""
    loop = loop_of(run)
    if loop is not None:
        raise RunError(
            f"--shard divides one plan, but each of the {loop.rounds} rounds of the loop has its "
            "own, which depends on the round before; leave it out, or use --ray."
        )


def _intact(history: list[Record], kept: Dataset) -> list[Record]:
    """The first records whose rounds kept the same images as now."""
    digests, intact = kept_digests(kept), []
    for record in history:
        if record["kept_digest"] != digests.get(record["round"], ""):
            break
        intact.append(record)
    return intact


def _learn(run: Run, learner: str, number: int, kept: Dataset) -> Record:
    """Trains the learner on all rounds so far, measures it; returns the record of the round."""
    method, loop = run.recipe.methods[learner], run.recipe.loop
    rounds, epochs = loop.rounds if loop else 1, run.recipe.training(learner).curriculum_epochs
    starts = round_starts(rounds, epochs)
    end = starts[number + 1]
    pool = grow_pool(run, learner, make_pool(run.train, hard_rows(run), kept), kept)
    with named_by_method(learner, f" Round {number + 1} of the loop was not trained."):
        plan = plan_method(run, learner, method, pool, silent=number > 0, until=end)
    key = training_key(run, learner, kept, number)
    settings = replace(plan.settings, fingerprint=key, select="last")
    size, mode, _ = input_of(run, learner, method)
    pixels = training_pixels(run, size, mode, kept)
    job = make_job(run, learner, method, replace(plan, settings=settings), pixels)
    folder = make_folder(run.path(paths.LOOP) / paths.LEARNER)
    checkpoint = folder / paths.CHECKPOINT
    before = training_key(run, learner, kept, number - 1)
    if number and finished_epochs(checkpoint, before) == starts[number]:
        copy_checkpoint(checkpoint, checkpoint, key)
    elif not 0 <= finished_epochs(checkpoint, key) <= end:
        checkpoint.unlink()  # of other images; an epoch is a function of the rounds so far
    measured: dict[str, Any] = {}
    with progress(f"train {learner}, round {number + 1} of {rounds}", end) as advance:
        history = train_classifier(
            job,
            folder,
            device=run.device,
            processes=Processes(),
            on_epoch=lambda record: advance(1),
            until=end,
            at_pause=lambda model: measured.update(_measure(run, model, job)),
        )
    latest = [each["progress"] for each in history if "progress" in each][-1:]
    return {
        "round": number,
        "epochs": [starts[number], end],
        **_count(run, number),
        "kept_digest": kept_digests(kept).get(number, ""),
        "loss": history[-1]["loss"],
        **measured,
        **({"progress": latest[0]} if latest else {}),
    }


def _count(run: Run, number: int) -> Record:
    """What the round asked for, kept and spent, by class and level."""
    verdicts = read_table(run.path(paths.FILTER), ["label", "level", "keep", "round"]).to_pylist()
    rows = [row for row in verdicts if row["round"] == number]
    prices = rows_by_level(run)
    return {
        "asked": cells_of(rows, [1] * len(rows)),
        "kept": cells_of(rows, [int(row["keep"]) for row in rows]),
        "rows": cells_of(rows, [prices[row["level"]] for row in rows]),
    }


def _measure(run: Run, model: nn.Module, job: TrainingJob) -> Record:
    """What the learner makes of held-out images: of its own, and of validation."""
    device, config = run.device, job.classifier
    named = {name: row for row, name in enumerate(run.train.ids)}
    apart = np.isin(job.pool.sources, [named[each] for each in held_out_sources(run)])
    rows = np.flatnonzero(apart)
    result: Record = {"measured": {}}
    if len(rows):
        logits = predict_logits(model, job.pixels, rows, config, device=device)
        result["measured"] = describe_logits(logits, job.pool, rows)
    if "validation" in run.tables:
        table = run.tables["validation"]
        pixels = ImageCache([prepared_table(run, "validation", config.resize)], config.resize)
        everything = np.arange(len(table))
        found = predict_logits(model, pixels, everything, config, device=device).argmax(1).numpy()
        right = found == table.labels
        hard = np.isin(table.labels, np.unique(job.pool.labels[job.pool.hard]))
        result["validation"] = {
            "accuracy": float(right.mean()),
            "hard_accuracy": float(right[hard].mean()) if hard.any() else None,
        }
    return result


def describe_logits(logits: torch.Tensor, pool: Pool, rows: np.ndarray) -> dict[str, Any]:
    """Entropy and true-class probability of each image, by class and level.

    - `logits`: of `rows` of the pool, `[rows, classes]`.

    Entropy is divided by the logarithm of the number of classes.
    """
    chances = softmax_rows(logits).double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(chances > 0, chances * np.log(chances), 0.0)
    entropy = np.clip(-parts.sum(1) / np.log(max(chances.shape[1], 2)), 0, 1)
    true = chances[np.arange(len(rows)), pool.labels[rows]]
    result: dict[str, Any] = {}
    for row, unsure, sure in zip(rows.tolist(), entropy.tolist(), true.tolist(), strict=True):
        own = result.setdefault(str(pool.labels[row]), {})
        images = own.setdefault(str(pool.levels[row]), {"entropy": [], "probability": []})
        images["entropy"].append(round(unsure, DIGITS))
        images["probability"].append(round(sure, DIGITS))
    return result


def _report(record: Mapping[str, Any]) -> None:
    """Says what a round asked for, what it cost and what was learnt."""
    asked, kept = (
        sum(sum(levels.values()) for levels in record[name].values()) for name in ("asked", "kept")
    )
    rows = sum(sum(levels.values()) for levels in record["rows"].values())
    learnt = record.get("validation")
    text = f"; {100 * learnt['accuracy']:.1f} % on validation" if learnt else ""
    logger.info(
        f"loop: round {record['round'] + 1} asked for {count_of(asked, 'image')} "
        f"({count_of(rows, 'UNet row')}), {kept} were kept{text}"
    )
